"""The mix of captions: drawn by its weights from nothing but the sample's own randomness."""

import functools
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
from tests.data.test_records import foreign_builder

MIX = (("descriptive", 0.6), ("short", 0.3), ("caption", 0.1))
COUNT = 4000
TEXTS = ("descriptive", "short", "origin")


def sample_of(**captions: str) -> Sample:
    video = np.zeros((1, 8, 8, 3), np.uint8)
    return {"video": video, "caption": "fixed", "fps": 8.0, "captions": captions}


def drawn(sample: Sample, mix=MIX) -> Counter[str]:
    rng = np.random.default_rng(3)
    return Counter(choose_caption(sample, rng, mix)["caption"] for _ in range(COUNT))


def test_weights_are_those_of_the_mix_without_what_is_empty():
    counts = drawn(sample_of(descriptive="d", short="s", caption="c"))
    # Four standard deviations of a proportion of 4000.
    for text, weight in (("d", 0.6), ("s", 0.3), ("c", 0.1)):
        assert abs(counts[text] / COUNT - weight) < 4 * (weight * (1 - weight) / COUNT) ** 0.5
    counts = drawn(sample_of(descriptive="", short="s", caption="c"))
    assert set(counts) == {"s", "c"} and abs(counts["s"] / COUNT - 0.75) < 0.03
    assert drawn(sample_of(descriptive="", short="", caption="c")) == {"c": COUNT}
    assert drawn(sample_of(descriptive="", short="", caption="")) == {"fixed": COUNT}
    heavy = drawn(sample_of(descriptive="d", short="s"), mix=(("descriptive", 57), ("short", 3)))
    assert abs(heavy["d"] / COUNT - 0.95) < 0.02


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
    expected = {"descriptive": "", "short": "short 1", "caption": "given 1"}
    assert source[0]["caption"] == "given 0" and source[1].get("captions") == expected
    # What evaluation uses is fixed, and not empty where there is another.
    assert source[2]["caption"] == "short 2"


MODEL = ModelConfig(
    patch=PatchConfig(t=1, h=8, w=8, channels=3), text=ByteEncoderConfig(max_bytes=12)
)


def captions(batch) -> list[list[str]]:
    """Of each row."""
    return [
        [bytes((row[ids == j][1:] - 2).astype(np.uint8)).decode() for j in range(1, ids.max() + 1)]
        for row, ids in zip(batch.text, batch.text_segment_ids, strict=True)
    ]


def test_training_draws_anew_in_every_epoch_and_resumes_with_the_same(builder: Path):
    source = RecordsConfig(str(builder), caption_mix=MIX)
    packing = PackingConfig(rows=2, row_tokens=4, row_text=40, row_segments=3, bins=2)
    config = DataConfig(source, packing, TransformConfig(flip=True))
    assert make_augment(DataConfig(RecordsConfig(str(builder)))) is None  # Nothing is drawn.

    def loader(rows=None) -> Loader:
        to_tokens, augment = functools.partial(tokenize, MODEL), make_augment(config)
        return Loader(RecordsSource(source), to_tokens, packing, 0, rows, augment)

    whole, resumed, part = loader(), loader(), loader((1,))
    seen = [captions(next(whole)) for _ in range(5)]
    state = whole.get_state()
    seen += [captions(next(whole)) for _ in range(7)]
    resumed.set_state(state)
    assert [captions(next(resumed)) for _ in range(7)] == seen[5:]
    # Nor does it depend on the other rows.
    assert [captions(next(part)) for _ in range(12)] == [batch[1:] for batch in seen]
    whole.close(), resumed.close(), part.close()
    found = {text for batch in seen for row in batch for text in row}
    assert {"long 0", "short 0", "short 1", "short 2"} <= found
    assert not {"", "long 1", "long 2", "given 2"} & found


def test_states_go_with_their_caption(tmp_path: Path):
    rng = np.random.default_rng(0)
    states = {name: rng.normal(size=(i + 1, 4)).astype(np.float32) for i, name in enumerate("gs")}
    features = {
        "video": tfds.features.Tensor(shape=(1, 8, 8, 3), dtype=np.uint8),
        **dict.fromkeys(("caption", "short"), tfds.features.Text()),
        **dict.fromkeys("gs", tfds.features.Tensor(shape=(None, 4), dtype=np.float32)),
    }
    example = {"video": np.zeros((1, 8, 8, 3), np.uint8), "caption": "given", "short": "short"}
    mix = (("caption", 0.5), ("short", 0.5))
    path = foreign_builder(tmp_path, features, [{**example, **states}])
    of = {"caption_mix": mix, "caption_mix_states": ("g", "s")}
    sample = RecordsSource(RecordsConfig(path, text_states_key="g", **of))[0]
    np.testing.assert_array_equal(sample.get("text_states"), states["g"])
    seen = set()
    for i in range(20):
        one = choose_caption(sample, np.random.default_rng(i), mix)
        seen.add(one["caption"])
        np.testing.assert_array_equal(one.get("text_states"), states[one["caption"][0]])
    assert seen == {"given", "short"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"caption_mix": (("a", float("nan")),)}, "is nan"),
        ({"caption_mix": (("a", 1.0), ("a", 2.0))}, "once"),
        ({"caption_mix": MIX, "text_states_key": "t5"}, "give 3"),
        ({"caption_mix_states": ("t5",)}, "give 0"),
    ],
)
def test_bad_mixes_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
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
