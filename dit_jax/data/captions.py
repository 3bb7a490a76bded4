"""Which of a clip's captions it is trained on: drawn anew in every epoch.

Betker et al. 2023, "Improving Image Generation with Better Captions" (DALL-E 3), section 3: synthetic
captions are mixed with those that were given, which keeps a model from overfitting to the habits of a
captioner; DALL-E 3 was trained on 95 % synthetic ones.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dit_jax.types import Sample


def draw_caption(
    sample: Sample, rng: np.random.Generator, mix: Sequence[tuple[str, float]]
) -> Sample:
    """The sample with one of its ``captions``, of those that are not empty, by the weights of ``mix``.

    One number is drawn, whatever the captions are. A sample without any keeps its caption.
    """
    point = rng.random()
    captions = sample.get("captions", {})
    there = [(name, weight) for name, weight in mix if captions.get(name)]
    if not there:
        return sample
    edges = np.cumsum([weight for _, weight in there])
    chosen = int(np.searchsorted(edges, point * edges[-1], side="right"))
    drawn = sample.copy()
    take_caption(drawn, there[min(chosen, len(there) - 1)][0])
    return drawn


def take_caption(sample: Sample, name: str) -> None:
    """Makes one of the sample's captions, and its states, the one that is used; in place.

    Raises ``ValueError`` where the sample has states, and none of this caption.
    """
    caption, states = sample.get("captions", {})[name], sample.get("captions_states", {})
    if name in states:
        sample["text_states"] = states[name]
    elif "text_states" in sample and caption != sample["caption"]:
        raise ValueError(
            f"the caption {name!r} ({caption[:60]!r}) was drawn and has no text states, and those of "
            f"{sample['caption'][:60]!r} are not its own: give states for each caption of the mix "
            "(captions_states), or draw none (data.source.caption_mix)."
        )
    sample["caption"] = caption
