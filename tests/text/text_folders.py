"""Folders of tiny text encoders as ``transformers`` writes them."""

import warnings
from pathlib import Path
from typing import Any

from tests.interop.published import Lazy, needs, torch

transformers: Any = Lazy("transformers")
needs_transformers = needs("torch", "transformers")

CAPTIONS = [
    "",
    "a big red circle moves left",
    "A small GREEN cross   moves up, slowly; it's 42 frames\nlong!",
    "ein kleines blaues Quadrat - über straße",
    "「赤い丸」 moves ✨ " + "and a red circle moves right " * 4,
    " two  blanks around  ",
]
T5_SIZES = dict(vocab_size=160, d_model=24, d_kv=8, d_ff=40, num_layers=3, num_heads=2)


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
