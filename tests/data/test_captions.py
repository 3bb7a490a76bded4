"""The mix of captions: drawn by its weights from nothing but the sample's own randomness."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds

from dit_jax.config import DataConfig, VideoRun, check_types, from_dict, to_dict
from dit_jax.data import Loader, PackingConfig, RecordsConfig, RecordsSource, TransformConfig
from dit_jax.data.records import choose_caption
from dit_jax.model import ByteEncoderConfig, ModelConfig, PatchConfig
from dit_jax.prepare.writing import write_records
from dit_jax.training.video_task import make_augment, tokenize
from dit_jax.types import Sample

MIX = (("descriptive", 0.6), ("short", 0.3), ("caption", 0.1))
TEXTS = ("descriptive", "short", "origin")


def sample_of(**captions: str) -> Sample:
    video = np.zeros((1, 8, 8, 3), np.uint8)
    return {"video": video, "caption": "fixed", "fps": 8.0, "captions": captions}


def drawn(sample: Sample, count: int = 4000, mix=MIX) -> Counter[str]:
    rngs = (np.random.default_rng((3, i)) for i in range(count))
    return Counter(choose_caption(sample, rng, mix)["caption"] for rng in rngs)


def test_weights_are_those_of_the_mix_without_what_is_empty():
    counts = drawn(sample_of(descriptive="d", short="s", caption="c"))
    # Four standard deviations of a proportion of 4000.
    for text, weight in (("d", 0.6), ("s", 0.3), ("c", 0.1)):
        assert abs(counts[text] / 4000 - weight) < 4 * (weight * (1 - weight) / 4000) ** 0.5
    counts = drawn(sample_of(descriptive="", short="s", caption="c"))
    assert set(counts) == {"s", "c"} and abs(counts["s"] / 4000 - 0.75) < 0.03
    assert drawn(sample_of(descriptive="", short="", caption="c")) == {"c": 4000}
    assert drawn(sample_of(descriptive="", short="", caption="")) == {"fixed": 4000}
    heavy = drawn(sample_of(descriptive="d", short="s"), mix=(("descriptive", 57), ("short", 3)))
    assert abs(heavy["d"] / 4000 - 0.95) < 0.02


def test_one_number_is_drawn_and_the_sample_is_left_alone():
    for captions in ({}, {"short": "s"}, {"short": "s", "descriptive": "d"}):
        rng, other = np.random.default_rng(5), np.random.default_rng(5)
        sample = sample_of(**captions)
        choose_caption(sample, rng, MIX)
        assert sample["caption"] == "fixed"
        assert other.random() is not None and rng.random() == other.random()


@pytest.fixture(scope="module")
def builder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    samples = [
        {
            "video": np.full((1, 8, 8, 3), i, np.uint8),
            "caption": "" if i == 2 else f"given {i}",
            "descriptive": "" if i in (1, 2) else f"long {i}",
            "short": f"short {i}",
            "origin": "model:seer",
            "fps": 8.0,
        }
        for i in range(6)
    ]
    root = tmp_path_factory.mktemp("records")
    return write_records(root, "clips", {"train": samples}, description="d", texts=TEXTS)


def test_records_hold_further_texts(builder: Path):
    records = tfds.builder_from_directory(builder).as_data_source(split="train")
    assert [record["origin"] for record in records] == [b"model:seer"] * 6
    plain = RecordsSource(RecordsConfig(str(builder)))
    assert "captions" not in plain[0] and plain[0]["caption"] == "given 0"
    source = RecordsSource(RecordsConfig(str(builder), caption_mix=MIX))
    assert source[0]["caption"] == "given 0"
    assert source[1].get("captions") == {
        "descriptive": "",
        "short": "short 1",
        "caption": "given 1",
    }
    # What evaluation uses is fixed, and not empty where there is another.
    assert source[2]["caption"] == "short 2"


def config_of(builder: Path) -> DataConfig:
    source = RecordsConfig(str(builder), caption_mix=MIX)
    packing = PackingConfig(rows=2, row_tokens=4, row_text=40, row_segments=3, bins=2)
    return DataConfig(source, packing, TransformConfig(flip=True))


MODEL = ModelConfig(
    patch=PatchConfig(t=1, h=8, w=8, channels=3), text=ByteEncoderConfig(max_bytes=12)
)


def captions(batch) -> list[str]:
    found = []
    for row, ids in zip(batch.text, batch.text_segment_ids, strict=True):
        for j in range(1, ids.max() + 1):
            found.append(bytes((row[ids == j][1:] - 2).astype(np.uint8)).decode())
    return found


def test_training_draws_anew_in_every_epoch_and_resumes_with_the_same(builder: Path):
    config = config_of(builder)

    def loader() -> Loader:
        assert isinstance(config.source, RecordsConfig)
        source = RecordsSource(config.source)
        to_tokens = lambda sample: tokenize(MODEL, sample)  # noqa: E731
        return Loader(source, to_tokens, config.packing, 0, augment=make_augment(config))

    whole, first = loader(), loader()
    seen = [captions(next(whole)) for _ in range(12)]
    for i in range(5):
        assert captions(next(first)) == seen[i]
    state = first.get_state()
    first.close()
    second = loader()
    second.set_state(state)
    for i in range(5, 12):
        assert captions(next(second)) == seen[i]
    for one in (whole, second):
        one.close()
    counts = Counter(text for batch in seen for text in batch)
    assert {"long 0", "short 0", "short 1", "short 2"} <= set(counts)
    assert not {"", "long 1", "long 2", "given 2"} & set(counts)


def test_without_a_mix_nothing_is_drawn(builder: Path):
    config = DataConfig(RecordsConfig(str(builder)))
    assert make_augment(config) is None and make_augment(DataConfig()) is None


def test_states_go_with_their_caption(tmp_path: Path):
    from tests.data.test_records import foreign_builder

    rng = np.random.default_rng(0)
    states = {name: rng.normal(size=(i + 1, 4)).astype(np.float32) for i, name in enumerate("gs")}
    features = {
        "video": tfds.features.Tensor(shape=(1, 8, 8, 3), dtype=np.uint8),
        "caption": tfds.features.Text(),
        "short": tfds.features.Text(),
        "g": tfds.features.Tensor(shape=(None, 4), dtype=np.float32),
        "s": tfds.features.Tensor(shape=(None, 4), dtype=np.float32),
    }
    video = np.zeros((1, 8, 8, 3), np.uint8)
    example = {"video": video, "caption": "given", "short": "short", **states}
    mix = (("caption", 0.5), ("short", 0.5))
    path = foreign_builder(tmp_path, features, [example])
    config = RecordsConfig(
        path, text_states_key="g", caption_mix=mix, caption_mix_states=("g", "s")
    )
    sample = RecordsSource(config)[0]
    np.testing.assert_array_equal(sample.get("text_states"), states["g"])
    seen = set()
    for i in range(20):
        one = choose_caption(sample, np.random.default_rng(i), mix)
        seen.add(one["caption"])
        np.testing.assert_array_equal(one.get("text_states"), states[one["caption"][0]])
    assert seen == {"given", "short"}


def test_bad_mixes_are_refused():
    for changes, said in (
        ({"caption_mix": (("a", float("nan")),)}, "is nan"),
        ({"caption_mix": (("a", 1.0), ("a", 2.0))}, "once"),
        ({"caption_mix": MIX, "text_states_key": "t5"}, "give 3"),
        ({"caption_mix_states": ("t5",)}, "give 0"),
    ):
        with pytest.raises(ValueError, match=said):
            check_types(RecordsConfig("x", **changes))


def test_mixes_of_what_is_not_there_are_refused(builder: Path, tmp_path: Path):
    with pytest.raises(ValueError, match="no features .*'long'.*caption, desc"):
        RecordsSource(RecordsConfig(str(builder), caption_mix=(("long", 1.0),)))
    good = {"video": np.zeros((1, 4, 4, 3), np.uint8), "caption": "x", "fps": 8.0}
    for sample, texts, said in (
        ({**good, "short": 3}, ("short",), "sample 0 of split 'train' has short 3"),
        (good, ("short",), r"lacks \['short'\]"),
        (good, ("caption",), r"\['caption'\] twice"),
        (good, ("a", "a"), r"\['a'\] twice"),
    ):
        with pytest.raises(ValueError, match=said):
            write_records(tmp_path, "clips", {"train": [sample]}, description="d", texts=texts)


def test_mixes_are_stored_with_the_run():
    config = VideoRun(data=DataConfig(RecordsConfig("x", caption_mix=MIX)))
    assert from_dict(VideoRun, to_dict(config)) == config
