"""Models: patches, positions, the diffusion transformer and the text encoder."""

from dit_jax.model.conditioners import ClassLabels as ClassLabels
from dit_jax.model.conditioners import Conditioner as Conditioner
from dit_jax.model.conditioners import Conditioning as Conditioning
from dit_jax.model.conditioners import Field as Field
from dit_jax.model.conditioners import Signal as Signal
from dit_jax.model.conditioners import check_fields as check_fields
from dit_jax.model.conditioners import prepare_fields as prepare_fields
from dit_jax.model.dit import PRESETS as PRESETS
from dit_jax.model.dit import DiT as DiT
from dit_jax.model.dit import DiTConfig as DiTConfig
from dit_jax.model.dit import ModelConfig as ModelConfig
from dit_jax.model.dit import TextToVideo as TextToVideo
from dit_jax.model.dit import blank_inputs as blank_inputs
from dit_jax.model.dit import no_attention as no_attention
from dit_jax.model.dit import published as published
from dit_jax.model.flops import forward_flops as forward_flops
from dit_jax.model.layers import dense as dense
from dit_jax.model.patches import PatchConfig as PatchConfig
from dit_jax.model.patches import field_tokens as field_tokens
from dit_jax.model.patches import patchify as patchify
from dit_jax.model.patches import positions as positions
from dit_jax.model.patches import unpatchify as unpatchify
from dit_jax.model.text import ByteEncoderConfig as ByteEncoderConfig
from dit_jax.model.text import NoTextConfig as NoTextConfig
from dit_jax.model.text import TextStatesConfig as TextStatesConfig
