"""Our folder of a codec: there and back, its hash, and what is refused of damaged and foreign ones."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from dit_jax import interop
from dit_jax.codec import folders
from dit_jax.codec.causal_autoencoder import CausalAutoencoderConfig
from dit_jax.codec.codec import TileConfig, VideoCodec
from dit_jax.files import as_path, write_whole
from tests.codecs import SMALL, random_params

WEIGHTS = "diffusion_pytorch_model.safetensors"
PARAMS = random_params(SMALL)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folders.write_codec(tmp_path / "codec", SMALL, PARAMS)
    return tmp_path / "codec"


def opened(folder: Path) -> VideoCodec:
    codec = folders.load_codec(folder)
    assert isinstance(codec, VideoCodec)
    return codec


def refused(folder: Path) -> str:
    with pytest.raises(ValueError) as error:
        folders.load_codec(folder)
    return str(error.value)


VARIANTS = {
    "small": SMALL,
    "point": dataclasses.replace(SMALL, variational=False, mid_attention=False, shift=(), scale=()),
    "other": dataclasses.replace(
        SMALL, shortcuts=True, patch=2, dtype="float32", decoder_widths=(8, 8, 4)
    ),
}


@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_what_is_written_is_read_back(name: str, tmp_path: Path):
    config = VARIANTS[name]
    params = random_params(config, seed=1)
    folders.write_codec(tmp_path / "codec", config, params)
    codec = folders.load_codec(tmp_path / "codec", TileConfig(frames=3))
    assert isinstance(codec, VideoCodec)
    assert (codec.config, codec.name, codec.tiles.frames) == (config, "codec", 3)
    jax.tree.map(np.testing.assert_array_equal, codec.params, params)


def digest(tmp_path: Path, config: CausalAutoencoderConfig, params: Any = PARAMS) -> str:
    folders.write_codec(tmp_path / "hashed", config, params)
    return opened(tmp_path / "hashed").hash


def test_the_hash_is_of_what_latents_mean(folder: Path, tmp_path: Path):
    mine = opened(folder).hash
    # Records name codecs by it: it must not change.
    assert mine == "9cb353edf53d1365" and digest(tmp_path, SMALL) == mine
    # How it computes changes no meaning, and the place neither.
    assert digest(tmp_path, dataclasses.replace(SMALL, dtype="bfloat16")) == mine
    folder.rename(tmp_path / "elsewhere")
    assert opened(tmp_path / "elsewhere").hash == mine
    changed = jax.tree.map(np.array, PARAMS)
    changed["params"]["decoder"]["conv_out"]["bias"][0] += 1e-3
    others = {
        digest(tmp_path, dataclasses.replace(SMALL, shift=(0.1, -0.2, 0.5))),
        digest(tmp_path, dataclasses.replace(SMALL, scale=(0.5, 2.0, 1.5))),
        digest(tmp_path, SMALL, changed),
    }
    assert len(others) == 3 and mine not in others


def test_damaged_weights_are_refused_by_name(folder: Path):
    path = folder / WEIGHTS
    whole = path.read_bytes()
    for broken in (whole[: len(whole) // 2], b"\x00" * 8 + whole[8:], b""):
        path.write_bytes(broken)
        assert WEIGHTS in refused(folder)
    path.unlink()
    assert "has no weights: none of" in refused(folder)


def test_every_key_that_is_not_there_or_too_many_is_named(folder: Path):
    arrays = dict(interop.read_safetensors(folder / WEIGHTS))
    absent, other = arrays.pop("encoder/conv_in/bias"), arrays.pop("encoder/quant/bias")
    arrays |= {"encoder/quant/bias": other[:-1], "encoder/foreign/bias": absent}
    interop.write_safetensors(folder / WEIGHTS, arrays)
    said = refused(folder)
    assert f"{WEIGHTS}' is not the CausalAutoencoder of its config.json" in said
    assert "encoder/conv_in/bias: absent" in said
    assert "encoder/quant/bias: shape (5,), wanted (6,)" in said
    assert "encoder/foreign/bias: (4,), which" in said


@pytest.mark.parametrize(
    "values, said",
    [
        ({"_class_name": "DiTTransformer2DModel"}, "is of 'DiTTransformer2DModel', which is no"),
        ({"_class_name": None}, "is of None, which is no codec"),
        ({"widths": None}, "widths is (96, 192, 384, 384)"),
        ({"widths": ["4", "4", "4"]}, "widths[0] is '4'"),
        ({"strides": [2, 2]}, "strides[0] is 2"),
        ({"groups": 8}, "'groups'"),
        ({"dtype": "int8"}, "dtype is 'int8'"),
        ({"shortcuts": 1}, "shortcuts is 1"),
        (
            {"latent_channels": 5, "shift": [], "scale": []},
            "decoder/body/conv_in/kernel: shape (3, 3, 3, 3, 4), wanted (3, 3, 3, 5, 4)",
        ),
    ],
)
def test_settings_that_cannot_be_are_refused(folder: Path, values: dict[str, Any], said: str):
    stored = json.loads((folder / "config.json").read_text()) | values
    kept = {name: value for name, value in stored.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(kept))
    message = refused(folder)
    assert said in message and "config.json" in message


def test_a_folder_without_settings_is_refused(folder: Path, tmp_path: Path):
    (folder / "config.json").write_text("{")
    assert "config.json' is no JSON" in refused(folder)
    (folder / "config.json").write_text("[" * 100_000)
    assert "config.json'" in refused(folder)
    (folder / "config.json").write_text("[]")
    assert "holds no JSON object" in refused(folder)
    assert "nowhere" in refused(tmp_path / "nowhere")


def test_weights_that_are_not_finite_are_named(tmp_path: Path):
    params = jax.tree.map(np.array, PARAMS)
    leaf = params["params"]["decoder"]["conv_out"]["bias"]
    leaf[0] = np.nan
    folders.write_codec(tmp_path / "codec", SMALL, params)
    assert "NaN or infinite values in decoder/conv_out/bias:" in refused(tmp_path / "codec")


def test_a_codec_lies_on_cloud_storage(folder: Path, bucket: str):
    target = as_path(f"{bucket}/codecs/codec")
    for file in folder.iterdir():
        write_whole(target / file.name, file.read_bytes())
    remote, local = folders.load_codec(str(target)), opened(folder)
    assert (remote.name, remote.hash) == (local.name, local.hash)
