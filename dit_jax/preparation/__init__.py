"""Raw media to clips: probed, decoded as a player shows them, cut, measured, filtered.

Nothing here imports JAX: it runs in many light processes (`workers.py`).
"""

from dit_jax.preparation.clips import ClipConfig as ClipConfig
from dit_jax.preparation.clips import Geometry as Geometry
from dit_jax.preparation.clips import Rect as Rect
from dit_jax.preparation.decoding import DecodingConfig as DecodingConfig
from dit_jax.preparation.decoding import frames as frames
from dit_jax.preparation.decoding import probe as probe
from dit_jax.preparation.duplicates import NearDuplicates as NearDuplicates
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
from dit_jax.preparation.refusals import REASONS as REASONS
from dit_jax.preparation.refusals import Refused as Refused
from dit_jax.preparation.refusals import check_installed as check_installed
from dit_jax.preparation.shots import ShotConfig as ShotConfig
from dit_jax.preparation.shots import shot_cuts as shot_cuts
from dit_jax.preparation.workers import Outcome as Outcome
from dit_jax.preparation.workers import WorkersConfig as WorkersConfig
from dit_jax.preparation.workers import run as run
