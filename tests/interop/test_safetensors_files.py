"""Safetensors: files and shards, lazily, and what is wrong with them."""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dit_jax.interop import read_safetensors, write_safetensors


def arrays():
    rng = np.random.default_rng(0)
    return {
        "b": rng.normal(size=(3, 4)).astype(np.float32),
        "a": rng.normal(size=(5,)).astype(ml_dtypes.bfloat16),
        "half": rng.normal(size=(2, 1, 2)).astype(np.float16),
        "count": np.array(7, np.int64),
        "none": np.zeros((0, 2), np.float32),
        "mask": np.array([True, False]),
        "turned": rng.normal(size=(4, 3)).T,
    }


def test_files_are_the_librarys(tmp_path):
    wanted = arrays()
    write_safetensors(tmp_path / "a.safetensors", wanted)
    plain = {name: np.asarray(array, order="C") for name, array in wanted.items()}
    save_file(plain, tmp_path / "b.safetensors", metadata={"format": "pt"})
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    path = tmp_path / "a.safetensors"
    theirs, ours = load_file(path), read_safetensors(path)
    for name, array in wanted.items():
        for found in (theirs[name], ours[name]):
            assert found.dtype == array.dtype and found.shape == array.shape
            np.testing.assert_array_equal(found, array)
        assert not ours[name].flags.writeable and not ours[name].flags.owndata


def shards(folder):
    wanted = arrays()
    names = list(wanted)
    placed = {}
    for i, part in enumerate((names[:3], names[3:])):
        shard = f"model-{i + 1:05d}-of-00002.safetensors"
        write_safetensors(folder / shard, {name: wanted[name] for name in part})
        placed |= dict.fromkeys(part, shard)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    return index, placed


def test_shards_are_read_by_their_index(tmp_path):
    index, _ = shards(tmp_path)
    found = read_safetensors(index)
    assert found.keys() == arrays().keys()
    for name, array in arrays().items():
        np.testing.assert_array_equal(found[name], array)


def test_an_index_that_lies_is_refused(tmp_path):
    index, placed = shards(tmp_path)
    index.write_text(json.dumps({"weight_map": placed | {"more": placed["b"]}}))
    with pytest.raises(ValueError, match="names 'more', which no shard has"):
        read_safetensors(index)
    index.write_text(json.dumps({"weight_map": placed | {"b": placed["mask"]}}))
    with pytest.raises(ValueError, match="has 'b', which model.safetensors.index.json puts in"):
        read_safetensors(index)
    index.write_text(json.dumps({"weight_map": {"b": "../../elsewhere.safetensors"}}))
    with pytest.raises(ValueError, match="cannot be read as safetensors"):
        read_safetensors(index)  # sought beside the index, wherever the name points
    for text in ("[]", "{", '{"weight_map": 3}', '{"weight_map": {"b": 3}}', "[" * 100_000):
        index.write_text(text)
        with pytest.raises(ValueError, match="model.safetensors.index.json' (is no|nests)"):
            read_safetensors(index)


def test_damage_is_said(tmp_path):
    path = tmp_path / "a.safetensors"
    write_safetensors(path, arrays())
    whole = path.read_bytes()
    for content in (whole[:-1], whole[:20], b"", b"<!DOCTYPE html>", None):
        path.unlink() if content is None else path.write_bytes(content)
        with pytest.raises(ValueError, match="cannot be read as safetensors"):
            read_safetensors(path)
