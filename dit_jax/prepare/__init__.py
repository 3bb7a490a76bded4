"""Preparation: raw media to captioned clips, and prompts.

Nothing here imports JAX: it runs in many light processes (`workers.py`)."""

from dit_jax.prepare.captions import Caption as Caption
from dit_jax.prepare.captions import match_table as match_table
from dit_jax.prepare.captions import read_sidecars as read_sidecars
from dit_jax.prepare.captions import read_table as read_table
from dit_jax.prepare.captions import record_texts as record_texts
from dit_jax.prepare.captions import text_features as text_features
from dit_jax.prepare.chat import AnswerCache as AnswerCache
from dit_jax.prepare.chat import ChatClient as ChatClient
from dit_jax.prepare.chat import ChatConfig as ChatConfig
from dit_jax.prepare.chat import ChatOptions as ChatOptions
from dit_jax.prepare.clips import ClipConfig as ClipConfig
from dit_jax.prepare.decoding import DecodingConfig as DecodingConfig
from dit_jax.prepare.decoding import probe as probe
from dit_jax.prepare.duplicates import near_duplicates as near_duplicates
from dit_jax.prepare.examining import ExamineConfig as ExamineConfig
from dit_jax.prepare.examining import FileReport as FileReport
from dit_jax.prepare.examining import examine as examine
from dit_jax.prepare.examining import read_clip as read_clip
from dit_jax.prepare.filters import FilterConfig as FilterConfig
from dit_jax.prepare.filters import Rejection as Rejection
from dit_jax.prepare.recaption import ClipFrames as ClipFrames
from dit_jax.prepare.recaption import RecaptionConfig as RecaptionConfig
from dit_jax.prepare.recaption import evenly_spaced as evenly_spaced
from dit_jax.prepare.recaption import recaption as recaption
from dit_jax.prepare.refusals import MACHINE_REASONS as MACHINE_REASONS
from dit_jax.prepare.refusals import REASONS as REASONS
from dit_jax.prepare.refusals import Refused as Refused
from dit_jax.prepare.shots import ShotConfig as ShotConfig
from dit_jax.prepare.shots import shot_cuts as shot_cuts
from dit_jax.prepare.workers import Outcome as Outcome
from dit_jax.prepare.workers import WorkersConfig as WorkersConfig
from dit_jax.prepare.workers import run as run
