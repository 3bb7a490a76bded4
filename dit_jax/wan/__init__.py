"""Wan 2.1 and 2.2: published weights in and out, and what their image-to-video models read."""
