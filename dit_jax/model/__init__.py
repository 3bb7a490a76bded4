"""Models: patches, positions, the diffusion transformer and the text encoder."""

from dit_jax.model.blocks import as_computed as as_computed
from dit_jax.model.dit import PRESETS as PRESETS
from dit_jax.model.dit import DiT as DiT
from dit_jax.model.dit import DiTConfig as DiTConfig
from dit_jax.model.dit import published as published
from dit_jax.model.flops import forward_flops as forward_flops
from dit_jax.model.patch import PatchConfig as PatchConfig
from dit_jax.model.patch import patchify as patchify
from dit_jax.model.patch import positions as positions
from dit_jax.model.patch import unpatchify as unpatchify
from dit_jax.model.reuse import denoise_and_keep as denoise_and_keep
from dit_jax.model.reuse import first_modulation as first_modulation
from dit_jax.model.text import ByteEncoder as ByteEncoder
from dit_jax.model.text import ByteEncoderConfig as ByteEncoderConfig
from dit_jax.model.text import ClassLabelsConfig as ClassLabelsConfig
from dit_jax.model.text import TextStatesConfig as TextStatesConfig
from dit_jax.model.text import byte_tokens as byte_tokens
from dit_jax.model.text_to_video import ModelConfig as ModelConfig
from dit_jax.model.text_to_video import TextToVideo as TextToVideo
