"""Names of before: to be imported from where they are."""

from dit_jax.text.config import on_mesh as on_mesh
from dit_jax.training.frozen import Encoded as Encoded
from dit_jax.training.frozen import check_reads as check_reads
from dit_jax.training.frozen import cut_note as cut_note
from dit_jax.training.frozen import encoded as encoded
from dit_jax.training.frozen import open_for_data as open_for_data
from dit_jax.training.frozen import open_text_encoder as open_text_encoder
from dit_jax.training.frozen import prompt_length as prompt_length
from dit_jax.training.frozen import with_states as with_states
from dit_jax.training.frozen import with_text_hash as with_text_hash
