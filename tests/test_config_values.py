"""Values of configs: their types, finite numbers, paths, and files that are large, deep or broken."""

import dataclasses
import functools
import importlib
import json
import math
import sys
import types
from pathlib import Path

import pytest

from dit_jax.codec.config import LatentCodecConfig
from dit_jax.codec.run import CodecRun
from dit_jax.config import (
    DataConfig,
    VideoRun,
    absolute_paths,
    check_types,
    load_config,
    parse_config,
    read_config,
    stored_config,
    to_dict,
)
from dit_jax.data import MixedSetConfig, MixtureConfig, RecordsConfig
from dit_jax.files import InputError, as_path, write_whole
from tests.stored import with_value

HEAD = "from dit_jax.config import *\nfrom dit_jax.training import *\nfrom dit_jax.data import *\n"
WRONG = [
    ("steps", 1e1),
    ("steps", True),
    ("steps", "10"),
    ("output", Path("runs/x")),
    ("optimizer.learning_rate", "1e-3"),
    ("optimizer.learning_rate", math.nan),
    ("optimizer.learning_rate", math.inf),
    ("optimizer.learning_rate", 10**400),
    ("optimizer.clip_norm", math.nan),
    ("optimizer.schedule", 3),
    ("checkpoint.keep_period", 2.0),
    ("model.dit.scan", "False"),
    ("model.dit.scan", 1),
    ("data.packing.rows", 4.0),
    ("data.source.frames", (3, 5.0)),
    ("data.source.frames", [3, 5]),
    ("data.source.sizes", ((32, 32, 32),)),
    ("data.source.sizes", (32, 32)),
    ("diffusion.time.mean", -math.inf),
    ("sampling.cfg_interval", (0.0, 0.5, 1.0)),
    ("codec.hash", Path("codec")),
]


def changed(config, name, value):
    """A config with another value in one field, which nothing has looked at."""
    first, _, rest = name.partition(".")
    one = object.__new__(type(config))
    for field in dataclasses.fields(config):
        new = getattr(config, field.name)
        if field.name == first:
            new = changed(new, rest, value) if rest else value
        object.__setattr__(one, field.name, new)
    return one


@pytest.mark.parametrize(("name", "value"), WRONG, ids=lambda one: repr(one)[:30])
def test_a_wrong_value_is_refused_by_the_name_of_its_field(name, value):
    config = changed(VideoRun(), name, value)
    with pytest.raises(InputError, match=f"^{name}"):
        check_types(config)
    values = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    with pytest.raises(InputError, match=f"^{name}"):
        VideoRun(**values)


def test_what_may_stand_for_another_is_taken():
    for name, value in (
        ("optimizer.learning_rate", 1),
        ("optimizer.clip_norm", None),
        ("checkpoint.keep_period", 5),
        ("data.source.sizes", ((32, 32),)),
    ):
        check_types(changed(VideoRun(), name, value))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("VideoRun(steps=1e1)", "steps is 10.0"),
        ("VideoRun(optimizer=OptimizerConfig(learning_rate='1e-3'))", "learning_rate is '1e-3'"),
        ("VideoRun(optimizer=OptimizerConfig(learning_rate=float('nan')))", "learning_rate is nan"),
        ("VideoRun(data=DataConfig(ShapesConfig(frames=[3])))", r"data.source.frames is \[3\]"),
        ("VideoRun(output=__import__('pathlib').Path('x'))", r"output is PosixPath\('x'\)"),
        ("VideoRun(stepz=3)", "line 5.*'stepz'"),
        ("VideoRun(steps=-2)", "steps is -2: it is at least 1"),
        ("{}", "is a dict: give a VideoRun"),
        ("1 / 0", "line 5: ZeroDivisionError"),
        ("(lambda f: f(f))(lambda f: f(f))", "line 5: RecursionError"),
        ("VideoRun(log=LogConfig(every=0))", "log.every is 0"),
    ],
)
def test_a_config_file_that_fails_is_told_in_one_line(tmp_path, capsys, text, message):
    file = tmp_path / "mine.py"
    file.write_text(f"{HEAD}def get_config():\n    return {text}\n")
    with pytest.raises(InputError, match=message):
        load_config(str(file))
    with pytest.raises(SystemExit) as error:
        parse_config(["--config", str(file)], "prog", "Trains.")
    said = capsys.readouterr().err
    assert error.value.code == 2 and len(said.splitlines()) == 1


