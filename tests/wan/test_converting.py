"""The verb on Wan's files, folders and pipelines, and errors before anything is loaded."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from dit_jax import convert, interop
from dit_jax.config import stored_config, to_dict
from dit_jax.files import InputError
from dit_jax.sampling import Request
from dit_jax.training import open_run
from dit_jax.wan import conditioners
from dit_jax.wan.conditioners import STATES
from tests.wan.published import (
    random_file,
    write_authors,
    write_diffusers,
    write_pipeline,
    write_text_encoder,
)

WEIGHTS = "diffusion_pytorch_model.safetensors"


def run(source: object, target: object, kind: str, *more: object) -> int:
    arguments = ("--input", source, "--output", target, "--to", kind, *more)
    return convert.main([str(argument) for argument in arguments])


def converted(source: Path, target: Path, kind: str, *more: object) -> Path:
    assert run(source, target, kind, *more) == 0
    return target


def stored(folder: Path) -> tuple[Any, Any]:
    """The config of a run, and its parameters."""
    checkpointer, step = open_run(folder)
    config = stored_config(checkpointer.config(step), folder)
    params = checkpointer.restore_ema(step, *convert._abstract(config, config.mesh))
    checkpointer.close()
    return config, params


def same(one: Any, other: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_a_pipeline_of_two_experts_is_one_run(tmp_path):
    """And its transformers come back, byte for byte, from the run and from the run in it."""
    pipeline = write_pipeline(tmp_path / "wan", "2.2 T2V", flow_shift=3.0)
    out = converted(pipeline, tmp_path / "run", "run")
    (high, of_high), (low, of_low) = stored(out), stored(out / "low_noise")
    same(of_high, random_file("2.2 T2V")[1])
    same(of_low, random_file("2.2 T2V", seed=1)[1])
    assert high.model == low.model and high.codec == low.codec
    expert = (high.expert.path, high.expert.below, high.expert.cfg_scale)
    assert expert == (str(out / "low_noise"), 0.9, 3.0) and low.expert.path is None
    assert low.output == str(out / "low_noise")
    assert high.codec.path == str(pipeline / "vae")
    assert (high.codec.t, high.codec.h, high.codec.w) == (4, 8, 8) and high.codec.hash
    assert high.text_encoder.path == str(pipeline / "text_encoder") and high.text_encoder.hash
    assert high.model.text.encoder == "wan"  # of no known size: it is named as its pipeline
    sampling, diffusion = high.sampling, high.diffusion
    assert (sampling.solver, sampling.steps, sampling.cfg_scale) == ("unipc", 40, 4.0)
    assert sampling.shift == diffusion.time.shift == 3.0  # as the scheduler says
    assert diffusion.prediction == "velocity" and diffusion.caption_dropout == 0
    for source, theirs in ((out, "transformer"), (out / "low_noise", "transformer_2")):
        back = converted(source, tmp_path / f"back_{theirs}", "diffusers")
        for name in ("config.json", WEIGHTS):
            assert (back / name).read_bytes() == (pipeline / theirs / name).read_bytes()


@pytest.mark.parametrize(
    "layout, shift, frames, steps, fps",
    [("2.2 TI2V", 5.0, 121, 50, 24.0), ("2.1 I2V", 3.0, 81, 40, 16.0)],
)
def test_a_run_is_sampled_as_published(layout, shift, frames, steps, fps):
    file, _ = random_file(layout)
    config = file.run("run", convert.find_codec(None, 16, file.strides))
    sampling = config.sampling
    assert (sampling.shift, sampling.frames, sampling.steps) == (shift, frames, steps)
    # A latent frame is a unit of time, as published positions count them.
    assert sampling.fps == fps
    assert config.codec.latent_fps(fps) == config.model.patch.reference_fps
    assert "path" in vars(config.text_encoder)  # sample takes one with --text-encoder
    assert sampling.negative_prompt.startswith("色调艳丽") and sampling.batch == 1
    with_first = config.diffusion.masks.first > 0
    assert with_first == (layout == "2.2 TI2V")


def test_the_image_encoder_is_named_and_read(tmp_path, monkeypatch):
    """Once for each set of images; one too many is refused."""
    pipeline = write_pipeline(tmp_path / "wan", "2.1 I2V", _class_name="FlowMatchEuler", shift=3.0)
    (pipeline / "image_encoder").mkdir()
    (pipeline / "image_encoder" / "config.json").write_text("{}")
    found = interop.pipeline_of(pipeline, str(pipeline))
    assert found is not None and found.transformers == {"": pipeline / "transformer"}
    file, _ = random_file("2.1 I2V")
    codec = convert.find_codec(found.codec, 16)
    config = found.configure("", file.run(str(tmp_path / "run"), codec))
    assert stored_config(json.loads(json.dumps(to_dict(config))), "a") == config
    states: Any = config.model.conditioners[STATES]
    assert states.encoder == str(pipeline / "image_encoder")
    reading = dataclasses.replace(states, dim=3)

    def encode(encoder: str, shape: tuple[int, ...], pixels: bytes) -> np.ndarray:
        assert encoder == states.encoder and len(pixels) == np.prod(shape)
        return np.full((257 * shape[0], 3), pixels[0], np.float32)

    monkeypatch.setattr(conditioners, "image_states", encode)
    plain, red = Request("", 3, 4, 6, 4.0, 0), np.full((8, 12, 3), 7, np.uint8)
    space: Any = None  # which it does not need
    request = reading.with_images(STATES, plain, space, {0: red})
    np.testing.assert_array_equal(request.segment_fields[STATES], np.full((257, 3), 7))
    with pytest.raises(InputError, match="2 images"):
        reading.with_images(STATES, plain, space, {0: red, 8: red})
    unset = dataclasses.replace(reading, encoder=None)
    with pytest.raises(InputError, match="encoder is unset"):
        unset.with_images(STATES, plain, space, {0: red})


def test_the_authors_folders_become_a_run_and_a_file(tmp_path):
    """Their two experts, in shards; then one file of another program's, with a prefix."""
    for name, seed in (("high_noise_model", 0), ("low_noise_model", 1)):
        write_authors(tmp_path / "A14B" / name, "2.2 I2V", seed)
    out = converted(tmp_path / "A14B", tmp_path / "run", "run")
    (high, of_high), (_, of_low) = stored(out), stored(out / "low_noise")
    same(of_high, random_file("2.2 I2V")[1])
    same(of_low, random_file("2.2 I2V", seed=1)[1])
    assert (high.expert.below, high.expert.cfg_scale, high.sampling.shift) == (0.9, 3.5, 5.0)
    back = converted(out, tmp_path / "back.safetensors", "safetensors")
    arrays = interop.read_safetensors(back)
    theirs, _ = interop.read_weights(tmp_path / "A14B" / "high_noise_model")
    assert arrays.keys() == theirs.keys()
    assert all(arrays[key].tobytes() == theirs[key].tobytes() for key in arrays)
    named = {f"model.diffusion_model.{key}": array for key, array in arrays.items()}
    interop.write_safetensors(tmp_path / "other.safetensors", named)
    heads = ("--heads", 2)
    again = converted(
        tmp_path / "other.safetensors", tmp_path / "b.safetensors", "safetensors", *heads
    )
    assert again.read_bytes() == back.read_bytes()


