"""Records of TFDS builders as media: which features they are, and what becomes of them."""

import json
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds

from dit_jax.data import RecordsConfig, RecordsSource
from dit_jax.prepare.__main__ import PrepareConfig, prepare
from dit_jax.prepare.clips import ClipConfig
from dit_jax.prepare.examining import ExamineConfig, examine, read_clip
from dit_jax.prepare.listing import find_media
from dit_jax.prepare.recorded import find_features, parse_input
from dit_jax.prepare.writing import LatentsOf, write_records
from tests.prepare.made_media import moving, run_here

SMALL = ExamineConfig(clips=ClipConfig(min_seconds=0.5, stride=2, multiple=8))


@pytest.fixture(scope="module")
def builder(tmp_path_factory):
    """A clip, a clip of two shots, an image, a black clip, and a copy of the first."""
    first = moving(9, 64, 80, 0)
    two = np.concatenate([moving(10, 64, 80, 1), 255 - moving(10, 64, 80, 2)])
    videos = [first, two, moving(1, 80, 64, 3), np.zeros((9, 64, 80, 3), np.uint8), first]
    samples = [{"video": v, "caption": f"clip {i}", "fps": 8.0} for i, v in enumerate(videos)]
    splits = {"train": samples, "test": samples[:1]}
    root = tmp_path_factory.mktemp("records")
    return str(write_records(root, "films", splits, description="d"))


def test_records_go_through_all_stages_and_keep_their_ids(builder, tmp_path, monkeypatch):
    monkeypatch.setattr("dit_jax.prepare.stages.run", run_here)
    config = PrepareConfig(f"tfds:{builder}", str(tmp_path), encoding="zlib", examine=SMALL)
    about = prepare(config, shown=False)
    assert about["files_by_reason"] == {"used": 3, "all clips left out": 2}
    told = {file["path"]: [c["left_out"] for c in file["clips"]] for file in about["by_file"]}
    names = [f"films/1.0.0/train/{i}" for i in range(5)]
    assert list(told) == names and told[names[1]] == ["", ""]
    assert told[names[3]][0].startswith("black") and told[names[4]] == [
        f"near-duplicate: of {names[0]}#0"
    ]
    path = str(tmp_path / "clips" / "1.0.0")
    source = tfds.data_source("clips", data_dir=tmp_path, split="train")
    assert [r["source"].decode() for r in source] == [names[0], names[1], names[1], names[2]]
    assert [r["caption_origin"] for r in source] == [b"caption: record"] * 4
    samples = list(RecordsSource(RecordsConfig(path)))
    assert [s["caption"] for s in samples] == ["clip 0", "clip 1", "clip 1", "clip 2"]
    # Nothing was scaled: what came in comes out.
    np.testing.assert_array_equal(samples[0]["video"], moving(9, 64, 80, 0))
    np.testing.assert_array_equal(samples[2]["video"], 255 - moving(10, 64, 80, 2)[:9])
    np.testing.assert_array_equal(samples[3]["video"], moving(1, 80, 64, 3))
    assert [s["fps"] for s in samples] == [8.0, 8.0, 8.0, 1.0]
    again = prepare(config, shown=False)
    assert again["stages"]["examine"]["clips"] == 0 and "records" not in again["stages"]


def test_a_split_is_named_behind_a_colon(builder):
    assert parse_input("tfds:a/b/1.0.0") == ("a/b/1.0.0", "train")
    assert parse_input("tfds:films:test") == ("films", "test")
    assert parse_input("tfds:films/config:1.2.0") == ("films/config:1.2.0", "train")
    assert parse_input("tfds:films:train[10%:20%]") == ("films", "train[10%:20%]")
    (item,) = find_media(f"tfds:{builder}:test").items
    assert item.name == "films/1.0.0/test/0" and '"index": 0' in item.path
    assert len(find_media(f"tfds:{builder}:train[:40%]").items) == 2
    items = (find_media(f"tfds:{builder}:{split}").items for split in ("train", "test"))
    assert len({one.key for split in items for one in split}) == 6


def test_clips_are_read_again_as_they_were_examined(builder):
    item = find_media(f"tfds:{builder}").items[1]
    report = examine(item.path, SMALL)
    assert report.probe.container == "tfds" and report.caption == "clip 1"
    assert report.shots == ((0, 10), (10, 20))
    later = read_clip(item.path, report.clips[1])
    np.testing.assert_array_equal(later, 255 - moving(10, 64, 80, 2)[:9])
    place = json.loads(item.path.removeprefix("tfds:")) | {"index": 99}
    assert examine("tfds:" + json.dumps(place), SMALL).refusal[0] == "cannot be decoded"


def test_features_are_told_by_their_types_and_names():
    def tensor(*shape, dtype=np.uint8):
        return tfds.features.Tensor(shape=shape, dtype=dtype)

    clip, text = tensor(None, None, None, 3), tfds.features.Text()
    image, label = tfds.features.Image(), tfds.features.ClassLabel(names=["a", "b"])
    found = find_features({"x": clip, "image": image, "video_id": text, "label": label}, "")
    assert found == ("x", "{label}")
    assert find_features({"image": image, "mask": image, "words": text}, "") == ("image", "words")
    assert find_features({"image": image, "words": text, "text": text}, "") == ("image", "text")
    assert find_features({"video": clip, "other": clip}, "") == ("video", None)
    with pytest.raises(ValueError, match="has the features z: none is a video"):
        find_features({"z": tensor(None, None, None, 4, dtype=np.float32)}, "in")


def test_what_is_no_set_of_videos_is_refused(builder, tmp_path):
    latents = {"video": np.zeros((1, 2, 2, 4), np.float32), "caption": "", "fps": 8.0}
    of = LatentsOf(4, "h")
    path = write_records(tmp_path, "latents", {"train": [latents]}, description="d", latents=of)
    for given, why in [
        (f"tfds:{path}", "none is a video"),
        (f"tfds:{builder}:absent", "'absent'"),
        (f"tfds:{Path(builder).parent}", "builder"),
        ("tfds:", "tfds:NAME"),
    ]:
        with pytest.raises(ValueError, match=why):
            find_media(given)
