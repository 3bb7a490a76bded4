"""Preparation: raw media to captioned clips, and prompts.

What runs in many light processes (`workers.py`) imports no JAX: all but the verbs and `writing.py`."""
