"""Records that cannot be used are named one by one, and metadata that would run code are refused."""

import errno
import itertools
import json
import os
import shutil
import sys

import ml_dtypes
import numpy as np
import pytest
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from tensorflow_datasets.proto import tf_example_pb2

from dit_jax.data import records
from dit_jax.data.records import RecordsConfig, RecordsSource, decode_video, find_builder
from dit_jax.files import InputError
from dit_jax.prepare.recorded import find_records
from dit_jax.prepare.writing import LatentsOf, StatesOf, write_records
from tests.data.test_records import foreign_builder, image_file

COUNT = 9


def sample(i):
    rng = np.random.default_rng(i)
    return {
        "video": rng.integers(0, 256, (2, 64, 64, 3), np.uint8),
        "caption": f"clip {i}",
        "fps": 8.0,
    }


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A builder of three records a shard."""
    rows = {"train": [sample(i) for i in range(COUNT)]}
    root = tmp_path_factory.mktemp("good")
    return write_records(root, "clips", rows, description="d", shard_bytes=60_000)


@pytest.fixture
def builder(good, tmp_path):
    path = tmp_path / "clips" / "1.0.0"
    shutil.copytree(good, path)
    assert len(shards(path)) == 3
    return path


def shards(path):
    return sorted(path.glob("*.array_record-*"))


def rewrite(shard, change):
    """Writes a shard anew: ``change(number, features)`` of each record, which may return its bytes."""
    reader = ArrayRecordReader(str(shard))
    old = [reader.read([i])[0] for i in range(reader.num_records())]
    reader.close()
    writer = ArrayRecordWriter(str(shard), "group_size:1")
    for number, data in enumerate(old):
        example = tf_example_pb2.Example.FromString(data)
        changed = change(number, example.features.feature)
        writer.write(changed or example.SerializeToString())
    writer.close()


def opened(builder, **config):
    return RecordsSource(RecordsConfig(str(builder), **config))


def bad_ones(source):
    found = {}
    for i in range(len(source)):
        try:
            source[i]
        except ValueError as error:
            assert f"record {i} of" in str(error)
            found[i] = error
    return found


@pytest.mark.parametrize("damage", ["cut", "empty", "garbage", "missing", "middle"])
def test_a_damaged_shard_costs_its_own_records(builder, damage):
    file = shards(builder)[1]
    data, place = file.read_bytes(), file.stat().st_size // 8
    changed = {
        "cut": data[: len(data) // 2],
        "empty": b"",
        "garbage": np.random.default_rng(0).bytes(len(data)),
        "middle": data[:place] + bytes([data[place] ^ 255]) + data[place + 1 :],
    }
    file.unlink() if damage == "missing" else file.write_bytes(changed[damage])
    source = opened(builder)
    assert len(source) == COUNT
    bad = bad_ones(source)
    assert set(bad) <= {3, 4, 5} and bad
    assert damage == "middle" or list(bad) == [3, 4, 5]
    assert file.name in str(bad[min(bad)]) and str(builder) in str(bad[min(bad)])


def test_a_shard_that_is_cut_while_it_is_open(builder):
    source = opened(builder)
    source[4]
    os.truncate(shards(builder)[1], 1000)
    assert set(bad_ones(source)) <= {3, 4, 5} and 5 in bad_ones(source)


def test_damaged_records_lose_themselves_alone(builder):
    def no_clips(number, feature):
        if number < 2:
            feature["fps"].float_list.value[0] = [0.0, float("nan")][number]
        else:
            shape = next(key for key in feature if key.startswith("video") and "shape" in key)
            feature[shape].int64_list.value[0] = 0

    def damaged(number, feature):
        pixels = next(key for key in feature if key.startswith("video") and "shape" not in key)
        video = feature[pixels].bytes_list.value
        if number == 0:
            return b"no record"
        if number == 1:
            del feature["caption"]
        else:
            video[0] = video[0][:-50]

    def not_utf8(number, feature):
        feature["caption"].bytes_list.value[0] = b"caf\xe9"

    for shard, change in zip(shards(builder), (no_clips, damaged, not_utf8), strict=True):
        rewrite(shard, change)
    bad = bad_ones(opened(builder))
    assert list(bad) == [0, 1, 2, 3, 4, 5] and "caption" in str(bad[4])
    assert opened(builder)[7]["caption"] == "caf\ufffd"
    # Those of a slice are counted from its beginning.
    assert list(bad_ones(opened(builder, split="train[3:]"))) == [0, 1, 2]


@pytest.mark.parametrize(("codec", "pix_fmt"), [("png", "rgb24"), ("mjpeg", "yuvj444p")])
def test_images_that_are_cut(codec, pix_fmt):
    pixels = np.random.default_rng(0).integers(0, 256, (64, 48, 3), np.uint8)
    data = image_file(pixels, pix_fmt, codec)
    assert decode_video(data, image=True).shape == (1, 64, 48, 3)
    for end in (0, 20, len(data) // 2, len(data) * 9 // 10):
        with pytest.raises(ValueError):
            decode_video(data[:end], image=True)


def test_errors_of_the_disk_keep_their_type(builder, monkeypatch):
    source = opened(builder)

    class Broken:
        def __init__(self, *_, **__):
            raise RuntimeError("read() failed: Input/output error; reading /x; at byte 3")

    with monkeypatch.context() as patch:
        patch.setattr(records, "ArrayRecordReader", Broken)
        with pytest.raises(OSError) as raised:
            source[8]
        assert raised.value.errno == errno.EIO and not isinstance(raised.value, ValueError)
    assert source[8]["caption"] == "clip 8"
    shutil.rmtree(builder)
    with pytest.raises(FileNotFoundError):  # A mount that is gone, say.
        source[0]


def test_few_shards_are_open_at_once(builder, monkeypatch):
    monkeypatch.setattr(records, "OPEN_SHARDS", 2)
    source = opened(builder)
    for _ in range(2):
        assert [one["caption"] for one in source] == [f"clip {i}" for i in range(COUNT)]
    assert source._open_shard.cache_info().currsize == 2


TEXT = {"pythonClassName": "evil.Text", "text": {}}
TFDS = "tensorflow_datasets.core.features"
NESTED = [
    {"python_class_name": "evil.Text", "text": {}},
    {"type": "evil.Text", "content": {}},
    {
        "pythonClassName": f"{TFDS}.sequence_feature.Sequence",
        "sequence": {"feature": TEXT, "length": "-1"},
    },
    {
        "pythonClassName": f"{TFDS}.features_dict.FeaturesDict",
        "jsonFeature": {"json": json.dumps({"x": {"type": "evil.Text", "content": "{}"}})},
    },
    {"pythonClassName": "tensorflow_datasets.x/../evil.Text", "text": {}},
]


def test_opening_a_data_set_runs_no_code(builder, tmp_path, monkeypatch):
    mark = tmp_path / "evil ran"
    (tmp_path / "evil.py").write_text(f"import pathlib\npathlib.Path({str(mark)!r}).touch()\n")
    monkeypatch.syspath_prepend(tmp_path)
    texts = {name: (builder / name).read_text() for name in ("features.json", "dataset_info.json")}
    by_name = RecordsConfig("clips", data_dir=str(builder.parents[1]))
    for feature, file in itertools.product(NESTED, texts):
        features = json.loads(texts["features.json"])
        features["featuresDict"]["features"]["caption"] = feature
        if file == "dataset_info.json":
            features = {**json.loads(texts[file]), "features": features}
        for name, text in texts.items():
            (builder / name).write_text(json.dumps(features) if name == file else text)
        for config in (RecordsConfig(str(builder)), by_name):
            with pytest.raises(InputError, match=r"evil\.Text"):
                RecordsSource(config)
        with pytest.raises(InputError, match=r"evil\.Text"):
            list(find_records(f"tfds:{builder}"))  # As ``prepare --input`` does.
    assert not mark.exists() and "evil" not in sys.modules


def test_names_that_would_load_code_are_refused(tmp_path, monkeypatch):
    def load(*_, **__):
        raise AssertionError("TFDS was asked")

    monkeypatch.setattr(tfds, "builder", load)
    for name in ("evil:Text", "huggingface:mnist", "kaggle:x/y", "mnist/a=1", "../evil", "a b"):
        with pytest.raises(InputError, match="neither the name"):
            find_builder(name, str(tmp_path))
    with pytest.raises(InputError, match="gcsfuse"):
        find_builder("gs://bucket/clips/1.0.0")


def test_metadata_that_cannot_be_parsed(builder):
    for text in ("{", "[" * 100_000, json.dumps({"features": "["}), "\xff"):
        (builder / "features.json").write_text(text)
        with pytest.raises(InputError, match=r"1\.0\.0"):
            opened(builder)


def test_old_data_sets_are_read(tmp_path):
    """As the writer before made them: by TFDS's own, one shard, without sizes."""
    rows = [{"video": np.ones((1, 2, 2, 3), np.float32), "caption": "x", "fps": 8.0}]
    rows[0]["text_states"] = np.ones((1, 2), np.float32)
    of = {"latents": LatentsOf(3, "h", "codec"), "text_states": StatesOf(2, "s", "t5")}
    new = write_records(tmp_path / "new", "clips", {"train": rows}, description="d", **of)
    info = tfds.builder_from_directory(new).info
    stored = {**rows[0], "video": rows[0]["video"].astype(np.float16)}
    stored["text_states"] = rows[0]["text_states"].astype(ml_dtypes.bfloat16)
    path = foreign_builder(tmp_path, dict(info.features), [stored], info.metadata)
    old = RecordsSource(RecordsConfig(path, text_states_key="text_states"))
    assert (old.codec, old.text_encoder, old.sizes) == ("h", "s", None)
    np.testing.assert_array_equal(old[0]["video"], rows[0]["video"])