@pytest.mark.parametrize("data", [b"# caf\xe9\n", b"x = 1\0", b"def get_config(:\n", b"x = 1\n"])
def test_a_file_that_is_no_config_is_refused(tmp_path, data):
    file = tmp_path / "mine.py"
    file.write_bytes(data)
    with pytest.raises(InputError, match="mine.py"):
        load_config(str(file))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", 10.0),
        ("steps", "10"),
        ("steps", -1),
        ("optimizer.learning_rate", math.nan),
        ("optimizer", 3),
        ("model.dit.scan", "False"),
        ("data.packing.rows", None),
        ("data.source.sizes", [[32, 32, 32]]),
        ("data.source.frames", {"a": 1}),
        ("data.source.type", "dit_jax.data:FolderConfig"),
        ("data.source.type", ["ShapesConfig"]),
    ],
)
def test_a_stored_config_with_a_wrong_value_names_file_and_field(name, value):
    with pytest.raises(InputError, match=f"'here' holds no config that this version.*{name}"):
        stored_config(with_value(VideoRun(), name, value), "here")


@pytest.mark.parametrize("name", ["unknown", "model.dit.mixture"])
def test_a_stored_field_that_is_not_known_is_refused_by_name(name):
    with pytest.raises(InputError, match=f"'here'.*'{name.split('.')[-1]}', which"):
        stored_config(with_value(VideoRun(), name, 8), "here")


@pytest.mark.parametrize(
    "text",
    ["[" * 200_000, '{"a":' * 200_000, b"\xff\xfe", b"", "3", '{"steps": ' + "9" * 5000 + "}"],
    ids=["lists", "objects", "no text", "empty", "a number", "a long number"],
)
def test_a_hostile_stored_config_is_refused_in_one_line(tmp_path, text):
    file = tmp_path / "config.json"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError, match="config.json") as error:
        read_config(file)
    assert len(str(error.value)) < 1000


def test_a_deep_value_is_refused_in_one_line():
    deep = functools.reduce(lambda inner, _: [inner], range(900), 0)  # parsing just succeeds
    for values in (None, to_dict(VideoRun()) | {"output": deep}):
        with pytest.raises(InputError, match="'here' holds no config") as error:
            stored_config(values, "here")
        assert len(str(error.value)) < 1000


@pytest.mark.parametrize(
    ("path", "message"),
    [("/dev/zero", "more than [0-9,]+ bytes"), ("/none.json", "none.json' cannot be read")],
)
def test_a_file_that_cannot_be_read_is_refused(path, message):
    with pytest.raises(InputError, match=message):
        read_config(path)


def test_stored_configs_are_read_from_anywhere(tmp_path, monkeypatch, bucket):
    monkeypatch.setenv("HOME", str(tmp_path))
    text = json.dumps(to_dict(VideoRun(steps=3)))
    (tmp_path / "config.json").write_text(text)
    assert read_config("~/config.json").steps == 3
    source = "from dit_jax.config import VideoRun\ndef get_config(): return VideoRun(steps=7)\n"
    (tmp_path / "mine.py").write_text(source)
    assert load_config("~/mine.py").steps == 7
    write_whole(f"{bucket}/run/config.json", text)
    assert read_config(as_path(f"{bucket}/run/config.json")).steps == 3
    write_whole(f"{bucket}/mine.py", source)
    assert load_config(f"{bucket}/mine.py").steps == 7


