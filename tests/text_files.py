"""Tokenizers trained on a few sentences, and a tiny T5 in a folder, without PyTorch."""

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from dit_jax import interop
from dit_jax.text import folders
from dit_jax.text.t5 import T5Encoder, T5EncoderConfig
from tests.codecs import normal_params
from tests.interop.published import Lazy, needs

sentencepiece: Any = Lazy("sentencepiece")
needs_tokenizers = needs("sentencepiece", "tokenizers")

CORPUS = [
    f"{article} {size} {colour} {shape} moves {way}"
    for article in ("a", "the", "one")
    for size in ("big", "small")
    for colour in ("red", "green", "blue", "yellow")
    for shape in ("circle", "square", "cross", "triangle")
    for way in ("left", "right", "up", "down", "slowly and then stops")
]
TINY = T5EncoderConfig(
    vocabulary=64, width=8, depth=2, heads=2, head_dim=4, hidden=16, bias="layers"
)


def write_sentencepiece(folder: Path) -> Path:
    """A small ``spiece.model`` with T5's special pieces."""
    folder.mkdir(parents=True, exist_ok=True)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_prefix=str(folder / "spiece"),
        vocab_size=100,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        character_coverage=1.0,
        minloglevel=2,
    )
    (folder / "spiece.vocab").unlink()
    return folder / "spiece.model"


def write_t5(folder: Path, config: T5EncoderConfig = TINY, seed: int = 0) -> Path:
    """A folder of a T5 or UMT5 with random weights and a tokenizer."""
    write_sentencepiece(folder)
    given = jnp.zeros((1, 2), jnp.int32), jnp.ones((1, 2), bool)
    params = normal_params(T5Encoder(config), *given, seed=seed)
    arrays = folders.t5_map(config).export(params)
    interop.write_safetensors(folder / "model.safetensors", arrays)
    values = {
        "model_type": "umt5" if config.bias == "layers" else "t5",
        "feed_forward_proj": "gated-gelu",
        "vocab_size": config.vocabulary,
        "d_model": config.width,
        "d_kv": config.head_dim,
        "d_ff": config.hidden,
        "num_layers": config.depth,
        "num_heads": config.heads,
    }
    (folder / "config.json").write_text(json.dumps(values))
    return folder
