"""The verb: through files on disk and back, and errors before anything is written."""

import dataclasses
import json
import os
import pickle
import resource
import shutil
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

HEADS = ("--heads", 4)
WEIGHTS = "diffusion_pytorch_model.safetensors"


def run(source: object, target: object, kind: str, *more: object) -> int:
    arguments = ("--input", source, "--output", target, "--to", kind, *more)
    return convert.main([str(argument) for argument in arguments])


def converted(source: Path, target: Path, kind: str, *more: object) -> Path:
    assert run(source, target, kind, *more) == 0
    assert not list(target.parent.glob(".*")), "something was left beside the output"
    return target


def refused(capsys, source: Path, target: Path, kind: str, *more: object) -> str:
    """What is said; nothing is left behind."""
    before = sorted(target.parent.rglob("*"))
    assert run(source, target, kind, *more) == 2
    assert sorted(target.parent.rglob("*")) == before
    return capsys.readouterr().err


def same_folders(one: Path, other: Path) -> None:
    for name in ("config.json", WEIGHTS):
        assert (one / name).read_bytes() == (other / name).read_bytes()


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Path:
    """A small file in the authors' layout."""
    _, table, arrays = authors_arrays()
    path = tmp_path_factory.mktemp("published") / "DiT.safetensors"
    interop.write_safetensors(path, table.export(table.read(arrays, "made")))
    return path


@pytest.fixture(scope="module")
def as_run(published, tmp_path_factory) -> Path:
    return converted(published, tmp_path_factory.mktemp("runs") / "run", "run", *HEADS)


@pytest.fixture
def autoencoder(tmp_path: Path) -> Path:
    """A folder of a small autoencoder, two pixels to a latent."""
    return write_images(tmp_path / "vae", tiny_images(4, 8))


def stored(run: Path):
    """The config of a run, and its parameters."""
    checkpointer, step = open_run(run)
    values = checkpointer.config(step)
    assert step == 0 and json.loads((run / "config.json").read_text()) == values
    config = stored_config(values, run)
    params = checkpointer.restore_ema(step, *convert._abstract(config, config.mesh))
    checkpointer.close()
    return config, params


def test_a_file_becomes_a_run_that_verbs_open_and_comes_back(published, as_run, tmp_path):
    config, params = stored(as_run)
    file, table, _ = authors_arrays()
    assert config == dit_files.run_config(file, str(as_run), LatentCodecConfig(h=8, w=8))
    arrays = interop.read_safetensors(published)
    jax.tree.map(np.testing.assert_array_equal, params, table.read(arrays, "a"))
    assert make_mesh(config.mesh).shape["data"] == 8
    back = converted(as_run, tmp_path / "back.safetensors", "safetensors")
    assert back.read_bytes() == published.read_bytes()


def test_a_folder_becomes_a_run_and_comes_back_byte_for_byte(published, as_run, tmp_path):
    """Also that of a pipeline, in which it is the transformer."""
    (tmp_path / "pipeline").mkdir()
    folder = converted(published, tmp_path / "pipeline" / "transformer", "diffusers", *HEADS)
    as_folder = converted(tmp_path / "pipeline", tmp_path / "run", "run")
    again = converted(as_folder, tmp_path / "again", "diffusers")
    same_folders(folder, again)
    back = converted(again, tmp_path / "back.safetensors", "safetensors")
    assert back.read_bytes() == published.read_bytes()


def test_rates_of_time_are_whose_they_are_asked_for(published, tmp_path, capsys):
    other = converted(published, tmp_path / "run", "run", *HEADS, "--time-divisor", 127)
    values = json.loads((other / "config.json").read_text())
    assert values["model"]["dit"]["time_divisor"] == 127
    # The authors' code has 128 and their files do not say: only Diffusers' class has 127.
    said = refused(capsys, other, tmp_path / "wrong.safetensors", "safetensors")
    assert "dit.time_divisor is 127, not 128" in said
    folder = converted(other, tmp_path / "folder", "diffusers")
    back = converted(folder, tmp_path / "back.safetensors", "safetensors")
    assert back.read_bytes() == published.read_bytes()


