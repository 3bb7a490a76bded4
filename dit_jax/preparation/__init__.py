"""Preparation: raw media to captioned clips, and prompts.

Nothing here imports JAX: it runs in many light processes (`workers.py`).
"""

from dit_jax.preparation.answer_cache import AnswerCache as AnswerCache
from dit_jax.preparation.answer_cache import default_cache as default_cache
from dit_jax.preparation.captions import Caption as Caption
from dit_jax.preparation.captions import TableConfig as TableConfig
from dit_jax.preparation.captions import match_table as match_table
from dit_jax.preparation.captions import read_sidecars as read_sidecars
from dit_jax.preparation.captions import read_table as read_table
from dit_jax.preparation.captions import record_texts as record_texts
from dit_jax.preparation.captions import text_features as text_features
from dit_jax.preparation.chat import ChatClient as ChatClient
from dit_jax.preparation.chat import ChatConfig as ChatConfig
from dit_jax.preparation.chat import ChatError as ChatError
from dit_jax.preparation.chat import ChatOptions as ChatOptions
from dit_jax.preparation.chat import Unreachable as Unreachable
from dit_jax.preparation.clips import ClipConfig as ClipConfig
from dit_jax.preparation.clips import Geometry as Geometry
from dit_jax.preparation.clips import Rect as Rect
from dit_jax.preparation.decoding import DecodingConfig as DecodingConfig
from dit_jax.preparation.decoding import frames as frames
from dit_jax.preparation.decoding import probe as probe
from dit_jax.preparation.duplicates import near_duplicates as near_duplicates
from dit_jax.preparation.examining import Clip as Clip
from dit_jax.preparation.examining import ExamineConfig as ExamineConfig
from dit_jax.preparation.examining import FileReport as FileReport
from dit_jax.preparation.examining import examine as examine
from dit_jax.preparation.examining import examine_all as examine_all
from dit_jax.preparation.examining import read_clip as read_clip
from dit_jax.preparation.filters import FilterConfig as FilterConfig
from dit_jax.preparation.filters import Rejection as Rejection
from dit_jax.preparation.media import Probe as Probe
from dit_jax.preparation.prompts import read_prompts as read_prompts
from dit_jax.preparation.recaption import ClipFrames as ClipFrames
from dit_jax.preparation.recaption import RecaptionConfig as RecaptionConfig
from dit_jax.preparation.recaption import Recaptioned as Recaptioned
from dit_jax.preparation.recaption import evenly_spaced as evenly_spaced
from dit_jax.preparation.recaption import failures as failures
from dit_jax.preparation.recaption import recaption as recaption
from dit_jax.preparation.refusals import MACHINE_REASONS as MACHINE_REASONS
from dit_jax.preparation.refusals import REASONS as REASONS
from dit_jax.preparation.refusals import Refused as Refused
from dit_jax.preparation.refusals import check_installed as check_installed
from dit_jax.preparation.shots import ShotConfig as ShotConfig
from dit_jax.preparation.shots import shot_cuts as shot_cuts
from dit_jax.preparation.upsample import UpsampleConfig as UpsampleConfig
from dit_jax.preparation.upsample import Upsampled as Upsampled
from dit_jax.preparation.upsample import upsample as upsample
from dit_jax.preparation.workers import Outcome as Outcome
from dit_jax.preparation.workers import WorkersConfig as WorkersConfig
from dit_jax.preparation.workers import run as run
