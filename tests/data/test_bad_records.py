"""Records that cannot be used are named one by one, and metadata that would run code are refused."""

import errno
import io
import itertools
import json
import os
import shutil
import sys

import av
import ml_dtypes
import numpy as np
import pytest
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from tensorflow_datasets.proto import tf_example_pb2

from dit_jax.data import records
from dit_jax.data.records import (
    RecordsConfig,
    RecordsSource,
    decode_video,
    find_builder,
)
from dit_jax.files import InputError
from dit_jax.prepare.recorded import find_records
from dit_jax.prepare.writing import LatentsOf, StatesOf, write_records
from tests.data.test_records import foreign_builder

COUNT = 9


def sample(i):
    rng = np.random.default_rng(i)
    return {
        "video": rng.integers(0, 256, (2, 64, 64, 3), np.uint8),
        "caption": f"clip {i}",
        "fps": 8.0,
    }


def written(root, encoding="zlib", rows=None, **given):
    """A builder of three records a shard."""
    rows = rows or [sample(i) for i in range(COUNT)]
    size = 60_000 if encoding != "video" else 1
    return write_records(
        root,
        "clips",
        {"train": rows},
        description="d",
        encoding=encoding,
        shard_bytes=size,
        **given,
    )


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return written(tmp_path_factory.mktemp("good"))


@pytest.fixture
def builder(good, tmp_path):
    path = tmp_path / "clips" / "1.0.0"
    shutil.copytree(good, path)
    assert len(shards(path)) == 3
    return path


def shards(path):
    return sorted(path.glob("*.array_record-*"))


def rewrite(shard, change):
    """Writes a shard anew, with its serialized records changed: ``change(number, bytes)``."""
    reader = ArrayRecordReader(str(shard))
    old = [reader.read([i])[0] for i in range(reader.num_records())]
    reader.close()
    writer = ArrayRecordWriter(str(shard), "group_size:1")
    for number, data in enumerate(old):
        writer.write(change(number, data))
    writer.close()


def bad_ones(source):
    found = {}
    for i in range(len(source)):
        try:
            source[i]
        except ValueError as error:
            assert f"record {i} of" in str(error)
            found[i] = error
    return found


