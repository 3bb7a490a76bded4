"""Mixtures: proportions, epochs of each set, and that nothing but seed and place decides."""

import dataclasses
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from dit_jax.codec.crops import CropConfig, CropLoader
from dit_jax.config import (
    DataConfig,
    VideoRun,
    check_types,
    differences,
    from_dict,
    parse_config,
    to_dict,
)
from dit_jax.data import (
    Loader,
    MixedSetConfig,
    MixtureConfig,
    PackingConfig,
)
from dit_jax.data.mixing import MixedSource, sample_order
from dit_jax.model import ModelConfig, PatchConfig, TextStatesConfig
from dit_jax.prepare.writing import LatentsOf, StatesOf, write_records
from dit_jax.types import Sample

CONFIG = PackingConfig(rows=8, row_tokens=12, row_text=8, row_segments=6, bins=3)
SHAPES = [(1, 2, 2, 3), (2, 2, 2, 3), (3, 1, 2, 3)]


class Part:
    """Samples that say their set and number: images in the first, clips in the others."""

    def __init__(self, part: int, count: int) -> None:
        self.part, self.count = part, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Sample:
        video = np.full(SHAPES[self.part], 50 * self.part + index, np.uint8)
        return {"video": video, "caption": f"{self.part}", "fps": 8.0}


def mixed(weights=(2.0, 1.0, 1.0), counts=(7, 30, 11)):
    return MixedSource([Part(i, count) for i, count in enumerate(counts)], weights)


def tokens_of(sample):
    """One token a pixel, which says the sample."""
    count = int(np.prod(sample["video"].shape[:3]))
    return {
        "tokens": sample["video"].reshape(count, 3).astype(np.float32),
        "positions": np.zeros((count, 3), np.float32),
        "frame_ids": np.zeros(count, np.int32),
        "token_fields": {},
        "segment_fields": {},
        "text": np.full(1, 1 + sample["part"], np.int32),
    }


def batches(loader, count):
    found = [next(loader) for _ in range(count)]
    state = loader.get_state()
    loader.close()
    return found, state


def same(one, other):
    for field in dataclasses.fields(one):
        np.testing.assert_array_equal(getattr(one, field.name), getattr(other, field.name))


def test_sets_are_drawn_by_weight_in_every_row_and_each_in_whole_epochs():
    source = mixed()
    places = sample_order(source, 3)
    taken = [source[places[i]] for i in range(1024)]
    parts = np.array([sample["part"] for sample in taken])
    # A whole window, in which Grain's interleaving is exact to one sample.
    assert np.abs(np.bincount(parts) - [512, 256, 256]).max() <= 1
    for row in range(8):  # 128 places each: a deviation of 0.04 were they drawn freely.
        assert np.abs(np.bincount(parts[row::8]) / 128 - [0.5, 0.25, 0.25]).max() < 0.17
    # Weights need not sum to 1, and a set is not repeated before it was seen whole.
    for part, count in enumerate((7, 30, 11)):
        numbers = [int(s["video"].flat[0]) - 50 * part for s in taken if s["part"] == part]
        times = Counter(numbers)
        assert set(times) == set(range(count))
        window = 1024 // (4 if part else 2)  # Shuffling places may swap the ends of epochs.
        assert max(times.values()) - min(times.values()) <= 2 * window / count
        assert numbers[:count] != numbers[count : 2 * count]


def test_the_order_follows_from_the_seed_alone():
    def parts(seed, source=None):
        source = source or mixed()
        places = sample_order(source, seed)
        return [int(source[places[i]]["video"].flat[0]) for i in range(100)]

    assert parts(1) == parts(1) != parts(2)
    places = sample_order(mixed(), 1)
    assert [int(mixed()[places[i]]["video"].flat[0]) for i in reversed(range(100))] == parts(1)[
        ::-1
    ]
    alone = MixedSource([Part(0, 7)], [5.0])
    assert sorted(parts(1, alone)[:7]) != [0] * 7 and len(alone) == 7


def test_rows_are_the_same_in_any_number_of_processes_and_after_a_restart():
    whole, state = batches(Loader(mixed(), tokens_of, CONFIG, 5), 12)
    halves = [
        batches(Loader(mixed(), tokens_of, CONFIG, 5, rows), 12)[0]
        for rows in ((0, 2, 4, 6), (1, 3, 5, 7))
    ]
    for one, even, odd in zip(whole, *halves, strict=True):
        for field in dataclasses.fields(one):
            if field.name.endswith("_fields"):
                continue
            rows = np.asarray(getattr(one, field.name))
            np.testing.assert_array_equal(rows[0::2], getattr(even, field.name))
            np.testing.assert_array_equal(rows[1::2], getattr(odd, field.name))
    on, _ = batches(Loader(mixed(), tokens_of, CONFIG, 5), 16)
    again = Loader(mixed(), tokens_of, CONFIG, 5)
    again.set_state(json.loads(json.dumps(state)))
    for one, other in zip(on[12:], batches(again, 4)[0], strict=True):
        same(one, other)


def test_images_and_clips_share_rows():
    found, _ = batches(Loader(mixed(), tokens_of, CONFIG, 0), 8)
    rows = [set(np.unique(row)) - {0} for batch in found for row in np.asarray(batch.text)]
    assert any({1, 2} <= row for row in rows)  # Text tokens are 1 + the set's number.
    for batch in found:
        filled = np.asarray(batch.segment_ids) > 0
        assert filled.sum() == np.asarray(batch.num_tokens).sum()


def test_codecs_train_on_mixtures():
    crop = CropConfig(rows=4, frames=3, height=1, width=2, flip=False)
    found, _ = batches(CropLoader(mixed(), crop, 1, 0), 20)
    frames = Counter(int(n) for batch in found for n in batch.num_frames)
    assert set(frames) == {1, 2, 3} and abs(frames[1] / 80 - 0.5) < 0.2


