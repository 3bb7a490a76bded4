"""The configuration of a codec's run: what is refused and how, the command line, JSON and back."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest

from dit_jax.codec.run import CodecEvaluationConfig, CodecRun
from dit_jax.config import (
    CodecConfig,
    Run,
    VideoRun,
    differences,
    load_config,
    parse_config,
    read_config,
    stored_config,
    to_dict,
)
from dit_jax.data import RecordsConfig
from tests.tiny_codec_config import get_config

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "tests" / "tiny_codec_config.py"
MODEL = ROOT / "tests" / "tiny_config.py"
CONFIG = get_config()


def parse(*arguments: object, kind: Any = Run) -> Any:
    return parse_config([str(one) for one in arguments], "train", "Trains.", kind)


def test_any_field_is_given_by_its_dotted_name():
    config = parse(
        *("--config", TINY, "--model.latent-channels", 5, "--loss.kl", 0.5, "--data.crop.rows", 16),
        *("--model.strides", 1, 2, 2, 2, "--model.shortcuts", "True", "--tiles.frames", 2),
    )
    assert isinstance(config, CodecRun)
    assert (config.model.latent_channels, config.loss.kl, config.rows) == (5, 0.5, 16)
    assert config.model.strides == ((1, 2), (2, 2)) and config.model.shortcuts
    assert config.tiles.frames == 2
    said = {name for name, _, _ in differences(config, CONFIG)}
    assert said == {
        "model.latent_channels",
        "model.strides",
        "model.shortcuts",
        "loss.kl",
        "data.crop.rows",
        "tiles.frames",
    }


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--model.width", 4], "--model.width"),
        (["--diffusion.path.kind", "ddpm"], "--diffusion.path.kind"),
        (["--data.crop.frames", 4], "data.crop.frames is 4: the model's stride in time is 4"),
        (["--loss.l1", "much"], "much"),
    ],
)
def test_what_cannot_be_is_refused_on_the_command_line(
    arguments: list[object], said: str, capsys: Any
):
    with pytest.raises(SystemExit) as error:
        parse("--config", TINY, *arguments)
    assert error.value.code == 2
    shown = " ".join(re.sub("[╭─╮│╰╯]", " ", capsys.readouterr().err).split())
    assert said in shown and "Traceback" not in shown


def crop(**change: int) -> dict[str, Any]:
    return {
        "data": dataclasses.replace(
            CONFIG.data, crop=dataclasses.replace(CONFIG.data.crop, **change)
        )
    }


def model(**change: Any) -> dict[str, Any]:
    return {"model": dataclasses.replace(CONFIG.model, **change)}


@pytest.mark.parametrize(
    "change, said",
    [
        (crop(height=18), "data.crop.height, width = 18, 16: give multiples of .* space, 4"),
        (crop(frames=6), r"data.crop.frames is 6: .* so give 1 \+ 4n"),
        (crop(height=8), "8, 16: SSIM, .* windows of 11 x 11 pixels. Make them larger, or set"),
        (
            {"evaluation": CodecEvaluationConfig(frames=8)},
            r"evaluation.frames is 8: the model's stride in time is 4, so give 1 \+ 4n",
        ),
        (
            {"evaluation": CodecEvaluationConfig(records_split="test")},
            "records_split is 'test', and the data are moving shapes, which have none",
        ),
        (
            {"optimizer": dataclasses.replace(CONFIG.optimizer, accumulate=3)},
            "data.crop.rows 8 does not divide into optimizer.accumulate 3",
        ),
        (model(shift=(0.0, 0.0, 0.0)), "measured when training ends: leave them empty"),
        (model(channels=1), "model.channels is 1: clips have 3"),
        ({"steps": 0}, "steps is 0: it is at least 1"),
    ],
)
def test_runs_that_cannot_be_are_refused(change: dict[str, Any], said: str):
    with pytest.raises(ValueError, match=said):
        dataclasses.replace(CONFIG, **change)


@pytest.mark.parametrize("name", ["clips", "statistics", "frames"])
def test_evaluations_that_cannot_be_are_refused(name: str):
    change: Any = {name: -1}
    with pytest.raises(ValueError, match=f"evaluation.{name} is -1"):
        dataclasses.replace(CONFIG, evaluation=CodecEvaluationConfig(**change))


def test_small_windows_are_trained_on_where_nothing_is_measured():
    evaluation = dataclasses.replace(CONFIG.evaluation, clips=0)
    made = dataclasses.replace(CONFIG, evaluation=evaluation, **crop(height=8, width=8))
    assert (made.data.crop.height, made.data.crop.width, made.evaluation.clips) == (8, 8, 0)


def test_a_run_survives_json(tmp_path: Path):
    source = RecordsConfig("somewhere", split="train")
    recorded = dataclasses.replace(
        CONFIG,
        data=dataclasses.replace(CONFIG.data, source=source),
        evaluation=dataclasses.replace(CONFIG.evaluation, records_split="test"),
    )
    for config in (CONFIG, recorded):
        values = json.loads(json.dumps(to_dict(config)))
        assert values["type"] == "dit_jax.codec.run:CodecRun"
        assert stored_config(values, "here", CodecRun) == config
        (tmp_path / "config.json").write_text(json.dumps(values))
        again = read_config(tmp_path / "config.json", Run)
        assert again == config and hash(again) == hash(config)
    with pytest.raises(ValueError, match="'groups', which CodecRun does not"):
        stored_config(to_dict(CONFIG) | {"groups": 1}, "here", Run)


def test_a_run_of_the_other_kind_is_refused(capsys: Any):
    of_codec, of_model = to_dict(CONFIG), to_dict(VideoRun())
    with pytest.raises(ValueError, match="'here' is a CodecRun: give a VideoRun"):
        stored_config(of_codec, "here")
    with pytest.raises(ValueError, match="'here' is a VideoRun: give a CodecRun"):
        stored_config(of_model, "here", CodecRun)
    with pytest.raises(ValueError, match="is a CodecRun: give a VideoRun"):
        load_config(str(TINY))
    with pytest.raises(SystemExit):
        parse("--config", MODEL, kind=CodecRun)
    assert "is a VideoRun: give a CodecRun" in capsys.readouterr().err


def test_strides_below_one_are_refused():
    with pytest.raises(ValueError, match="codec.t is 0: it is at least 1"):
        VideoRun(codec=CodecConfig(t=0, h=8, w=8))