def test_paths_become_absolute_and_names_stay(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    (tmp_path / "records/1.0.0").mkdir(parents=True)
    one = RecordsConfig("records/1.0.0", data_dir="~/tfds")
    here = absolute_paths(dataclasses.replace(VideoRun(output="~/run"), data=DataConfig(one)))
    assert here.output == "/home/me/run"
    assert here.data.source == RecordsConfig(
        str(tmp_path / "records/1.0.0"), data_dir="/home/me/tfds"
    )
    assert here.checkpoint.initial is here.codec.path is here.text_encoder.path is None
    sets = (MixedSetConfig("mnist"), MixedSetConfig("./records/1.0.0", weight=2.0))
    mixed = absolute_paths(VideoRun(output="x", data=DataConfig(MixtureConfig(sets))))
    paths = [one.path for one in mixed.data.source.sets]
    assert paths == ["mnist", str(tmp_path / "records/1.0.0")]
    assert absolute_paths(here) == here


def test_paths_of_codecs_and_encoders_become_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base = VideoRun(data=DataConfig(RecordsConfig("mnist")))
    config = dataclasses.replace(
        base,
        output="gs://bucket/run",
        checkpoint=dataclasses.replace(base.checkpoint, initial="runs/first"),
        codec=LatentCodecConfig(path="codec"),
    )
    here = absolute_paths(config)
    assert here.output == "gs://bucket/run"
    assert here.checkpoint.initial == str(tmp_path / "runs/first")
    assert here.codec.path == str(tmp_path / "codec")
    run = CodecRun()
    run = dataclasses.replace(run, loss=dataclasses.replace(run.loss, vgg="vgg.pth"))
    assert absolute_paths(run).loss.vgg == str(tmp_path / "vgg.pth")


def test_records_on_cloud_storage_are_refused():
    for change in ({"path": "gs://bucket/clips/1.0.0"}, {"path": "x", "data_dir": "gs://bucket"}):
        with pytest.raises(InputError, match=r"gs://bucket.*gcsfuse.*docs/storage.md"):
            RecordsConfig(**change)


@pytest.mark.parametrize(
    ("verb", "arguments", "message"),
    [
        ("plan", "--topology v5p:2x2x1 --tokens inf", "tokens is inf"),
        ("prepare", "--input a --output b --chat.temperature inf", "chat.temperature is inf"),
    ],
)
def test_verbs_refuse_numbers_that_are_not_finite(verb, arguments, message, capsys):
    assert importlib.import_module(f"dit_jax.{verb}.__main__").main(arguments.split()) == 2
    said = capsys.readouterr().err
    assert message in said and len(said.splitlines()) == 1


def test_options_that_check_themselves_refuse_nan():
    from dit_jax.prepare.shots import ShotConfig
    from dit_jax.prepare.workers import WorkersConfig

    for make in (lambda: WorkersConfig(time_limit=math.nan), lambda: ShotConfig(ratio=math.nan)):
        with pytest.raises(ValueError, match="nan"):
            make()


def test_a_config_finds_its_own_neighbours_only(tmp_path):
    for folder, steps in (("a", 11), ("b", 22)):
        (tmp_path / folder).mkdir()
        base = f"from dit_jax.config import VideoRun\ndef base(): return VideoRun(steps={steps})\n"
        (tmp_path / folder / "neighbour.py").write_text(base)
        (tmp_path / folder / "mine.py").write_text("from neighbour import base as get_config\n")
    found = [load_config(str(tmp_path / folder / "mine.py")).steps for folder in "ab"]
    assert found == [11, 22]


def test_a_config_takes_no_name_from_a_module_that_is_in_use(tmp_path, monkeypatch):
    theirs = types.ModuleType("neighbour")
    monkeypatch.setitem(sys.modules, "neighbour", theirs)
    (tmp_path / "neighbour.py").write_text("STEPS = 5\n")
    text = "from neighbour import STEPS\nfrom dit_jax.config import VideoRun\n"
    (tmp_path / "mine.py").write_text(f"{text}def get_config(): return VideoRun(steps=STEPS)\n")
    assert load_config(str(tmp_path / "mine.py")).steps == 5
    assert sys.modules["neighbour"] is theirs
