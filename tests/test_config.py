"""The configuration: what the command line says, what is refused and how, and JSON and back."""

import dataclasses
import functools
import json
import re
import time
from functools import partial
from pathlib import Path

import jax
import pytest

from dit_jax.codec.config import LatentCodecConfig
from dit_jax.codec.run import CodecRun
from dit_jax.config import (
    DataConfig,
    Run,
    VideoRun,
    differences,
    from_dict,
    load_config,
    parse_config,
    read_config,
    stored_config,
    to_dict,
)
from dit_jax.data import RecordsConfig, ShapesConfig
from dit_jax.model import DiTConfig
from dit_jax.parallel import MeshConfig, make_mesh
from dit_jax.training import CheckpointConfig, HeldOutLoss
from dit_jax.training.video_task import init_params, make_model
from tests.stored import with_value

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted(file.stem for file in ROOT.glob("configs/*.py"))
QUICKSTART = ROOT / "configs" / "quickstart.py"
PROG = "python -m dit_jax.train"


def parse(*arguments):
    return parse_config([str(one) for one in arguments], PROG, "Trains a model.", Run)


@functools.cache
def built(name="quickstart"):
    """What a file of ``configs/`` builds."""
    return load_config(str(ROOT / "configs" / f"{name}.py"), Run)


@pytest.fixture
def refused(capsys):
    """``refused(arguments...)``: what is said when these are refused, without tyro's frame."""

    def run(*arguments):
        clock = time.perf_counter()
        with pytest.raises(SystemExit) as error:
            parse(*arguments)
        said = capsys.readouterr()
        assert error.value.code == 2 and not said.out and "Traceback" not in said.err
        assert time.perf_counter() - clock < 20  # nothing was read or compiled
        return " ".join(re.sub("[╭─╮│╰╯]", " ", said.err).split())

    return run


# What is said.


def test_file_alone_is_what_it_builds():
    config = parse("--config", QUICKSTART)
    assert config == parse(f"--config={QUICKSTART}")
    assert parse("--steps", 9, "--config", QUICKSTART).steps == 9
    assert config == built()
    assert config.data.packing.row_tokens == 128 and config.model.patch.h == 8


def test_dotted_names_override_the_file():
    config = parse(
        *("--config", QUICKSTART, "--steps", 7, "--output", "runs/x", "--seed", 3),
        *("--optimizer.learning-rate", "3e-4", "--optimizer.schedule", "constant"),
        *("--model.dit.width", 64, "--model.dit.remat", "full", "--mesh.tensor", 2),
        *("--data.packing.rows", 16, "--data.source.frames", 3, 5, "--checkpoint.keep-period", 500),
        *("--diffusion.time.shift", 2, "--model.dit.scan", "True"),
    )
    assert (config.steps, config.output, config.seed) == (7, "runs/x", 3)
    assert config.optimizer.learning_rate == 3e-4 and config.optimizer.schedule == "constant"
    assert config.model.dit == dataclasses.replace(
        built().model.dit, width=64, remat="full", scan=True
    )
    assert config.mesh == MeshConfig(tensor=2) and config.data.packing.rows == 16
    assert isinstance(config.data.source, ShapesConfig) and config.data.source.frames == (3, 5)
    assert config.checkpoint.keep_period == 500 and config.diffusion.time.shift == 2.0


def linear(inputs, outputs):
    return inputs * outputs + outputs


@pytest.mark.parametrize(
    ("name", "d", "hidden", "depth", "heads", "about"),
    [
        ("video_1b3", 1536, 8960, 30, 12, 1.4e9),
        ("video_14b", 5120, 13_824, 40, 40, 1.4e10),
    ],
)
def test_configs_have_the_parameters_that_their_names_say(name, d, hidden, depth, heads, about):
    config = built(name)
    model = make_model(config.model, make_mesh(MeshConfig(), jax.devices()[:1]))
    shapes = jax.eval_shape(lambda key: init_params(model, key), jax.random.key(0))
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes))

    patch, text, norms = 1 * 2 * 2 * 16, 4096, 2 * d // heads
    self_attention = linear(d, 3 * d) + linear(d, d) + norms
    cross_attention = linear(d, d) + linear(d, 2 * d) + linear(d, d) + norms
    table, mlp = 6 * d, linear(d, hidden) + linear(hidden, d)
    ends = linear(patch, d) + linear(d, patch) + linear(d, 2 * d)
    condition = linear(256, d) + linear(d, d) + linear(d, 6 * d)
    states = linear(text, d) + linear(d, d)
    layers = depth * (self_attention + cross_attention + mlp + table)
    assert count == layers + ends + condition + states
    assert abs(count / about - 1) < 0.04


