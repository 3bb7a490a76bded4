"""Sampling: requests to clips, and clips to files."""

from dit_jax.sampling.media import contact_sheet as contact_sheet
from dit_jax.sampling.media import grid as grid
from dit_jax.sampling.media import to_float as to_float
from dit_jax.sampling.media import to_uint8 as to_uint8
from dit_jax.sampling.media import write_png as write_png
from dit_jax.sampling.media import write_video as write_video
from dit_jax.sampling.modes import Generation as Generation
from dit_jax.sampling.modes import make_clips as make_clips
from dit_jax.sampling.modes import plain as plain
from dit_jax.sampling.request import Request as Request
from dit_jax.sampling.request import Space as Space
from dit_jax.sampling.request import make_inputs as make_inputs
from dit_jax.sampling.request import read_prompts as read_prompts
from dit_jax.sampling.sampler import Generator as Generator
from dit_jax.sampling.sampler import SamplingConfig as SamplingConfig
