"""Models: patches, positions, the diffusion transformer and the text encoder."""

from dit_jax.models.autoencoder_kl import AutoencoderKL as AutoencoderKL
from dit_jax.models.autoencoder_kl import AutoencoderKLConfig as AutoencoderKLConfig
from dit_jax.models.blocks import as_computed as as_computed
from dit_jax.models.codec import Codec as Codec
from dit_jax.models.codec import ImageCodec as ImageCodec
from dit_jax.models.codec import TileConfig as TileConfig
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