@pytest.mark.parametrize("damage", ["cut", "footer", "empty", "garbage", "missing", "middle"])
def test_a_damaged_shard_costs_its_own_records(builder, damage):
    file = shards(builder)[1]
    data = file.read_bytes()
    if damage == "missing":
        file.unlink()
    else:
        place = len(data) // 8
        changed = {
            "cut": data[: len(data) // 2],
            "footer": data[:-70_000],
            "empty": b"",
            "garbage": np.random.default_rng(0).bytes(len(data)),
            "middle": data[:place] + bytes([data[place] ^ 255]) + data[place + 1 :],
        }
        file.write_bytes(changed[damage])
    source = RecordsSource(RecordsConfig(str(builder)))
    assert len(source) == COUNT
    bad = bad_ones(source)
    assert set(bad) <= {3, 4, 5} and bad
    assert damage == "middle" or list(bad) == [3, 4, 5]
    assert file.name in str(bad[min(bad)]) and str(builder) in str(bad[min(bad)])


def test_a_shard_that_is_cut_while_it_is_open(builder):
    source = RecordsSource(RecordsConfig(str(builder)))
    source[4]
    os.truncate(shards(builder)[1], 1000)
    assert set(bad_ones(source)) <= {3, 4, 5} and 5 in bad_ones(source)


def test_a_damaged_record_and_one_of_other_features(builder):
    def change(number, data):
        example = tf_example_pb2.Example.FromString(data)
        feature = example.features.feature
        if number == 0:
            return data[: len(data) // 2]
        if number == 1:
            del feature["caption"]
        else:
            name = next(key for key in feature if key.startswith("video") and "shape" not in key)
            feature[name].bytes_list.value[0] = feature[name].bytes_list.value[0][:-50]
        return example.SerializeToString()

    rewrite(shards(builder)[1], change)
    bad = bad_ones(RecordsSource(RecordsConfig(str(builder))))
    assert list(bad) == [3, 4, 5] and "caption" in str(bad[4])
    # Those of a slice are counted from its beginning.
    assert list(bad_ones(RecordsSource(RecordsConfig(str(builder), "train[3:]")))) == [0, 1, 2]


def test_damaged_encoded_video(tmp_path):
    path = written(tmp_path, "video")
    source = RecordsSource(RecordsConfig(str(path)))
    assert source[7]["video"].shape == (2, 64, 64, 3)

    def change(number, data):
        example = tf_example_pb2.Example.FromString(data)
        video = example.features.feature["video"].bytes_list.value[0]
        example.features.feature["video"].bytes_list.value[0] = video[: len(video) // 2]
        return example.SerializeToString()

    rewrite(shards(path)[7], change)
    assert list(bad_ones(RecordsSource(RecordsConfig(str(path))))) == [7]


def test_images_that_are_cut(tmp_path):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (64, 48, 3), np.uint8)

    def encoded(codec, pix_fmt):
        target = io.BytesIO()
        with av.open(target, "w", format="image2pipe") as container:
            stream = container.add_stream(codec, rate=1)
            stream.height, stream.width, stream.pix_fmt = 64, 48, pix_fmt
            frame = av.VideoFrame.from_ndarray(pixels)
            for packet in (*stream.encode(frame), *stream.encode()):
                container.mux(packet)
        return target.getvalue()

    for codec, pix_fmt in (("png", "rgb24"), ("mjpeg", "yuvj444p")):
        data = encoded(codec, pix_fmt)
        assert decode_video(data, image=True).shape == (1, 64, 48, 3)
        for end in (0, 20, len(data) // 2, len(data) * 9 // 10):
            with pytest.raises(ValueError):
                decode_video(data[:end], image=True)


def test_text_that_is_not_utf8_is_read(builder):
    rewrite(shards(builder)[1], lambda _, data: data.replace(b"clip 4", b"caf\xe9 4"))
    source = RecordsSource(RecordsConfig(str(builder)))
    assert not bad_ones(source) and source[4]["caption"] == "caf\ufffd 4"


def test_frame_rates_and_clips_that_are_none(builder):
    def change(number, data):
        example = tf_example_pb2.Example.FromString(data)
        feature = example.features.feature
        if number == 2:
            shape = next(key for key in feature if key.startswith("video") and "shape" in key)
            feature[shape].int64_list.value[0] = 0
        else:
            feature["fps"].float_list.value[0] = [0.0, float("nan")][number]
        return example.SerializeToString()

    rewrite(shards(builder)[1], change)
    assert list(bad_ones(RecordsSource(RecordsConfig(str(builder))))) == [3, 4, 5]


def test_errors_of_the_disk_keep_their_type(builder, monkeypatch):
    source = RecordsSource(RecordsConfig(str(builder)))

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
    source = RecordsSource(RecordsConfig(str(builder)))
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
            RecordsSource(RecordsConfig(str(builder)))


def test_old_data_sets_are_read(tmp_path):
    """As the writer before made them: by TFDS's own, one shard, without sizes."""
    states, latents = StatesOf(2, "s", "t5"), LatentsOf(3, "h", "codec")
    rows = [{"video": np.ones((1, 2, 2, 3), np.float32), "caption": "x", "fps": 8.0}]
    rows[0]["text_states"] = np.ones((1, 2), np.float32)
    new = written(tmp_path / "new", rows=rows, latents=latents, text_states=states)

    info = tfds.builder_from_directory(new).info
    stored = {**rows[0], "video": rows[0]["video"].astype(np.float16)}
    stored["text_states"] = rows[0]["text_states"].astype(ml_dtypes.bfloat16)
    path = foreign_builder(tmp_path, dict(info.features), [stored], info.metadata)
    old = RecordsSource(RecordsConfig(path, text_states_key="text_states"))
    assert (old.codec, old.text_encoder, old.sizes) == ("h", "s", None)
    np.testing.assert_array_equal(old[0]["video"], rows[0]["video"])
