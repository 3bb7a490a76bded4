"""Sampling: requests to clips, and clips to files."""

from dit_jax.sampling.clips import make_clips as make_clips
from dit_jax.sampling.generate import Condition as Condition
from dit_jax.sampling.generate import Generator as Generator
from dit_jax.sampling.generate import Request as Request
from dit_jax.sampling.generate import check_request as check_request
from dit_jax.sampling.generate import text_condition as text_condition
from dit_jax.sampling.media import check_output as check_output
from dit_jax.sampling.media import contact_sheet as contact_sheet
from dit_jax.sampling.media import grid as grid
from dit_jax.sampling.media import to_float as to_float
from dit_jax.sampling.media import to_uint8 as to_uint8
from dit_jax.sampling.media import upscale as upscale
from dit_jax.sampling.media import write_png as write_png
from dit_jax.sampling.media import write_video as write_video
from dit_jax.sampling.settings import SamplingConfig as SamplingConfig
