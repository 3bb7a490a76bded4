"""Frozen text encoders (T5, UMT5): their states condition the model."""
