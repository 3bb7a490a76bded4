"""The configuration of a codec's run: what is refused and how, the command line, JSON and back."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from dit_jax.codec.run import CodecRun
from dit_jax.config import (
    CodecConfig,
    Run,
    VideoRun,
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


def change(**fields: Any) -> dict[str, Any]:
    """Changes of a codec's run, by field; of a field's fields where they are given as a dictionary."""
    return {
        name: dataclasses.replace(getattr(CONFIG, name), **value) if type(value) is dict else value
        for name, value in fields.items()
    }


def crop(**sizes: int) -> dict[str, Any]:
    return change(data={"crop": dataclasses.replace(CONFIG.data.crop, **sizes)})


@pytest.mark.parametrize(
    "change, said",
    [
        (crop(height=18), "data.crop.height, width = 18, 16: give multiples of .* space, 4"),
        (crop(frames=6), r"data.crop.frames is 6: .* so give 1 \+ 2n"),
        (crop(height=8), "8, 16: SSIM, .* windows of 11 x 11 pixels. Make them larger, or set"),
        (
            change(evaluation={"frames": 8}),
            "evaluation.frames is 8: the model's stride in time is 2",
        ),
        (
            change(evaluation={"records_split": "test"}),
            "the data are moving shapes, which have none",
        ),
        (change(evaluation={"clips": -1}), "evaluation.clips is -1"),
        (change(evaluation={"statistics": -1}), "evaluation.statistics is -1"),
        (change(optimizer={"accumulate": 3}), "rows 8 does not divide into optimizer.accumulate 3"),
        (change(model={"shift": (0.0,) * 3}), "measured when training ends: leave them empty"),
        (change(model={"channels": 1}), "model.channels is 1: clips have 3"),
        (change(steps=0), "steps is 0: it is at least 1"),
    ],
)
def test_runs_that_cannot_be_are_refused(change: dict[str, Any], said: str):
    with pytest.raises(ValueError, match=said):
        dataclasses.replace(CONFIG, **change)


def test_small_windows_are_trained_on_where_nothing_is_measured():
    changed = change(evaluation={"clips": 0}) | crop(height=8, width=8)
    config = dataclasses.replace(CONFIG, **changed)
    assert (config.data.crop.height, config.evaluation.clips) == (8, 0)


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
