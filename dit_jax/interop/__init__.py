"""Published weights in and out."""

from dit_jax.interop.torch_files import read_torch as read_torch
from dit_jax.interop.torch_files import read_torch_tree as read_torch_tree
from dit_jax.interop.torch_writer import write_torch as write_torch
