"""Published weights in and out: files and folders of them, tables of keys, and DiT's and SiT's tables.

Tables of other models are in their satellites; ``CODECS`` names those that ``convert`` knows.
"""

from dit_jax.interop.diffusers_dit import DIVISORS as DIVISORS
from dit_jax.interop.diffusers_dit import diffusers_map as diffusers_map
from dit_jax.interop.diffusers_dit import from_diffusers as from_diffusers
from dit_jax.interop.diffusers_dit import to_diffusers as to_diffusers
from dit_jax.interop.dit import DiTFile as DiTFile
from dit_jax.interop.dit import Family as Family
from dit_jax.interop.dit import check_published as check_published
from dit_jax.interop.dit import dit_map as dit_map
from dit_jax.interop.dit import family_of as family_of
from dit_jax.interop.dit import infer_dit as infer_dit
from dit_jax.interop.dit import pick_weights as pick_weights
from dit_jax.interop.dit import preset_name as preset_name
from dit_jax.interop.dit import with_clock as with_clock
from dit_jax.interop.folders import CODECS as CODECS
from dit_jax.interop.folders import codec_tools as codec_tools
from dit_jax.interop.folders import read_config as read_config
from dit_jax.interop.folders import read_weights as read_weights
from dit_jax.interop.folders import text_tools as text_tools
from dit_jax.interop.folders import weights_hash as weights_hash
from dit_jax.interop.folders import write_folder as write_folder
from dit_jax.interop.maps import Map as Map
from dit_jax.interop.safetensors_files import read_safetensors as read_safetensors
from dit_jax.interop.safetensors_files import write_safetensors as write_safetensors
from dit_jax.interop.torch_files import read_torch as read_torch