def write(root, name, **given):
    """Two samples; ``given`` is what ``write_records`` takes, and ``channels`` of latents."""
    latents, states = given.get("latents"), given.get("text_states")
    video = np.zeros((1, 2, 2, 3), np.uint8)
    if latents:
        video = np.zeros((1, 2, 2, latents.channels), np.float32)
    sample = {"video": video, "caption": given.pop("caption", name), "fps": 8.0, "label": 1}
    if states:
        sample["text_states"] = np.ones((2, states.dim), np.float32)
    splits = {"train": [sample] * 2}
    path = write_records(root, name, splits, description="d", labels=("label",), **given)
    return str(path)


def test_what_cannot_be_mixed_is_refused(tmp_path):
    pixels = write(tmp_path, "pixels")
    of = {name: LatentsOf(channels, name) for name, channels in (("a", 4), ("b", 4), ("c", 16))}
    latents = {name: write(tmp_path, f"latents_{name}", latents=one) for name, one in of.items()}
    states = {
        name: write(tmp_path, f"states_{name}", text_states=StatesOf(3, name, "t5"))
        for name in ("x", "y")
    }

    def opened(*sets):
        return MixtureConfig(tuple(MixedSetConfig(**one) for one in sets)).open()

    def refused(said, *sets):
        with pytest.raises(ValueError, match=said):
            opened(*sets)

    refused("has pixels and .*latents_a.* has latents", {"path": pixels}, {"path": latents["a"]})
    refused("4 channels.* 16 channels", {"path": latents["a"]}, {"path": latents["c"]})
    x, y = ({"path": states[name], "text_states_key": "text_states"} for name in "xy")
    refused("no labels and .*has labels", {"path": pixels}, {"path": pixels, "label_key": "label"})
    assert len(opened(x, y | {"captioned": False})) == 4

    def of_run(*sets):
        source = MixtureConfig(tuple(MixedSetConfig(**one) for one in sets))
        text = TextStatesConfig("t5", dim=3, max_tokens=8)
        model = ModelConfig(patch=PatchConfig(channels=3), text=text)
        return VideoRun(data=DataConfig(source), model=model).with_hashes()

    with pytest.raises(ValueError, match="codecs a, b:"):
        of_run({"path": latents["a"]}, {"path": latents["b"]})
    with pytest.raises(ValueError, match=r"'t5' \(y\).* 't5' \(x\)"):
        of_run(x, y)
    assert of_run(x, y | {"captioned": False}).text_encoder.hash == "x"
    assert len(opened(x, {"path": pixels})) == 4  # Where an encoder is given, the rest is encoded.
    # Opening reads no record: a set whose first is damaged loses that one alone.
    next(Path(pixels).glob("*.array_record-*")).write_bytes(b"")
    assert len(opened({"path": pixels})) == 2
    for sets, said in [((), "0 sets"), ((MixedSetConfig("p"),), "shown=3 of 1")]:
        with pytest.raises(ValueError, match=said):
            MixtureConfig(sets, shown=3)
    with pytest.raises(ValueError, match="weight is 0"):
        check_types(MixedSetConfig("p", weight=0.0))


def test_text_of_sets_without_captions_is_not_read(tmp_path):
    states = {"text_states": StatesOf(3, "x", "t5")}
    path = write(tmp_path, "labelled", **states)
    given = {"text_states_key": "text_states", "label_key": "label"}
    source = MixtureConfig(
        (MixedSetConfig(path, **given), MixedSetConfig(path, captioned=False, **given))
    ).open()
    read, unread = source[0], source[3]
    assert (read["part"], read["caption"], read["segment_fields"]) == (0, "labelled", {"label": 1})
    assert read["text_states"].shape == (2, 3)
    assert unread["part"] == 1 and unread["caption"] == "" and "segment_fields" not in unread
    assert unread["text_states"].shape == (0, 1)
    # Nor has there to be any.
    MixtureConfig((MixedSetConfig(path, caption_key="none", captioned=False),))
    foreign = MixedSetConfig(path, caption_key="none", captioned=False)
    assert MixtureConfig((foreign,)).open()[0]["caption"] == ""
    with pytest.raises(IndexError):
        source[4]


def test_configs_of_mixtures_are_stored_and_overridden(tmp_path):
    sets = (MixedSetConfig("a"), MixedSetConfig("b", weight=3.0, captioned=False))
    config = VideoRun(data=DataConfig(source=MixtureConfig(sets)))
    assert from_dict(VideoRun, json.loads(json.dumps(to_dict(config)))) == config
    assert MixtureConfig(sets[::-1]).shown_set.path == "a"
    assert MixtureConfig(sets, shown=1).shown_set.path == "b"
    file = tmp_path / "mixed.py"
    file.write_text(
        "from dit_jax.config import VideoRun, DataConfig\n"
        "from dit_jax.data import MixedSetConfig, MixtureConfig\n"
        "def get_config():\n"
        "    sets = (MixedSetConfig('a'), MixedSetConfig('b', weight=3.0, captioned=False))\n"
        "    return VideoRun(data=DataConfig(source=MixtureConfig(sets)))\n"
    )
    line = ["--config", str(file), "--data.source.sets.1.path", "c"]
    line += ["--data.source.sets.0.weight", "2", "--data.source.shown", "0"]
    changed = parse_config(line, "p", "d")
    assert list(differences(changed, config)) == [
        ("data.source.sets.0.weight", 2.0, 1.0),
        ("data.source.sets.1.path", "c", "b"),
        ("data.source.shown", 0, None),
    ]
