"""The configuration of a run: frozen dataclasses that validate themselves."""

from dit_jax.config.files import CHOICES as CHOICES
from dit_jax.config.files import absolute_paths as absolute_paths
from dit_jax.config.files import differences as differences
from dit_jax.config.files import load_config as load_config
from dit_jax.config.files import parse_config as parse_config
from dit_jax.config.files import read_config as read_config
from dit_jax.config.files import stored_config as stored_config
from dit_jax.config.files import to_dict as to_dict
from dit_jax.config.run import LogConfig as LogConfig
from dit_jax.config.run import Run as Run
from dit_jax.config.text_to_video import CodecConfig as CodecConfig
from dit_jax.config.text_to_video import Config as Config
from dit_jax.config.text_to_video import DataConfig as DataConfig
from dit_jax.config.text_to_video import EvaluationConfig as EvaluationConfig
from dit_jax.config.text_to_video import TextEncoderConfig as TextEncoderConfig
