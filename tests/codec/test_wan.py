"""Diffusers' AutoencoderKLWan with random weights, through files, against ours."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dit_jax import interop
from dit_jax.codec import folders
from dit_jax.codec.causal_autoencoder import WAN, CausalAutoencoderConfig
from dit_jax.codec.codec import TileConfig, VideoCodec
from tests.codecs import noise

TINY: dict[str, Any] = {
    "base_dim": 8,
    "z_dim": 4,
    "num_res_blocks": 1,
    "latents_mean": [0.1, -0.2, 0.3, 0.0],
    "latents_std": [1.5, 0.5, 2.0, 1.0],
}
VARIANTS: dict[str, dict[str, Any]] = {
    "2.1": TINY | {"dim_mult": [1, 2, 2, 2]},
    "2.2": TINY
    | {"dim_mult": [1, 2, 2], "temperal_downsample": [True, True]}
    | {"is_residual": True, "patch_size": 2, "in_channels": 12, "out_channels": 12},
    "deeper": TINY | {"num_res_blocks": 2, "decoder_base_dim": 16},
}
# Float32 through some thirty layers, summed in another order.
TOLERANCE = 1e-4


@pytest.fixture(
    scope="module", params=["2.1", "2.2", pytest.param("deeper", marks=pytest.mark.slow)]
)
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Their model, and the folder it wrote."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    diffusers = pytest.importorskip("diffusers", reason="Diffusers is not installed")
    torch.manual_seed(0)
    model = diffusers.AutoencoderKLWan(**VARIANTS[request.param]).eval()
    for name, value in model.named_parameters():
        if name.endswith("gamma"):
            torch.nn.init.uniform_(value, 0.5, 1.5)
    folder = tmp_path_factory.mktemp(request.param) / "vae"
    model.save_pretrained(folder)
    return model, folder


def off(ours: np.ndarray, theirs: Any) -> float:
    theirs = np.moveaxis(theirs.detach().numpy()[0], 0, -1)
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def test_encodes_and_decodes_as_diffusers_does(written: Any):
    torch = pytest.importorskip("torch")
    theirs, folder = written
    # A part of two latents: theirs streams one at a time.
    codec = folders.load_codec(folder, TileConfig(frames=2))
    assert isinstance(codec, VideoCodec)
    video = noise(codec.strides[0] * 2 + 1, 16, 24, codec.config.channels)
    given = torch.from_numpy(np.moveaxis(video, -1, 0)[None].copy())
    with torch.no_grad():
        mean = theirs.encode(given).latent_dist.mean
        pixels = theirs.decode(mean).sample
    latents = codec.encode(video)
    assert latents.shape == (3, 16 // codec.strides[1], 24 // codec.strides[2], 4)
    assert off(latents / codec.scale + codec.shift, mean) < TOLERANCE
    # Theirs clips what it decodes.
    assert off(np.clip(codec.decode(latents), -1, 1), pixels) < TOLERANCE


def test_the_folder_comes_back_byte_for_byte(written: Any, tmp_path: Path):
    theirs, folder = written
    config, table = folders.codec_config(folder)
    assert isinstance(config, CausalAutoencoderConfig)
    arrays, _ = interop.read_weights(folder)
    back = table.export(table.read(arrays, "the folder"))
    interop.write_folder(tmp_path / "vae", folders.autoencoder_to_wan(config), back)
    again, _ = interop.read_weights(tmp_path / "vae")
    assert again.keys() == arrays.keys()
    for key, array in arrays.items():
        np.testing.assert_array_equal(array, again[key], err_msg=key, strict=True)
    assert folders.codec_config(tmp_path / "vae")[0] == pytest.approx(config)
    stored = json.loads((tmp_path / "vae" / "config.json").read_text())
    fresh = type(theirs).from_config(stored).state_dict()
    assert {k: tuple(v.shape) for k, v in fresh.items()} == {k: v.shape for k, v in again.items()}


def test_the_published_settings_are_the_defaults():
    config = folders.autoencoder_from_wan({"_class_name": "AutoencoderKLWan"})
    assert dataclasses.replace(config, scale=WAN.scale) == WAN
    np.testing.assert_allclose(config.scale, WAN.scale, rtol=1e-12)
    assert config.stride == (4, 8, 8)


@pytest.mark.parametrize(
    "values, said",
    [
        ({"attn_scales": [0.5]}, "attn_scales"),
        ({"dim_mult": [2, 4]}, "dim_mult"),
        ({"z_dim": "16"}, "z_dim is '16'"),
        ({"latents_std": [1.0]}, r"scale is \(1.0,\)"),
        ({"latents_mean": 0.0}, "latents_mean is 0.0"),
        ({"in_channels": 4}, "out_channels is 3"),
    ],
)
def test_refuses_settings_that_are_not_built(values: dict[str, Any], said: str):
    with pytest.raises(ValueError, match=said):
        folders.autoencoder_from_wan(values)


@pytest.mark.parametrize(
    "values, said",
    [
        ({"mid_attention": False}, "mid_attention"),
        ({"variational": False}, "variational"),
        ({"strides": ((2, 2),) * 3}, "strides"),
        ({"widths": (96, 192, 384, 400)}, "widths"),
    ],
)
def test_writes_only_what_the_class_can_say(values: dict[str, Any], said: str):
    with pytest.raises(ValueError, match=f"whose {said} is"):
        folders.autoencoder_to_wan(dataclasses.replace(WAN, **values))
