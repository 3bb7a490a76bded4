"""Models: patches, positions, the diffusion transformer and the text encoder."""

from dit_jax.models.blocks import as_computed as as_computed
from dit_jax.models.dit import PRESETS as PRESETS
from dit_jax.models.dit import DiT as DiT
from dit_jax.models.dit import DiTConfig as DiTConfig
from dit_jax.models.dit import published as published
from dit_jax.models.flops import forward_flops as forward_flops
from dit_jax.models.patch import PatchConfig as PatchConfig
from dit_jax.models.patch import patchify as patchify
from dit_jax.models.patch import positions as positions
from dit_jax.models.patch import unpatchify as unpatchify
from dit_jax.models.text import ByteEncoder as ByteEncoder
from dit_jax.models.text import ByteEncoderConfig as ByteEncoderConfig
from dit_jax.models.text import ClassLabelsConfig as ClassLabelsConfig
from dit_jax.models.text import TextStatesConfig as TextStatesConfig
from dit_jax.models.text import byte_tokens as byte_tokens
from dit_jax.models.text_to_video import ModelConfig as ModelConfig
from dit_jax.models.text_to_video import TextToVideo as TextToVideo