def test_sit_is_a_flow_and_its_last_layer_turned(published, tmp_path):
    sit = converted(published, tmp_path / "run", "run", *HEADS, "--family", "sit")
    config, params = stored(sit)
    assert config.diffusion.path.kind == "rectified_flow" and config.sampling.solver == "sde"
    assert (config.model.dit.time_scale, config.model.dit.time_offset) == (-1, 1)
    plain = authors_arrays()[1].read(interop.read_safetensors(published), "a")
    final, other = (one["params"]["dit"]["final"] for one in (params, plain))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, -b), final, other)
    back = converted(sit, tmp_path / "back.safetensors", "safetensors")
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
    arrays, bias = interop.read_safetensors(published), "final_layer.linear.bias"
    both = {f"ema.{key}": array for key, array in arrays.items()}
    both |= {f"model.{key}": array + (key == bias) for key, array in arrays.items()}
    state = tmp_path / "state.safetensors"
    interop.write_safetensors(state, both)
    average = converted(state, tmp_path / "a.safetensors", "safetensors", *HEADS)
    assert average.read_bytes() == published.read_bytes()
    more = (*HEADS, "--part", "model")
    found = converted(state, tmp_path / "b.safetensors", "safetensors", *more)
    np.testing.assert_array_equal(interop.read_safetensors(found)[bias], arrays[bias] + 1)


def test_half_precision_is_written_where_asked_for(published, tmp_path):
    """And a run that is made of it gives it back."""
    half = ("--dtype", "bfloat16")
    folder = converted(published, tmp_path / "half", "diffusers", *HEADS, *half)
    arrays = interop.read_weights(folder)[0]
    assert {array.dtype.name for array in arrays.values()} == {"bfloat16"}
    as_folder = converted(folder, tmp_path / "run", "run")
    same_folders(folder, converted(as_folder, tmp_path / "back", "diffusers", *half))


def test_an_autoencoder_is_written_by_either_names(autoencoder, tmp_path):
    old = converted(autoencoder, tmp_path / "old", "diffusers", "--old-names")
    names = set(interop.read_weights(old)[0])
    assert {f"decoder.mid_block.attentions.0.{n}.bias" for n in OLD_ATTENTION.values()} <= names
    same_folders(autoencoder, converted(old, tmp_path / "again", "diffusers"))


@pytest.mark.parametrize("family", ["dit", pytest.param("sit", marks=pytest.mark.slow)])
def test_a_run_is_sampled_through_its_codec(published, autoencoder, tmp_path, one_device, family):
    more = (*HEADS, "--family", family, "--codec", autoencoder)
    with_codec = converted(published, tmp_path / "run", "run", *more)
    config, _ = stored(with_codec)
    assert (config.codec.path, config.codec.h, config.sampling.height) == (str(autoencoder), 2, 16)
    given = ["--checkpoint", with_codec, "--label", 3, 9, "--steps", 2]
    given += ["--output", tmp_path / "two.png"]
    assert sample.main([str(one) for one in given]) == 0
    assert read_video(tmp_path / "two.png")[0].std() > 0


# Refusals.


class Hostile:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def test_what_is_wrong_is_said_before_anything_is_written(published, tmp_path, capsys):
    cut, text, bad = (tmp_path / name for name in ("cut.safetensors", "text.txt", "bad.pt"))
    cut.write_bytes(published.read_bytes()[:10000])
    text.write_text("a")
    with zipfile.ZipFile(bad, "w") as file:
        file.writestr("archive/data.pkl", pickle.dumps({"x": Hostile(tmp_path / "ran")}, 2))
    (tmp_path / "empty").mkdir()
    vae = ("--codec", tmp_path / "vae")
    interop.write_folder(vae[1], diffusers_config(image_config(latent_channels=8)), {})
    out, none = tmp_path / "out", tmp_path / "none.safetensors"
    for source, target, kind, more, said in (
        (none, out, "run", (), "none.safetensors' is not there"),
        (published, published, "safetensors", (), "exists: move it away"),
        (published, out, "safetensors", (), "ends in .safetensors"),
        (published, tmp_path / "a.safetensors", "run", (), "looks like a file"),
        (published, out, "run", (*HEADS, *vae), "of 8 channels, and the model makes 4"),
        (published, out, "run", (), "number with --heads"),
        (published, out, "run", ("--part", "model"), "weights under 'model.'"),
        (published, out, "codec", HEADS, "is no codec, and --to is 'codec'"),
        (text, out, "run", (), "is not a file of weights"),
        (tmp_path / "empty", out, "run", (), "config.json' is not there"),
        (cut, out, "run", HEADS, "truncated"),
        (bad, out, "run", (), "names posix.mkdir"),
    ):
        assert said in refused(capsys, source, target, kind, *more)
    assert not (tmp_path / "ran").exists()


