"""The verb: through files on disk and back, and errors before anything is written."""

import dataclasses
import json
import os
import pickle
import resource
import zipfile
from pathlib import Path

import jax
import numpy as np
import pytest

from dit_jax import convert, interop, sample
from dit_jax.codec.config import LatentCodecConfig
from dit_jax.codec.folders import OLD_ATTENTION
from dit_jax.config import stored_config
from dit_jax.files import as_path, write_whole
from dit_jax.interop import dit as dit_files
from dit_jax.parallel import make_mesh
from dit_jax.sampling.media import read_video
from dit_jax.training import Checkpointer, open_run
from tests.codecs import diffusers_config, image_config, tiny_images, write_images
from tests.interop.published import authors_arrays


def run(*arguments: object) -> int:
    return convert.main([str(argument) for argument in arguments])


def converted(source: Path, target: Path, kind: str, *more: object) -> Path:
    assert run("--input", source, "--output", target, "--to", kind, *more) == 0
    assert not list(target.parent.glob(".*")), "something was left beside the output"
    return target


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """A small file in the authors' layout."""
    _, table, arrays = authors_arrays()
    params = table.read(arrays, "made")
    interop.write_safetensors(tmp_path / "DiT.safetensors", table.export(params))
    return tmp_path / "DiT.safetensors"


@pytest.fixture
def autoencoder(tmp_path: Path) -> Path:
    """A folder of a small autoencoder, two pixels to a latent."""
    return write_images(tmp_path / "vae", tiny_images(4, 8))


HEADS = ("--heads", 4)


def test_a_file_becomes_a_run_and_comes_back_byte_for_byte(published, tmp_path, capsys):
    made = converted(published, tmp_path / "run", "run", *HEADS)
    said = capsys.readouterr().out
    assert said == f"DiT of width 48, depth 2, patch 2, 8 x 8 latents: a run in {made}/\n"
    back = converted(made, tmp_path / "back.safetensors", "safetensors")
    assert back.read_bytes() == published.read_bytes()


def test_a_folder_becomes_a_run_and_comes_back_byte_for_byte(published, tmp_path):
    folder = converted(published, tmp_path / "folder", "diffusers", *HEADS)
    made = converted(folder, tmp_path / "run", "run")
    again = converted(made, tmp_path / "again", "diffusers")
    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        assert (folder / name).read_bytes() == (again / name).read_bytes()
    back = converted(again, tmp_path / "back.safetensors", "safetensors")
    assert back.read_bytes() == published.read_bytes()


def test_the_transformer_of_a_pipeline_is_found(published, tmp_path):
    (tmp_path / "pipeline").mkdir()
    converted(published, tmp_path / "pipeline" / "transformer", "diffusers", *HEADS)
    back = converted(tmp_path / "pipeline", tmp_path / "back.safetensors", "safetensors")
    assert back.read_bytes() == published.read_bytes()


def test_rates_of_time_are_whose_they_are_asked_for(published, tmp_path, capsys):
    made = converted(published, tmp_path / "run", "run", *HEADS, "--time-divisor", 127)
    stored = json.loads((made / "config.json").read_text())
    assert stored["model"]["dit"]["time_divisor"] == 127
    # The authors' code has 128 and their files do not say: only Diffusers' class has 127.
    said = refused(capsys, made, tmp_path / "wrong.safetensors", "safetensors")
    assert "dit.time_divisor is 127, not 128" in said
    folder = converted(made, tmp_path / "folder", "diffusers")
    back = converted(folder, tmp_path / "back.safetensors", "safetensors")
    assert back.read_bytes() == published.read_bytes()


def test_a_run_is_one_that_verbs_open(published, tmp_path):
    made = converted(published, tmp_path / "run", "run", *HEADS)
    checkpointer, step = open_run(made)
    config = stored_config(checkpointer.config(step), made)
    assert step == 0 and config == dit_files.run_config(
        authors_arrays()[0], str(made), LatentCodecConfig(h=8, w=8)
    )
    assert json.loads((made / "config.json").read_text()) == checkpointer.config(step)
    shapes, shardings = convert._abstract(config, config.mesh)
    params = checkpointer.restore_ema(step, shapes, shardings)
    arrays = interop.read_safetensors(published)
    jax.tree.map(np.testing.assert_array_equal, params, authors_arrays()[1].read(arrays, "a"))
    assert make_mesh(config.mesh).shape["data"] == 8


