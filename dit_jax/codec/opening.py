"""Names of before: to be imported from where they are."""

from dit_jax.codec.config import codec_copies as codec_copies
from dit_jax.training.frozen import check_codec as check_codec
from dit_jax.training.frozen import open_codec as open_codec
from dit_jax.training.frozen import with_codec_hash as with_codec_hash