def test_weights_that_are_not_finite_are_refused_by_name(published, tmp_path, capsys):
    arrays = {key: np.array(array) for key, array in interop.read_safetensors(published).items()}
    arrays["blocks.1.attn.proj.bias"][3] = np.inf
    interop.write_safetensors(tmp_path / "bad.safetensors", arrays)
    for kind, target in (("run", "run"), ("diffusers", "folder")):
        said = refused(capsys, tmp_path / "bad.safetensors", tmp_path / target, kind, *HEADS)
        assert "bad.safetensors' holds NaN or infinite values in blocks.1.attn.proj.bias:" in said


def test_a_run_that_is_not_finite_is_not_published(as_run, tmp_path, capsys, monkeypatch):
    restore = Checkpointer.restore_ema

    def broken(*arguments):
        params = restore(*arguments)
        final = params["params"]["dit"]["final"]
        final["bias"] = final["bias"] * np.nan
        return params

    monkeypatch.setattr(Checkpointer, "restore_ema", broken)
    said = refused(capsys, as_run, tmp_path / "a.safetensors", "safetensors")
    assert "NaN or infinite" in said and "'params/dit/final/bias'" in said
    assert "is a run already" in refused(capsys, as_run, tmp_path / "b", "run")


def test_storage_that_fails_is_not_told_as_wrong_input(published, tmp_path, capsys):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    target = tmp_path / "new" / "a.safetensors"
    try:
        status = run(published, target, "safetensors", *HEADS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    said = capsys.readouterr().err
    assert status == 1 and "File too large" in said and "Traceback" not in said
    assert list(target.parent.iterdir()) == []


def test_files_and_folders_lie_on_cloud_storage(published, tmp_path, bucket, capsys):
    place = f"{bucket}/converted"
    write_whole(f"{place}/DiT.safetensors", published.read_bytes())
    assert run(f"{place}/DiT.safetensors", f"{place}/folder", "diffusers", *HEADS) == 0
    assert run(f"{place}/folder", f"{place}/back.safetensors", "safetensors") == 0
    assert as_path(f"{place}/back.safetensors").read_bytes() == published.read_bytes()
    local = converted(published, tmp_path / "folder", "diffusers", *HEADS)
    for file in local.iterdir():
        assert as_path(f"{place}/folder/{file.name}").read_bytes() == file.read_bytes()
    capsys.readouterr()
    for target, said in (
        (f"{place}/back.safetensors", "exists"),
        ("gs://nobody-has-this/a.safetensors", "gs://nobody-has-this"),
    ):
        assert run(published, target, "safetensors", *HEADS) == 2
        text = capsys.readouterr().err
        assert said in text and text.count("\n") == 1


def test_paths_in_a_stored_config_are_absolute(published, tmp_path, monkeypatch):
    vae = tmp_path / "vae"
    write_images(vae, tiny_images(4, 4, 4, 4))
    shutil.copy(published, tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    assert run(published.name, "~/run", "run", "--codec", vae.name, *HEADS) == 0
    values = json.loads((tmp_path / "home" / "run" / "config.json").read_text())
    assert values["output"] == str(tmp_path / "home" / "run")
    assert values["codec"]["path"] == str(vae) and not (tmp_path / "~").exists()


def other_clock(plain, file, *rest):
    dit = dataclasses.replace(file.model.dit, time_offset=0.0)
    model = dataclasses.replace(file.model, dit=dit)
    return dataclasses.replace(plain(file, *rest), model=model)


def other_objective(plain, file, *rest):
    """The network of one family, trained and sampled as the other is."""
    other = {"dit": "sit", "sit": "dit"}[file.family]
    objective = plain(dataclasses.replace(file, family=other), *rest)
    return dataclasses.replace(objective, model=file.model)


@pytest.mark.parametrize(
    "change, family, target, kind, said",
    [
        (other_clock, "dit", "a.safetensors", "safetensors", "time_offset are (1000.0, 0.0)"),
        (other_objective, "dit", "a.safetensors", "safetensors", "has the clock of DIT"),
        (other_objective, "sit", "folder", "diffusers", "has the clock of SIT"),
    ],
)
def test_a_model_that_is_not_as_published_stays_a_run(
    published, tmp_path, capsys, monkeypatch, change, family, target, kind, said
):
    plain = dit_files.run_config
    monkeypatch.setattr(dit_files, "run_config", lambda *given: change(plain, *given))
    other = converted(published, tmp_path / "run", "run", *HEADS, "--family", family)
    text = refused(capsys, other, tmp_path / target, kind)
    assert said in text and "keep this model as a run" in text