def test_what_is_wrong_is_said_before_anything_is_loaded(tmp_path, capsys, monkeypatch):
    def loaded(*_: Any) -> None:
        raise AssertionError("weights are read")

    monkeypatch.setattr(interop.Map, "load", loaded)
    plain = write_diffusers(tmp_path / "plain", "2.1 T2V")
    values = interop.read_config(plain)

    def changed(name: str, layout: str = "2.1 T2V", **settings: Any) -> Path:
        """A folder of that layout's weights under another config."""
        folder = write_diffusers(tmp_path / name, layout)
        (folder / "config.json").write_text(json.dumps(values | settings))
        return folder

    unknown = changed("unknown", "2.1 I2V")
    deeper, other = changed("deeper", num_layers=3), changed("other", eps=1e-5)
    authors = write_authors(tmp_path / "authors", "2.1 T2V")
    (authors / "diffusion_pytorch_model-00002-of-00002.safetensors").unlink()
    alone = tmp_path / "alone.safetensors"
    file, params = random_file("2.1 T2V")
    interop.write_safetensors(alone, file.table("safetensors").export(params))
    pipeline = write_pipeline(tmp_path / "pipeline", "2.2 T2V")
    (pipeline / "transformer_2" / "config.json").unlink()
    encoder = write_pipeline(tmp_path / "encoder", "2.1 T2V")
    (encoder / "text_encoder" / "config.json").unlink()
    (encoder / "text_encoder" / "model.safetensors").unlink()
    (encoder / "text_encoder").rmdir()
    write_text_encoder(encoder / "text_encoder", 8)
    capsys.readouterr()
    for source, said in (
        (unknown, "blocks.0.attn2.add_k_proj.bias: (24,), which"),
        (unknown, "patch_embedding.weight: shape (24, 36, 1, 2, 2), wanted (24, 16, 1, 2, 2)"),
        (deeper, "blocks.2.attn1.norm_k.weight: absent"),
        (other, "eps is 1e-05"),
        (authors, "00002-of-00002.safetensors"),
        (alone, "number of heads with --heads"),
        (pipeline, "names transformer_2"),
        (encoder, "makes states of 8 numbers, and the transformer reads 16"),
    ):
        assert run(source, tmp_path / "run", "run") == 2
        assert said in capsys.readouterr().err
        assert not (tmp_path / "run").exists()
    two = write_pipeline(tmp_path / "two", "2.2 I2V")
    assert run(two, tmp_path / "one", "diffusers") == 2
    assert "has the transformers transformer, transformer_2" in capsys.readouterr().err


def test_a_run_that_is_not_wans_stays_a_run(tmp_path, capsys):
    pipeline = write_pipeline(tmp_path / "wan", "2.2 TI2V")
    out = converted(pipeline, tmp_path / "run", "run")
    (checkpoint,) = (out / "checkpoints").iterdir()
    stored_in = next(path for path in checkpoint.rglob("*") if "time_divisor" in read_text(path))
    text = stored_in.read_text().replace('"time_divisor": 128', '"time_divisor": 127')
    stored_in.write_text(text)
    assert run(out, tmp_path / "back", "diffusers") == 2
    assert "model.dit.time_divisor is 127, not 128" in capsys.readouterr().err


def read_text(path: Path) -> str:
    return path.read_text(errors="ignore") if path.is_file() else ""
