"""Data: sources of clips, and rows of packed segments."""

from dit_jax.data.mixing import MixedSetConfig as MixedSetConfig
from dit_jax.data.mixing import MixtureConfig as MixtureConfig
from dit_jax.data.packing import DataError as DataError
from dit_jax.data.packing import Loader as Loader
from dit_jax.data.packing import PackingConfig as PackingConfig
from dit_jax.data.packing import RowStreams as RowStreams
from dit_jax.data.packing import Tokenized as Tokenized
from dit_jax.data.packing import open_source as open_source
from dit_jax.data.records import RecordsConfig as RecordsConfig
from dit_jax.data.records import RecordsSource as RecordsSource
from dit_jax.data.records import TransformConfig as TransformConfig
from dit_jax.data.records import crop as crop
from dit_jax.data.shapes import ShapesConfig as ShapesConfig
from dit_jax.data.shapes import caption as caption
from dit_jax.data.shapes import held_out_scenes as held_out_scenes
