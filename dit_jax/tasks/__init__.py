"""Tasks: what can be trained. Each is data, a model, a loss and what to show, for the one loop."""

from dit_jax.tasks.abstract import AbstractStep as AbstractStep
from dit_jax.tasks.abstract import AbstractTask as AbstractTask
from dit_jax.tasks.abstract import abstract_denoise as abstract_denoise
from dit_jax.tasks.abstract import abstract_task as abstract_task
from dit_jax.tasks.abstract_codec import abstract_codec_part as abstract_codec_part
from dit_jax.tasks.abstract_codec import abstract_codec_task as abstract_codec_task
from dit_jax.tasks.abstract_codec import parts_of_clip as parts_of_clip
from dit_jax.tasks.autoencoder import build_codec as build_codec
from dit_jax.tasks.codecs import open_codec as open_codec
from dit_jax.tasks.converting import finished_codec as finished_codec
from dit_jax.tasks.converting import read_codec_folder as read_codec_folder
from dit_jax.tasks.converting import write_run as write_run
from dit_jax.tasks.kinds import build as build
from dit_jax.tasks.kinds import recorded as recorded
from dit_jax.tasks.requested import ModeArguments as ModeArguments
from dit_jax.tasks.requested import Plan as Plan
from dit_jax.tasks.requested import Shape as Shape
from dit_jax.tasks.requested import make_plan as make_plan
from dit_jax.tasks.text_encoders import check_reads as check_reads
from dit_jax.tasks.text_encoders import on_mesh as on_mesh
from dit_jax.tasks.text_encoders import open_text_encoder as open_text_encoder
from dit_jax.tasks.text_encoders import with_states as with_states
from dit_jax.tasks.text_to_video import init_params as init_params
from dit_jax.tasks.text_to_video import make_model as make_model
from dit_jax.tasks.trained import SamplingOverrides as SamplingOverrides
from dit_jax.tasks.trained import Trained as Trained
