"""The scripts that turn published files into records."""

import gzip
import struct

import numpy as np
import pytest
import tensorflow_datasets as tfds

from dit_jax.data.records import RecordsConfig, RecordsSource
from tests.runs import ROOT
from tests.scripts import load_script

SHARED = ROOT.parent / "shared" / "data"


@pytest.mark.skipif(not (SHARED / "sprites.npz").is_file(), reason="needs shared/data/sprites.npz")
def test_sprites_script(tmp_path):
    sprites = load_script("scripts", "sprites_to_records")
    x, y = sprites.load(SHARED / "sprites.npz")
    assert x.shape == (3870, 8, 32, 32, 3)
    captions = [sample["caption"] for sample in sprites.samples(x, y)]
    assert len(set(captions)) == 3870
    # y[0] is 0 6 3 6 6: action 0 (spell), direction 0 (left).
    assert captions[0] == "body 6, trousers 3, top 6, hair 6 casts facing left"
    assert captions[-1] == "body 2, trousers 0, top 6, hair 1 slashes facing right"
    np.savez(tmp_path / "part.npz", x=x[-280:], y=y[-280:])
    path = sprites.convert(tmp_path / "part.npz", tmp_path / "out")
    test = RecordsSource(RecordsConfig(str(path), split="test"))
    assert (len(test), len(RecordsSource(RecordsConfig(str(path))))) == (270, 10)
    assert (test[-1 + 270]["caption"], test[0]["fps"]) == (captions[-1], 8.0)
    np.testing.assert_array_equal(test[4]["video"], x[-266])
    record = tfds.builder_from_directory(path).as_data_source(split="test")[269]
    assert [record[k] for k in sprites.LABELS] == [2, 2, 2, 0, 6, 1]
    path = sprites.convert(tmp_path / "part.npz", tmp_path / "out", cycles=True)
    assert path.parent.name == "sprites_cycles"
    turned = RecordsSource(RecordsConfig(str(path), split="test"))
    starts = []
    for i in range(270):
        same = [(np.roll(x[i - 270], -k, 0) == turned[i]["video"]).all() for k in range(8)]
        starts.append(same.index(True))
    assert set(starts) == set(range(8)) and turned[9]["caption"] == captions[-261]


def test_sprites_script_refuses(tmp_path):
    sprites = load_script("scripts", "sprites_to_records")
    x, y = np.zeros((280, 8, 4, 4, 3), np.uint8), np.zeros((280, 5), np.uint8)
    arrays = {
        "do not hold": {"x": x},
        "need x uint8": {"x": x.astype(float), "y": y},
        "need more than 270": {"x": x[:9], "y": y[:9]},
        "must stay below": {"x": x, "y": y + 9},
    }
    for message, content in arrays.items():
        np.savez(tmp_path / "s.npz", **content)
        with pytest.raises(ValueError, match=message.replace("do not hold", "does not hold")):
            sprites.convert(tmp_path / "s.npz", tmp_path)
    with pytest.raises(ValueError, match="is not there"):
        sprites.convert(tmp_path / "absent.npz", tmp_path)
    (tmp_path / "s.npz").write_bytes(b"no archive")
    with pytest.raises(ValueError, match="does not hold"):
        sprites.convert(tmp_path / "s.npz", tmp_path)


def write_idx(path, array):
    header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    path.write_bytes(gzip.compress(header + array.astype(np.uint8).tobytes()))


def test_mnist_script(tmp_path):
    mnist = load_script("scripts", "mnist_to_records")
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (10, 28, 28), np.uint8)
    for stem in ("extra10k", "t10k"):
        write_idx(tmp_path / f"{stem}-images-idx3-ubyte.gz", images)
        write_idx(tmp_path / f"{stem}-labels-idx1-ubyte.gz", np.arange(10))
    path = mnist.convert(tmp_path, tmp_path / "out")
    source = RecordsSource(RecordsConfig(str(path), split="test"))
    sample = source[7]
    assert (len(source), sample["caption"]) == (10, "a handwritten digit seven")
    assert sample["video"].shape == (1, 32, 32, 3)
    np.testing.assert_array_equal(sample["video"][0, 2:30, 2:30, 1], images[7])
    assert sample["video"].sum() == 3 * images[7].sum(dtype=int)
    by_label = RecordsConfig(str(path), caption_template="{label}")
    assert RecordsSource(by_label)[4]["caption"] == "4"

    labels = tmp_path / "t10k-labels-idx1-ubyte.gz"
    write_idx(labels, np.arange(9))
    good = labels.read_bytes()
    damaged = {
        r"labels \(9,\)": good,
        "is damaged": good[:-9],
        "is no idx file": gzip.compress(b"text, not idx"),
    }
    for message, data in damaged.items():
        labels.write_bytes(data)
        with pytest.raises(ValueError, match=message):
            mnist.convert(tmp_path, tmp_path / "two")
    with pytest.raises(ValueError, match="is no directory"):
        mnist.convert(labels, tmp_path / "two")