def test_sit_is_a_flow_and_its_last_layer_turned(published, tmp_path):
    made = converted(published, tmp_path / "run", "run", *HEADS, "--family", "sit")
    checkpointer, step = open_run(made)
    config = stored_config(checkpointer.config(step), made)
    assert config.diffusion.path.kind == "rectified_flow" and config.sampling.solver == "sde"
    assert (config.model.dit.time_scale, config.model.dit.time_offset) == (-1, 1)
    shapes, shardings = convert._abstract(config, config.mesh)
    final = checkpointer.restore_ema(step, shapes, shardings)["params"]["dit"]["final"]
    plain = authors_arrays()[1].read(interop.read_safetensors(published), "a")["params"]["dit"][
        "final"
    ]
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, -b), final, plain)
    back = converted(made, tmp_path / "back.safetensors", "safetensors")
    assert back.read_bytes() == published.read_bytes()


@pytest.mark.parametrize("family", ["dit", "sit"])
def test_the_config_is_the_papers(family):
    config = dit_files.run_config(authors_arrays(family)[0], "run", LatentCodecConfig(h=8, w=8))
    assert config.sampling.steps == 250 and config.sampling.height == 64
    assert config.sampling.cfg_channels == 3  # so the code of both samples
    diffusion = config.diffusion
    if family == "dit":
        assert (diffusion.path.kind, diffusion.path.betas) == ("ddpm", "linear")
        assert (diffusion.prediction, diffusion.variance) == ("eps", "learned_range")
    else:
        assert (diffusion.prediction, diffusion.path.kind) == ("velocity", "rectified_flow")


def test_a_training_checkpoint_gives_its_average_or_what_is_asked_for(published, tmp_path):
    arrays = interop.read_safetensors(published)
    both = {f"ema.{key}": array for key, array in arrays.items()}
    bias = "final_layer.linear.bias"
    both |= {f"model.{key}": array + (key == bias) for key, array in arrays.items()}
    interop.write_safetensors(tmp_path / "state.safetensors", both)
    average = converted(
        tmp_path / "state.safetensors", tmp_path / "a.safetensors", "safetensors", *HEADS
    )
    assert average.read_bytes() == published.read_bytes()
    more = (*HEADS, "--part", "model")
    found = interop.read_safetensors(
        converted(tmp_path / "state.safetensors", tmp_path / "b.safetensors", "safetensors", *more)
    )
    np.testing.assert_array_equal(found[bias], arrays[bias] + 1)


def test_half_precision_is_written_where_asked_for(published, tmp_path):
    more = (*HEADS, "--dtype", "bfloat16")
    folder = converted(published, tmp_path / "half", "diffusers", *more)
    arrays = interop.read_weights(folder)[0]
    assert {array.dtype.name for array in arrays.values()} == {"bfloat16"}
    made = converted(folder, tmp_path / "run", "run")
    back = converted(made, tmp_path / "back", "diffusers", "--dtype", "bfloat16")
    name = "diffusion_pytorch_model.safetensors"
    assert (folder / name).read_bytes() == (back / name).read_bytes()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_half_precision_file_is_read_back(published, tmp_path, dtype):
    half = converted(
        published, tmp_path / "half.safetensors", "safetensors", *HEADS, "--dtype", dtype
    )
    made = converted(half, tmp_path / "run", "run", *HEADS)
    back = converted(made, tmp_path / "back.safetensors", "safetensors", "--dtype", dtype)
    assert back.read_bytes() == half.read_bytes()


def test_an_autoencoder_is_written_by_either_names(autoencoder, tmp_path):
    old = converted(autoencoder, tmp_path / "old", "diffusers", "--old-names")
    names = set(interop.read_weights(old)[0])
    assert {f"decoder.mid_block.attentions.0.{n}.bias" for n in OLD_ATTENTION.values()} <= names
    again = converted(old, tmp_path / "again", "diffusers")
    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        assert (again / name).read_bytes() == (autoencoder / name).read_bytes()
    assert run("--input", old, "--output", tmp_path / "x", "--to", "run") == 2


