"""Preparation: captions of media and prompts, given, read and made."""

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
from dit_jax.preparation.prompts import read_prompts as read_prompts
from dit_jax.preparation.recaption import Clip as Clip
from dit_jax.preparation.recaption import RecaptionConfig as RecaptionConfig
from dit_jax.preparation.recaption import Recaptioned as Recaptioned
from dit_jax.preparation.recaption import evenly_spaced as evenly_spaced
from dit_jax.preparation.recaption import failures as failures
from dit_jax.preparation.recaption import recaption as recaption
from dit_jax.preparation.upsample import UpsampleConfig as UpsampleConfig
from dit_jax.preparation.upsample import Upsampled as Upsampled
from dit_jax.preparation.upsample import upsample as upsample