@pytest.mark.parametrize("name", ["video_1b3", "video_14b"])
def test_a_clip_of_the_video_configs_fills_a_row(name):
    config = built(name)
    made, packing = config.sampling, config.data.packing
    # 81 frames of 480 x 832 in a codec of 4 x 8 x 8, and patches of 1 x 2 x 2.
    assert (made.frames, made.height, made.width) == (1 + 80 // 4, 480 // 8, 832 // 8)
    tokens = config.model.patch.num_tokens(made.frames, made.height, made.width)
    assert tokens == 21 * 30 * 52 == 32_760
    # The next multiple of the kernels' 128.
    assert packing.row_tokens == -(-tokens // 128) * 128 == 32_768
    assert packing.row_text == config.model.text.max_tokens


def test_a_minute_is_one_row():
    config = built("minute_1080p")
    made, dit = config.sampling, config.model.dit
    tokens = config.model.patch.num_tokens(made.frames, made.height, made.width)
    assert tokens == (1 + 60 * 24 // 4) * 68 * 120 == 2_945_760
    assert 0 <= config.data.packing.row_tokens - tokens < 65_536
    assert dit.window == 4 * 68 * 120 and dit.depth % dit.global_every == 0
    assert dataclasses.replace(dit, window=None) == built("video_1b3").model.dit


def test_imagenet_is_one_image_a_row():
    config = built("dit_xl2_imagenet256")
    made, packing, dit = config.sampling, config.data.packing, config.model.dit
    size = config.codec.latent_size(made.frames, made.height, made.width)
    assert config.model.patch.num_tokens(*size) == 16 * 16 == packing.row_tokens
    assert (packing.rows, dit.width, dit.depth, dit.heads) == (256, 1152, 28, 16)


@pytest.mark.parametrize("given", [["-h"], ["--config", QUICKSTART, "--help"]])
def test_help(given, capsys):
    with pytest.raises(SystemExit) as error:
        parse(*given)
    assert error.value.code == 0
    said = capsys.readouterr()
    assert not said.err
    text = " ".join(re.sub("[╭─╮│╰╯]", " ", said.out).split())
    for words in (
        "usage: python -m dit_jax.train --config FILE",
        "Trains a model.",
        "Directory of the run: checkpoints, logs and samples. A run found there is resumed.",
        "--optimizer.learning-rate FLOAT",
        "Peak, reached after the warm-up.",
        "--optimizer.schedule {constant,cosine}",
        "--data.packing.row-tokens INT",
        "Tokens of a row; several clips and images share one.",
        "Devices along each axis; one of them may be -1",
    ):
        assert words in text, words
    shown = "(default: 2100)" if QUICKSTART in given else "(default: 1000)"
    assert shown in text


# What is refused.


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ("--optimizer.learning-rat 1", ["Unrecognized", "rning-rat", "--optimizer.learning-rate"]),
        ("--setps 1", ["--setps", "--steps"]),
        ("--steps 1.5", ["'1.5'", "--steps INT"]),
        ("--optimizer.learning-rate big", ["'big'", "--optimizer.learning-rate"]),
        ("--optimizer.weight-decay nan", ["optimizer.weight_decay is nan"]),
        ("--optimizer.schedule linear", ["linear", "constant", "cosine"]),
        ("--steps", ["--steps"]),
        ("--steps 0", ["steps is 0: it is at least 1"]),
        ("--evaluators.1.prompts -1", ["evaluators[1].prompts is -1: it is at least 0"]),
        ("--mesh.data 0", ["mesh.data is 0", "at least 1"]),
    ],
)
def test_mistyped_argument_is_refused(refused, arguments, parts):
    message = refused("--config", QUICKSTART, *arguments.split())
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("name", "value", "parts"),
    [
        ("seed", -1, ["seed is -1: it is in [0, 4294967295]"]),
        ("seed", 2**32, [f"seed is {2**32}: it is in"]),
        ("optimizer.accumulate", 3, ["packing.rows 16 does not", "accumulate 3"]),
        ("optimizer.b2", 1.0, ["optimizer.b2 is 1.0: it is in [0, 1)"]),
        ("optimizer.kind", "sgd", ["kind is 'sgd': it is one of"]),
        ("attention.kernel", "flsh", ["kernel is 'flsh'", "'flash'"]),
        (
            "data.packing.row_text",
            40,
            ["row_text 40 is smaller than one caption of 48 tokens", "raise it, or lower"],
        ),
        (
            "data.packing.row_tokens",
            60,
            ["row_tokens 60 is smaller than one clip: 9 x 32 x 32 has", "Raise it to at least"],
        ),
        (
            "data.source.image_sizes",
            [[160, 160]],
            ["row_tokens 128 is smaller than one clip: 1 x 160 x 160 has 4"],
        ),
        ("model.patch.channels", 4, ["model.patch.channels is 4: moving shapes have 3"]),
        ("sampling.frames", 8, ["sampling.frames, height, width = (8, 32, 32)", "7 and 9"]),
        ("data.source.frames", [4], ["4 frames", "The nearest are 3 and 5"]),
        ("data.source.frames", [1, 5], ["frames[0] is 1: it is at least 2"]),
        ("data.source.sizes", [[36, 36]], ["not a multiple of the patch's 8", "32 and 40"]),
        ("model.dit.heads", 5, ["dit.width is 192", "a multiple of heads 5"]),
        ("diffusion.caption_dropout", 1, ["caption_dropout is 1"]),
        ("diffusion.min_t", 0.0, ["diffusion.min_t is 0.0"]),
        ("sampling.cfg_scale", -1, ["sampling.cfg_scale is -1"]),
        ("sampling.shift", 0.0, ["sampling.shift is 0.0", "above 0"]),
    ],
)
def test_bad_value_is_refused(name, value, parts):
    with pytest.raises(ValueError) as error:
        from_dict(VideoRun, with_value(built(), name, value))
    for part in parts:
        assert part in str(error.value)


