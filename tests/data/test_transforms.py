"""Resizing against averages by hand; cropping and mirroring exactly."""

import numpy as np
import pytest

from dit_jax.data import Loader, PackingConfig, RecordsConfig, RecordsSource, TransformConfig, crop
from dit_jax.data.records import centre, flip, resized
from dit_jax.prepare.writing import write_records

RNG = np.random.default_rng(0)


def clip(t, h, w):
    return RNG.integers(0, 256, (t, h, w, 3), np.uint8)


def test_what_is_left_as_it_is():
    video, latents = clip(2, 5, 7), np.ones((1, 5, 5, 4), np.float32)
    assert crop(TransformConfig(), video) is video
    assert crop(TransformConfig(crop=2), latents) is latents
    # What is left over falls on both sides.
    assert np.array_equal(centre(video, 4, 4), video[:, 0:4, 1:5])


def test_halving_averages():
    video = clip(2, 16, 24)
    means = video.reshape(2, 8, 2, 12, 2, 3).astype(float).mean((2, 4))
    # The scaler works in fixed point, and through another layout of the colours.
    assert np.abs(resized(video, 8, 12) - means).max() <= 2


@pytest.mark.parametrize(("h", "w"), [(50, 70), (70, 50), (20, 64), (32, 32)])
def test_a_crop_is_the_square_in_the_middle(h, w):
    out = crop(TransformConfig(crop=32), clip(2, h, w))
    assert out.shape == (2, 32, 32, 3) and out.dtype == np.uint8
    # A ramp from left to right stays one, and its middle in the middle.
    ramp = np.broadcast_to((np.arange(w) * (255 / (w - 1))).astype(np.uint8)[:, None], (1, h, w, 3))
    made = crop(TransformConfig(crop=32), ramp)[0, 16, :, 0].astype(int)
    assert (np.diff(made) >= -1).all() and made[31] > made[0]
    assert abs(made[15] + made[16] - 255) <= 8


def test_half_of_the_clips_are_mirrored():
    video = clip(1, 2, 3)
    made = [
        flip({"video": video, "caption": "a", "fps": 1.0}, np.random.default_rng(i))["video"]
        for i in range(400)
    ]
    mirrored = sum(np.array_equal(x, video[:, :, ::-1]) for x in made)
    assert sum(np.array_equal(x, video) for x in made) == 400 - mirrored
    assert 150 < mirrored < 250  # five standard deviations of a fair coin


def test_what_a_loader_augments_depends_on_the_order_alone():
    class Source:
        def __len__(self):
            return 6

        def __getitem__(self, i):
            return {"video": np.full((1, 1, 1, 3), i, np.uint8), "caption": "", "fps": 1.0}

    def tokenize(sample):
        value = np.asarray(sample["video"], np.float32).reshape(1, 3)
        where = np.zeros((1, 3), np.float32)
        none = np.zeros(1, np.int32)
        fields = {"token_fields": {}, "segment_fields": {}}
        return {"tokens": value, "positions": where, "frame_ids": none, "text": none, **fields}

    def augment(sample, rng):
        return {**sample, "video": sample["video"] + rng.random()}

    packing = PackingConfig(rows=2, row_tokens=2, row_text=2, row_segments=2, bins=1)
    both, second = Loader(Source(), tokenize, packing, 3, None, augment), None
    try:
        batches = [next(both) for _ in range(6)]
        second = Loader(Source(), tokenize, packing, 3, (1,), augment)
        for batch in batches:
            assert np.array_equal(next(second).tokens, batch.tokens[1:])
    finally:
        both.close()
        if second is not None:
            second.close()
    drawn = np.concatenate([batch.tokens[..., 0].ravel() for batch in batches])
    # The same clip, seen again in a later epoch, is augmented anew.
    assert len(np.unique(drawn % 1)) == len(drawn)


def test_labels_and_latents_are_read_back(tmp_path):
    latents = [np.linspace(-2, 2, 2 * 4).reshape(1, 1, 2, 4).astype(np.float16) + i for i in (0, 1)]
    samples = [
        {"video": x, "caption": "", "fps": 1.0, "label": 3 + i} for i, x in enumerate(latents)
    ]
    path = write_records(
        tmp_path,
        "latents",
        {"train": samples},
        description="d",
        labels=("label",),
        latents=(4, "made"),
    )
    source = RecordsSource(RecordsConfig(str(path), label_key="label"))
    assert source.codec == "made"
    for i, x in enumerate(latents):
        assert source[i]["segment_fields"] == {"label": 3 + i}
        assert source[i]["video"].dtype == np.float32 and np.array_equal(source[i]["video"], x)
    sample = {"video": np.ones((1, 1, 2, 4), np.float32), "caption": "", "fps": 1.0}
    with pytest.raises(ValueError, match="float with 8"):
        write_records(tmp_path, "x", {"train": [sample]}, description="d", latents=(8, "made"))
