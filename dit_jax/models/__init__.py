"""Models: patches, positions, the diffusion transformer and the text encoder."""

from dit_jax.models.adversarial import LogitAverages as LogitAverages
from dit_jax.models.adversarial import adaptive_weight as adaptive_weight
from dit_jax.models.adversarial import hinge_discriminator_loss as hinge_discriminator_loss
from dit_jax.models.adversarial import hinge_generator_loss as hinge_generator_loss
from dit_jax.models.adversarial import last_layer_gradients as last_layer_gradients
from dit_jax.models.adversarial import lecam_penalty as lecam_penalty
from dit_jax.models.adversarial import logistic_discriminator_loss as logistic_discriminator_loss
from dit_jax.models.adversarial import masked_mean as masked_mean
from dit_jax.models.adversarial import (
    non_saturating_generator_loss as non_saturating_generator_loss,
)
from dit_jax.models.autoencoder_flops import autoencoder_flops as autoencoder_flops
from dit_jax.models.autoencoder_kl import AutoencoderKL as AutoencoderKL
from dit_jax.models.autoencoder_kl import AutoencoderKLConfig as AutoencoderKLConfig
from dit_jax.models.blocks import as_computed as as_computed
from dit_jax.models.causal_autoencoder import SPACETIME_8 as SPACETIME_8
from dit_jax.models.causal_autoencoder import SPACETIME_8_32 as SPACETIME_8_32
from dit_jax.models.causal_autoencoder import WAN as WAN
from dit_jax.models.causal_autoencoder import CausalAutoencoder as CausalAutoencoder
from dit_jax.models.causal_autoencoder import CausalAutoencoderConfig as CausalAutoencoderConfig
from dit_jax.models.clip_text import CLIP_PRESETS as CLIP_PRESETS
from dit_jax.models.clip_text import CLIPTextConfig as CLIPTextConfig
from dit_jax.models.clip_text import CLIPTextEncoder as CLIPTextEncoder
from dit_jax.models.codec import Codec as Codec
from dit_jax.models.codec import ImageCodec as ImageCodec
from dit_jax.models.codec import PixelCodec as PixelCodec
from dit_jax.models.codec import TileConfig as TileConfig
from dit_jax.models.discriminator import Discriminator as Discriminator
from dit_jax.models.discriminator import DiscriminatorConfig as DiscriminatorConfig
from dit_jax.models.dit import PRESETS as PRESETS
from dit_jax.models.dit import DiT as DiT
from dit_jax.models.dit import DiTConfig as DiTConfig
from dit_jax.models.dit import published as published
from dit_jax.models.flops import forward_flops as forward_flops
from dit_jax.models.patch import PatchConfig as PatchConfig
from dit_jax.models.patch import patchify as patchify
from dit_jax.models.patch import positions as positions
from dit_jax.models.patch import unpatchify as unpatchify
from dit_jax.models.reconstruction_loss import ReconstructionLoss as ReconstructionLoss
from dit_jax.models.reconstruction_loss import (
    ReconstructionLossConfig as ReconstructionLossConfig,
)
from dit_jax.models.reuse import denoise_and_keep as denoise_and_keep
from dit_jax.models.reuse import first_modulation as first_modulation
from dit_jax.models.t5 import T5_PRESETS as T5_PRESETS
from dit_jax.models.t5 import T5Encoder as T5Encoder
from dit_jax.models.t5 import T5EncoderConfig as T5EncoderConfig
from dit_jax.models.text import ByteEncoder as ByteEncoder
from dit_jax.models.text import ByteEncoderConfig as ByteEncoderConfig
from dit_jax.models.text import ClassLabelsConfig as ClassLabelsConfig
from dit_jax.models.text import TextStatesConfig as TextStatesConfig
from dit_jax.models.text import byte_tokens as byte_tokens
from dit_jax.models.text_encoder import Placement as Placement
from dit_jax.models.text_encoder import StatesEncoder as StatesEncoder
from dit_jax.models.text_encoder import TextEncoder as TextEncoder
from dit_jax.models.text_to_video import ModelConfig as ModelConfig
from dit_jax.models.text_to_video import TextToVideo as TextToVideo
from dit_jax.models.vgg import VGG as VGG
from dit_jax.models.vgg import PerceptualNetwork as PerceptualNetwork
from dit_jax.models.vgg import VGGConfig as VGGConfig
from dit_jax.models.vgg import perceptual_distance as perceptual_distance
from dit_jax.models.video_codec import VideoCodec as VideoCodec
from dit_jax.models.video_codec import part_step as part_step