@pytest.mark.parametrize("family", ["dit", "sit"])
def test_a_run_is_sampled_through_its_codec(published, autoencoder, tmp_path, family):
    more = (*HEADS, "--family", family, "--codec", autoencoder)
    made = converted(published, tmp_path / "run", "run", *more)
    checkpointer, step = open_run(made)
    config = stored_config(checkpointer.config(step), made)
    assert (config.codec.path, config.codec.h, config.sampling.height) == (str(autoencoder), 2, 16)
    given = ["--checkpoint", made, "--label", 3, 9, "--output", tmp_path / "two.png", "--steps", 2]
    assert sample.main([str(one) for one in given]) == 0
    assert read_video(tmp_path / "two.png")[0].std() > 0
    other = converted(published, tmp_path / "other.safetensors", "safetensors", *HEADS)
    assert (
        converted(made, tmp_path / "back.safetensors", "safetensors").read_bytes()
        == other.read_bytes()
    )


class Hostile:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def refused(capsys, source: Path, target: Path, kind: str, *more: object) -> str:
    """What is said; nothing is left behind."""
    before = sorted(target.parent.rglob("*"))
    assert run("--input", source, "--output", target, "--to", kind, *more) == 2
    assert sorted(target.parent.rglob("*")) == before
    return capsys.readouterr().err


def test_a_malicious_file_does_not_run(tmp_path, capsys):
    with zipfile.ZipFile(tmp_path / "bad.pt", "w") as file:
        file.writestr("archive/data.pkl", pickle.dumps({"x": Hostile(tmp_path / "ran")}, 2))
    said = refused(capsys, tmp_path / "bad.pt", tmp_path / "run", "run")
    assert "names posix.mkdir" in said and "nothing of it was run" in said
    assert not (tmp_path / "ran").exists()


def test_what_is_wrong_is_said_before_anything_is_written(published, tmp_path, capsys):
    target = tmp_path / "out"
    assert "none.safetensors' is not there" in refused(
        capsys, tmp_path / "none.safetensors", target, "run"
    )
    assert "exists: move it away" in refused(capsys, published, published, "safetensors")
    assert "ends in .safetensors" in refused(capsys, published, target, "safetensors")
    assert "looks like a file" in refused(capsys, published, tmp_path / "a.safetensors", "run")
    vae = tmp_path / "vae"
    interop.write_folder(vae, diffusers_config(image_config(latent_channels=8)), {})
    said = refused(capsys, published, target, "run", *HEADS, "--codec", vae)
    assert "latents of 8 channels, and the model makes 4" in said
    assert "number with --heads" in refused(capsys, published, target, "run")
    assert "weights under 'model.'" in refused(capsys, published, target, "run", "--part", "model")
    (tmp_path / "text.txt").write_text("a")
    assert "is not a file of weights" in refused(capsys, tmp_path / "text.txt", target, "run")
    (tmp_path / "empty").mkdir()
    assert "config.json' is not there" in refused(capsys, tmp_path / "empty", target, "run")
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(published.read_bytes()[:10000])
    assert "truncated" in refused(capsys, cut, target, "run", *HEADS)


def test_weights_that_are_not_finite_are_refused_by_name(published, tmp_path, capsys):
    arrays = {key: np.array(array) for key, array in interop.read_safetensors(published).items()}
    arrays["blocks.1.attn.proj.bias"][3] = np.inf
    interop.write_safetensors(tmp_path / "bad.safetensors", arrays)
    for kind, target in (("run", "run"), ("diffusers", "folder")):
        said = refused(capsys, tmp_path / "bad.safetensors", tmp_path / target, kind, *HEADS)
        assert "bad.safetensors' holds NaN or infinite values in blocks.1.attn.proj.bias:" in said


def test_a_run_that_is_not_finite_is_not_published(published, tmp_path, capsys, monkeypatch):
    made = converted(published, tmp_path / "run", "run", *HEADS)
    restore = Checkpointer.restore_ema

    def broken(*arguments):
        params = restore(*arguments)
        final = params["params"]["dit"]["final"]
        final["bias"] = final["bias"] * np.nan
        return params

    monkeypatch.setattr(Checkpointer, "restore_ema", broken)
    said = refused(capsys, made, tmp_path / "a.safetensors", "safetensors")
    assert "NaN or infinite" in said and "'params/dit/final/bias'" in said


