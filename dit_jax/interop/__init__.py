"""Published weights in and out: files and folders of them, tables of keys, modules by models."""

from dit_jax.interop.folders import read_arrays as read_arrays
from dit_jax.interop.folders import read_config as read_config
from dit_jax.interop.folders import read_weights as read_weights
from dit_jax.interop.folders import weights_hash as weights_hash
from dit_jax.interop.folders import write_folder as write_folder
from dit_jax.interop.maps import Map as Map
from dit_jax.interop.registry import CODECS as CODECS
from dit_jax.interop.registry import Pipeline as Pipeline
from dit_jax.interop.registry import codec_tools as codec_tools
from dit_jax.interop.registry import pipeline_of as pipeline_of
from dit_jax.interop.registry import text_tools as text_tools
from dit_jax.interop.registry import transformer_of_class as transformer_of_class
from dit_jax.interop.registry import transformer_of_keys as transformer_of_keys
from dit_jax.interop.registry import transformer_of_run as transformer_of_run
from dit_jax.interop.safetensors_files import read_metadata as read_metadata
from dit_jax.interop.safetensors_files import read_safetensors as read_safetensors
from dit_jax.interop.safetensors_files import write_safetensors as write_safetensors
from dit_jax.interop.torch_files import read_torch as read_torch
