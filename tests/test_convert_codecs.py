"""Codecs through the verb: folders of Diffusers' and ours, runs, and what is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from dit_jax import convert, interop
from dit_jax.codec import folders
from dit_jax.codec.causal_autoencoder import WAN, CausalAutoencoderConfig
from dit_jax.codec.config import LatentCodecConfig
from dit_jax.codec.run import CodecRun, run_of_codec
from dit_jax.config import stored_config
from dit_jax.training import open_run
from tests.codecs import SMALL, random_params, tiny_images, write_images
from tests.test_convert import WEIGHTS, converted, refused, same_folders
from tests.tiny_codec_config import get_config

LIKE_WAN = dataclasses.replace(SMALL, strides=((2, 2), (2, 2)))
"""A codec that Diffusers' class can say."""


@pytest.fixture
def wan(tmp_path: Path) -> Path:
    """A small folder of AutoencoderKLWan."""
    values = folders.autoencoder_to_wan(LIKE_WAN) | {"_diffusers_version": "0.35.1"}
    arrays = folders.wan_map(LIKE_WAN).export(random_params(LIKE_WAN))
    interop.write_folder(tmp_path / "wan", values, arrays)
    return tmp_path / "wan"


def run_with(config: CausalAutoencoderConfig, run: Path, finished: bool = True) -> Path:
    """The run of a codec, as training leaves it."""
    trained = dataclasses.replace(
        get_config(), model=dataclasses.replace(config, shift=(), scale=())
    )
    params = random_params(config)
    convert.write_run(run, trained, {"params": {"autoencoder": params["params"]}})
    if finished:
        folders.write_codec(run / "codec", config, params)
    return run


def test_folders_become_each_other_and_stay_one_codec(wan: Path, tmp_path: Path):
    same_folders(wan, converted(wan, tmp_path / "again", "diffusers"))
    ours = converted(wan, tmp_path / "ours", "codec")
    assert json.loads((ours / "config.json").read_text())["_class_name"] == "CausalAutoencoder"
    back = converted(ours, tmp_path / "back", "diffusers")
    assert (back / WEIGHTS).read_bytes() == (wan / WEIGHTS).read_bytes()
    assert len({folders.load_codec(folder).hash for folder in (wan, ours, back)}) == 1
    for folder in (wan, ours):
        found = convert.find_codec(str(folder), 3)
        digest = folders.load_codec(folder).hash
        assert found == LatentCodecConfig(path=str(folder), t=4, h=4, w=4, hash=digest)
    with pytest.raises(ValueError, match="latents of 3 channels, and the model makes 4"):
        convert.find_codec(str(wan), 4)


def test_a_run_gives_the_codec_it_ended_with(tmp_path: Path):
    run = run_with(LIKE_WAN, tmp_path / "run")
    same_folders(run / "codec", converted(run, tmp_path / "ours", "codec"))
    theirs = converted(run, tmp_path / "theirs", "diffusers")
    again = converted(run / "codec", tmp_path / "again", "diffusers")
    same_folders(theirs, again)
    codec, mine = folders.load_codec(theirs), folders.load_codec(run / "codec")
    assert codec.hash == mine.hash
    np.testing.assert_allclose(codec.scale, LIKE_WAN.scale, rtol=1e-6)


def test_half_precision_is_written_where_asked_for_and_read(wan: Path, tmp_path: Path):
    half = converted(wan, tmp_path / "half", "codec", "--dtype", "bfloat16")
    arrays = interop.read_weights(half)[0]
    assert {array.dtype.name for array in arrays.values()} == {"bfloat16"}
    params, full = (folders.load_codec(folder).params for folder in (half, wan))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"float32"}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2**-8), params, full)


def test_a_folder_becomes_a_run_to_fine_tune_from(wan: Path, tmp_path: Path):
    run = converted(wan, tmp_path / "run", "run")
    checkpointer, step = open_run(run)
    values = checkpointer.config(step)
    assert step == 0 and values == json.loads((run / "config.json").read_text())
    config = stored_config(values, run, CodecRun)
    # Shift and scale are measured again when fine-tuning ends.
    assert config.model == dataclasses.replace(LIKE_WAN, shift=(), scale=())
    assert config.output == str(run) and config.data.crop.frames == 17
    params = random_params(LIKE_WAN)["params"]
    shapes = {"params": {"autoencoder": jax.eval_shape(lambda: params)}}
    whole = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    found = checkpointer.restore_ema(step, shapes, jax.tree.map(lambda _: whole, shapes))
    checkpointer.close()
    jax.tree.map(np.testing.assert_array_equal, found["params"]["autoencoder"], params)


def test_what_a_layout_cannot_hold_is_refused(wan: Path, tmp_path: Path, capsys):
    run, target = run_with(SMALL, tmp_path / "run"), tmp_path / "out"
    unfinished = run_with(SMALL, tmp_path / "unfinished", finished=False)
    images = write_images(tmp_path / "images", tiny_images(4, 8))
    for source, kind, more, said in (
        (run, "diffusers", (), "strides is ((2, 2), (2, 1))"),
        (wan, "safetensors", (), "is a codec, and --to safetensors is of transformers"),
        (run, "safetensors", (), "is a codec, and --to safetensors is of transformers"),
        (images, "codec", (), "is an autoencoder of images"),
        (images, "run", (), "is an autoencoder of images"),
        (unfinished, "codec", (), "written when training ends"),
        (unfinished, "diffusers", (), "written when training ends"),
        (unfinished, "run", (), "is a run already"),
        (unfinished, "codec", ("--step", 0), "--step is 0, and the run is of a codec"),
    ):
        path = target.with_suffix(".safetensors" if kind == "safetensors" else "")
        assert said in refused(capsys, source, path, kind, *more)


def test_published_settings_are_of_a_run_too(tmp_path: Path):
    """Wan 2.1's, whose windows are those that its sides divide."""
    config = run_of_codec(WAN, "out")
    assert (config.data.crop.height, config.data.crop.frames) == (256, 17)
    assert config.model.shift == () and config.model.widths == WAN.widths