def test_storage_that_fails_is_not_told_as_wrong_input(published, tmp_path, capsys):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    target = tmp_path / "new" / "a.safetensors"
    try:
        status = run("--input", published, "--output", target, "--to", "safetensors", *HEADS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    said = capsys.readouterr().err
    assert status == 1 and "File too large" in said and "Traceback" not in said
    assert list(target.parent.iterdir()) == []


def test_files_and_folders_lie_on_cloud_storage(published, tmp_path, bucket, capsys):
    place = f"{bucket}/converted"
    write_whole(f"{place}/DiT.safetensors", published.read_bytes())
    for name, kind, more in (
        ("folder", "diffusers", HEADS),
        ("back.safetensors", "safetensors", ()),
    ):
        source = f"{place}/folder" if name == "back.safetensors" else f"{place}/DiT.safetensors"
        assert run("--input", source, "--output", f"{place}/{name}", "--to", kind, *more) == 0
    assert as_path(f"{place}/back.safetensors").read_bytes() == published.read_bytes()
    local = converted(published, tmp_path / "folder", "diffusers", *HEADS)
    for file in local.iterdir():
        assert as_path(f"{place}/folder/{file.name}").read_bytes() == file.read_bytes()
    capsys.readouterr()
    existing = ("--output", f"{place}/back.safetensors", "--to", "safetensors", *HEADS)
    assert run("--input", published, *existing) == 2 and "exists" in capsys.readouterr().err
    missing = ("--output", "gs://nobody-has-this/a.safetensors", "--to", "safetensors", *HEADS)
    assert run("--input", published, *missing) == 2
    said = capsys.readouterr().err
    assert "gs://nobody-has-this" in said and said.count("\n") == 1


def test_paths_in_a_stored_config_are_absolute(published, tmp_path, monkeypatch):
    config = tiny_images(4, 4, 4, 4)
    vae = tmp_path / "vae"
    interop.write_folder(vae, diffusers_config(config), {})
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    given = ("--output", "~/run", "--to", "run", "--codec", vae.name, *HEADS)
    assert run("--input", published.name, *given) == 0
    stored = json.loads((tmp_path / "home" / "run" / "config.json").read_text())
    assert stored["output"] == str(tmp_path / "home" / "run")
    assert stored["codec"]["path"] == str(vae) and not (tmp_path / "~").exists()


def test_every_mismatch_of_a_file_is_listed(published, tmp_path, capsys):
    arrays = interop.read_safetensors(published)
    del arrays["blocks.0.attn.proj.bias"]
    arrays["final_layer.linear.bias"] = np.zeros(3, np.float32)
    interop.write_safetensors(tmp_path / "other.safetensors", arrays)
    said = refused(capsys, tmp_path / "other.safetensors", tmp_path / "run", "run", *HEADS)
    assert "  blocks.0.attn.proj.bias: absent\n" in said
    assert "  final_layer.linear.bias: shape (3,), wanted (32,)\n" in said


def test_a_model_that_is_not_as_published_stays_a_run(published, tmp_path, capsys, monkeypatch):
    def other(file, output, codec):
        dit = dataclasses.replace(file.model.dit, time_offset=0.0)
        model = dataclasses.replace(file.model, dit=dit)
        return dataclasses.replace(plain(file, output, codec), model=model)

    plain = dit_files.run_config
    monkeypatch.setattr(dit_files, "run_config", other)
    made = converted(published, tmp_path / "run", "run", *HEADS)
    assert "keep this model as a run" in refused(
        capsys, made, tmp_path / "a.safetensors", "safetensors"
    )
    assert "is a run already" in refused(capsys, made, tmp_path / "b", "run")


@pytest.mark.parametrize("family", ["dit", "sit"])
def test_a_run_of_another_objective_stays_a_run(published, tmp_path, capsys, monkeypatch, family):
    plain, other = dit_files.run_config, {"dit": "sit", "sit": "dit"}[family]

    def swapped(file, output, codec):
        """The network of one family, trained and sampled as the other is."""
        objective = plain(dataclasses.replace(file, family=other), output, codec)
        return dataclasses.replace(objective, model=file.model)

    monkeypatch.setattr(dit_files, "run_config", swapped)
    made = converted(published, tmp_path / "run", "run", *HEADS, "--family", family)
    for target, kind in (("a.safetensors", "safetensors"), ("folder", "diffusers")):
        said = refused(capsys, made, tmp_path / target, kind)
        assert f"has the clock of {family.upper()}" in said and "keep this model as a run" in said
