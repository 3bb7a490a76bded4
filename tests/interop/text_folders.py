"""Folders of tiny text encoders as ``transformers`` writes them, and tokenizers trained for them."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest

from tests.interop.published import optional, torch

transformers: Any = optional("transformers")
sentencepiece: Any = optional("sentencepiece")
tokenizers: Any = optional("tokenizers")
needs_transformers = pytest.mark.skipif(
    torch is None or transformers is None, reason="PyTorch or transformers is not installed"
)
needs_tokenizers = pytest.mark.skipif(
    sentencepiece is None or tokenizers is None,
    reason="sentencepiece or tokenizers is not installed: pip install -e '.[text]'",
)

CAPTIONS = [
    "",
    "a big red circle moves left",
    "A small GREEN cross   moves up, slowly; it's 42 frames\nlong!",
    "ein kleines blaues Quadrat - über straße",
    "「赤い丸」 moves ✨ " + "and a red circle moves right " * 4,
    " two  blanks around  ",
]
CORPUS = [
    f"{article} {size} {colour} {shape} moves {way}"
    for article in ("a", "the", "one")
    for size in ("big", "small")
    for colour in ("red", "green", "blue", "yellow")
    for shape in ("circle", "square", "cross", "triangle")
    for way in ("left", "right", "up", "down", "slowly and then stops")
]
T5_SIZES = {
    "vocab_size": 160,
    "d_model": 24,
    "d_kv": 8,
    "d_ff": 40,
    "num_layers": 3,
    "num_heads": 2,
}
CLIP_SIZES = {
    "vocab_size": 700,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "projection_dim": 16,
}


def write_sentencepiece(folder: Path, **given: Any) -> Path:
    """A small ``spiece.model`` with T5's special pieces."""
    folder.mkdir(parents=True, exist_ok=True)
    options = {
        "vocab_size": 100,
        "pad_id": 0,
        "eos_id": 1,
        "unk_id": 2,
        "bos_id": -1,
        "character_coverage": 1.0,
        "hard_vocab_limit": False,
        "minloglevel": 2,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_prefix=str(folder / "spiece"), **(options | given)
    )
    (folder / "spiece.vocab").unlink()
    return folder / "spiece.model"


def write_pairs(folder: Path) -> dict[str, int]:
    """A small ``vocab.json`` and ``merges.txt`` as CLIP's; returns the vocabulary."""
    folder.mkdir(parents=True, exist_ok=True)
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    trained = tokenizers.Tokenizer(tokenizers.models.BPE(end_of_word_suffix="</w>"))
    trained.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=90, end_of_word_suffix="</w>", show_progress=False
    )
    trained.train_from_iterator(CORPUS, trainer)
    merges = [" ".join(pair) for pair in json.loads(trained.to_str())["model"]["merges"]]
    joined = [merge.replace(" ", "") for merge in merges]
    words = [*letters, *(f"{letter}</w>" for letter in letters), *joined]
    words = list(dict.fromkeys(words)) + ["<|startoftext|>", "<|endoftext|>"]
    numbers = {word: i for i, word in enumerate(words)}
    (folder / "vocab.json").write_text(json.dumps(numbers, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    return numbers


def random_model(name: str, config: Any) -> Any:
    """A model of ``transformers``' class with random weights."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = getattr(transformers, name)(config).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            # Larger than at initialisation, so that every branch is seen in the output.
            norm = "norm" in key and key.endswith("weight")
            parameter.copy_(0.3 * torch.randn_like(parameter) + (1.0 if norm else 0.0))
    return model


def save(model: Any, folder: Path) -> None:
    """As ``save_pretrained`` does, whose progress bars and warnings are not ours."""
    transformers.utils.logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder)