def test_sizes_of_images_that_are_not_drawn_do_not_matter():
    source = ShapesConfig(frames=(3,), image_sizes=((160, 160),), image_fraction=0.0)
    config = dataclasses.replace(built(), data=DataConfig(source, built().data.packing))
    assert config.data.source == source


def test_values_of_others_are_refused():
    with pytest.raises(ValueError, match="-1"):
        make_mesh(MeshConfig(-1, -1))
    with pytest.raises(ValueError, match="path is empty"):
        RecordsConfig(path="")


def test_config_file_is_required(refused):
    assert "--config FILE is required" in refused("--steps", "3")
    assert "--config" in refused("--steps", "3", "--config")


def test_a_file_that_is_no_config_is_refused(refused, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    message = refused("--config", "configs/quickstar.py")
    assert "--config 'configs/quickstar.py' is not a Python file" in message
    assert "configs/quickstart.py" in message
    file = tmp_path / "mine.yaml"
    file.write_text("steps: 3\n")
    assert "is not a Python file" in refused("--config", file)


# JSON and back.


def unusual():
    base, template = built(), {"caption_template": "a {label}", "label_names": ("x", "é")}
    return dataclasses.replace(
        base,
        data=DataConfig(RecordsConfig(path="a/b", data_dir="c", fps_key=None, **template)),
        model=dataclasses.replace(base.model, dit=DiTConfig(scan=True, mlp_dim=7)),
        checkpoint=CheckpointConfig(keep_period=9),
        sampling=dataclasses.replace(base.sampling, shift=1.5),
    )


@pytest.mark.parametrize("name", ["defaults", "unusual", *FILES])
def test_round_trip_through_json(name):
    config = {"defaults": VideoRun, "unusual": unusual}.get(name, partial(built, name))()
    assert isinstance(config, CodecRun if name.startswith("codec") else VideoRun)
    text = json.dumps(to_dict(config))
    again = stored_config(json.loads(text), "run/config.json", type(config))
    assert again == config  # Tuples, not lists.
    kind = type(config.data.source)
    assert type(again.data.source) is kind
    assert json.loads(text)["data"]["source"]["type"] == f"{kind.__module__}:{kind.__name__}"


def test_a_config_of_the_first_edition_is_todays_quickstart():
    """Stored by a run of commit 57ee8cf."""
    file = Path(__file__).with_name("first_edition_config.json")
    changed = {name: before for name, _, before in differences(built(), read_config(file))}
    # What is measured the config file says, and not the run that is resumed.
    assert {name for name in changed if not name.startswith("evaluators.")} == {"output"}
    values = json.loads(file.read_text())
    values["evaluation"]["records_split"] = "test"
    old = stored_config(values, "run/config.json")
    assert old.data.eval_split == "test" and old.evaluators == (HeldOutLoss(),)
    values["codec"]["path"] = "/codec"
    assert stored_config(values, "run/config.json").codec == LatentCodecConfig(path="/codec")
    values["model"]["upscale"] = 2
    with pytest.raises(ValueError, match="'upscale', which ModelConfig .*commit 57ee8cf"):
        stored_config(values, "run/config.json")


def test_fields_that_are_gone_are_left_out_if_nothing_is_lost():
    values = to_dict(VideoRun())
    values["diffusion"]["weighting"] = "none"
    values["diffusion"]["masks"]["levels"] = 16
    assert stored_config(values, "run/config.json") == VideoRun()
    values["diffusion"]["weighting"] = "snr"
    with pytest.raises(ValueError, match="'weighting', which DiffusionConfig does not"):
        stored_config(values, "run/config.json")


def test_absent_fields_get_their_defaults():
    values = to_dict(VideoRun())
    del values["optimizer"]["b2"], values["log"]
    assert from_dict(VideoRun, values) == VideoRun()


def test_differences():
    one = built()
    other = dataclasses.replace(
        one,
        steps=2,
        model=dataclasses.replace(one.model, dit=dataclasses.replace(one.model.dit, width=64)),
        data=dataclasses.replace(one.data, source=RecordsConfig("p")),
    )
    assert list(differences(one, one)) == []
    found = {name: (now, before) for name, now, before in differences(one, other)}
    assert found["steps"] == (2100, 2) and found["model.dit.width"] == (192, 64)
    assert found["data.source.type"] == (
        "dit_jax.data.shapes:ShapesConfig",
        "dit_jax.data.records:RecordsConfig",
    )
    assert found["data.source.path"] == (None, "p")
    assert all(name.split(".")[0] in ("steps", "model", "data") for name in found)
