"""Mixtures: proportions, epochs of each set, and that nothing but seed and place decides."""

import dataclasses
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from dit_jax.codec.crops import CropConfig, CropLoader
from dit_jax.config import DataConfig, VideoRun, differences, from_dict, parse_config, to_dict
from dit_jax.data import Loader, MixedSetConfig, MixtureConfig, PackingConfig
from dit_jax.data.mixing import MixedSource, sample_order
from dit_jax.model import ModelConfig, PatchConfig, TextStatesConfig
from dit_jax.prepare.writing import LatentsOf, StatesOf, write_records
from dit_jax.types import Sample

CONFIG = PackingConfig(rows=4, row_tokens=12, row_text=8, row_segments=6, bins=3)
SHAPES = [(1, 2, 2, 3), (2, 2, 2, 3), (3, 1, 2, 3)]
COUNTS = (7, 30, 11)


class Part:
    """Samples that say their set and number: images in the first, clips in the others."""

    def __init__(self, part: int, count: int) -> None:
        self.part, self.count = part, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Sample:
        video = np.full(SHAPES[self.part], 50 * self.part + index, np.uint8)
        return {"video": video, "caption": f"{self.part}", "fps": 8.0}


def mixed():
    return MixedSource([Part(i, count) for i, count in enumerate(COUNTS)], (2.0, 1.0, 1.0))


def tokens_of(sample):
    """One token a pixel, which says the sample."""
    tokens = sample["video"].reshape(-1, 3).astype(np.float32)
    return {
        "tokens": tokens,
        "positions": np.zeros(tokens.shape, np.float32),
        "frame_ids": np.zeros(len(tokens), np.int32),
        "token_fields": {},
        "segment_fields": {},
        "text": np.full(1, 1 + sample["part"], np.int32),
    }


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
    for part, count in enumerate(COUNTS):
        numbers = [int(s["video"].flat[0]) - 50 * part for s in taken if s["part"] == part]
        times = Counter(numbers)
        assert set(times) == set(range(count))
        window = 1024 // (4 if part else 2)  # Shuffling places may swap the ends of epochs.
        assert max(times.values()) - min(times.values()) <= 2 * window / count
        assert numbers[:count] != numbers[count : 2 * count]


def test_the_order_follows_from_the_seed_alone():
    def order(seed, places=range(30)):
        indices = sample_order(mixed(), seed)
        return [int(indices[place]) for place in places]

    first = order(1)
    assert order(1, reversed(range(30))) == first[::-1] and order(2) != first


def test_rows_are_the_same_in_any_number_of_processes_and_after_a_restart():
    loaders = [Loader(mixed(), tokens_of, CONFIG, 5, rows) for rows in (None, (0, 2), (1, 3), None)]
    whole, even, odd, again = loaders
    first = [next(whole) for _ in range(4)]
    again.set_state(json.loads(json.dumps(whole.get_state())))
    batches = first + [next(whole) for _ in range(4)]
    expected = [(batch, slice(0, None, 2), next(even)) for batch in batches]
    expected += [(batch, slice(1, None, 2), next(odd)) for batch in batches]
    expected += [(batch, slice(None), next(again)) for batch in batches[4:]]
    for batch, rows, found in expected:
        for field in dataclasses.fields(batch):
            if not field.name.endswith("_fields"):
                theirs = np.asarray(getattr(batch, field.name))[rows]
                np.testing.assert_array_equal(getattr(found, field.name), theirs)
    for loader in loaders:
        loader.close()
    # Images and clips share rows: text tokens are 1 + the set's number.
    rows = [set(row.tolist()) for batch in batches for row in np.asarray(batch.text)]
    assert any({1, 2} <= row for row in rows)


def test_codecs_train_on_mixtures():
    crop = CropConfig(rows=4, frames=3, height=1, width=2, flip=False)
    loader = CropLoader(mixed(), crop, 1, 0)
    frames = Counter(int(n) for _ in range(20) for n in next(loader).num_frames)
    loader.close()
    assert set(frames) == {1, 2, 3} and abs(frames[1] / 80 - 0.5) < 0.2


def write(root, name, **given):
    """Two samples; ``given`` is what ``write_records`` takes."""
    latents, states = given.get("latents"), given.get("text_states")
    video = np.zeros((1, 2, 2, latents.channels if latents else 3), np.float32)
    video = video if latents else video.astype(np.uint8)
    sample = {"video": video, "caption": name, "fps": 8.0, "label": 1}
    if states:
        sample["text_states"] = np.ones((2, states.dim), np.float32)
    splits = {"train": [sample] * 2}
    return str(write_records(root, name, splits, description="d", labels=("label",), **given))


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

    x, y = ({"path": states[name], "text_states_key": "text_states"} for name in "xy")
    of_pixels, of_latents = {"path": pixels}, {"path": latents["a"]}
    for message, *sets in (
        ("has pixels and .*latents_a.* has latents", of_pixels, of_latents),
        ("4 channels.* 16 channels", of_latents, {"path": latents["c"]}),
        ("no labels and .*has labels", of_pixels, of_pixels | {"label_key": "label"}),
    ):
        with pytest.raises(ValueError, match=message):
            opened(*sets)
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
    assert len(opened(x, {"path": pixels})) == 4  # If an encoder is given, the rest is encoded.
    # Opening reads no record: a set whose first is damaged loses that one alone.
    next(Path(pixels).glob("*.array_record-*")).write_bytes(b"")
    assert len(opened({"path": pixels})) == 2
    for sets, message in [((), "0 sets"), ((MixedSetConfig("p"),), "shown=3 of 1")]:
        with pytest.raises(ValueError, match=message):
            MixtureConfig(sets, shown=3)


def test_text_of_sets_without_captions_is_not_read(tmp_path):
    path = write(tmp_path, "labelled", text_states=StatesOf(3, "x", "t5"))
    given = {"text_states_key": "text_states", "label_key": "label"}
    # Nor does there have to be any.
    unread = {"captioned": False, "caption_key": "none"}
    sets = MixedSetConfig(path, **given), MixedSetConfig(path, **given, **unread)
    source = MixtureConfig(sets).open()
    read, other = source[0], source[3]
    assert (read["part"], read["caption"], read["segment_fields"]) == (0, "labelled", {"label": 1})
    assert read["text_states"].shape == (2, 3)
    assert (other["part"], other["caption"]) == (1, "") and "segment_fields" not in other
    assert other["text_states"].shape == (0, 1)
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
    changed = parse_config([*line, "--data.source.shown", "0"], "p", "d")
    assert list(differences(changed, config)) == [
        ("data.source.sets.1.path", "c", "b"),
        ("data.source.shown", 0, None),
    ]
