"""Data: sources of clips, and rows of packed segments."""

from dit_jax.data.captions import draw_caption as draw_caption
from dit_jax.data.crops import CropConfig as CropConfig
from dit_jax.data.crops import CropLoader as CropLoader
from dit_jax.data.crops import cut as cut
from dit_jax.data.lanes import Lanes as Lanes
from dit_jax.data.packing import Augment as Augment
from dit_jax.data.packing import Loader as Loader
from dit_jax.data.packing import PackingConfig as PackingConfig
from dit_jax.data.packing import Tokenized as Tokenized
from dit_jax.data.packing import check_fits as check_fits
from dit_jax.data.packing import pack_rows as pack_rows
from dit_jax.data.records import RecordsConfig as RecordsConfig
from dit_jax.data.records import RecordsSource as RecordsSource
from dit_jax.data.shapes import MovingShapes as MovingShapes
from dit_jax.data.shapes import Scene as Scene
from dit_jax.data.shapes import ShapesConfig as ShapesConfig
from dit_jax.data.shapes import caption as caption
from dit_jax.data.shapes import held_out_scenes as held_out_scenes
from dit_jax.data.transforms import TransformConfig as TransformConfig
from dit_jax.data.transforms import centre as centre
from dit_jax.data.transforms import flip as flip
from dit_jax.data.transforms import resize as resize
from dit_jax.data.transforms import resized as resized
from dit_jax.data.writing import LatentsOf as LatentsOf
from dit_jax.data.writing import StatesOf as StatesOf
from dit_jax.data.writing import write_records as write_records
