"""Dirt and size: names that are no text, captions that meet no file, machines that fail, many files."""

import contextlib
import errno
import json
import os
import resource
import unicodedata
from collections import Counter

import numpy as np
import pytest
import tensorflow_datasets as tfds

from dit_jax import files
from dit_jax.prepare.__main__ import CaptionsConfig, PrepareConfig, main, prepare
from dit_jax.prepare.examining import ExamineConfig, FileReport
from dit_jax.prepare.listing import Item, find_media
from dit_jax.prepare.report import LISTED, SAMPLE, write_reports
from dit_jax.prepare.stages import TRIES, Examined, report_line
from dit_jax.prepare.work import Logs, Progress, digest
from dit_jax.prepare.workers import Outcome, WorkersConfig
from tests.prepare.made_media import run_here

Image = pytest.importorskip("PIL.Image", reason="needs the extra: pip install -e '.[prepare]'")


def picture(path, seed=0):
    """A PNG of 64 x 64 coloured squares; other seeds are no duplicates."""
    squares = np.random.default_rng(seed).integers(0, 256, (8, 8, 3)).astype(np.uint8)
    with open(path, "wb") as file:
        Image.fromarray(np.kron(squares, np.ones((8, 8, 1), np.uint8))).save(file, "PNG")


@pytest.fixture(autouse=True)
def here(monkeypatch):
    """Pictures are read in this process."""
    monkeypatch.setattr("dit_jax.prepare.stages.run", run_here)


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "media"
    path.mkdir()
    return path


@pytest.fixture
def verb(folder, tmp_path):
    """The command on the folder; writes to ``out``."""
    line = ["--input", str(folder), "--output", str(tmp_path / "out")]
    return lambda *more: main([*line, *more])


@pytest.fixture
def slow(monkeypatch):
    """No file is read within the time limit."""
    time_out = lambda function, items, *_: (Outcome(reason="timed out") for _ in items)  # noqa: E731
    monkeypatch.setattr("dit_jax.prepare.stages.run", time_out)


def run(folder, output, **changes):
    return prepare(PrepareConfig(str(folder), str(output), **changes), shown=False)


def records(output):
    found = tfds.data_source("clips", data_dir=output, split="train")
    return {one["source"].decode(): one["caption"].decode() for one in found}


def lines(folder):
    return sorted(path.read_bytes().count(b"\n") for path in folder.glob("work/examined/*/*.jsonl"))


def test_text_that_cannot_be_encoded_ends_nothing(folder, tmp_path):
    raw = os.fsencode(folder)
    for seed, name in enumerate([b"caf\xe9.png", b"good.png", b"half.png"]):
        picture(raw + b"/" + name, seed)
    (folder / "half.json").write_text('{"caption": "a \\ud83d cat", "licence": "CC\\udc00"}')
    (folder / "good.txt").write_bytes(b"\xff not utf-8")
    table = tmp_path / "table.json"
    table.write_text('[{"file": "caf\\udce9.png", "caption": "coffee \\ud83d"}]')
    captions = CaptionsConfig(table=str(table), licence="mine \udce9")
    about = run(folder, tmp_path, captions=captions)
    expected = {"caf\\xe9.png": "coffee \ufffd", "good.png": "", "half.png": "a \ufffd cat"}
    assert records(tmp_path) == expected
    assert about["notes"]["files whose captions were repaired"] == 2
    assert about["notes"]["sidecars that cannot be read"] == 1
    assert "good.txt" in about["problems"]["good.png"]
    assert json.loads((tmp_path / "report.json").read_bytes()) == about
    assert "\ufffd cat" in (tmp_path / "report.html").read_text()


def test_names_that_are_not_utf8_are_told_apart(folder):
    raws = [b"caf\xe9.png", b"caf\\xe9.png"]
    picture(os.fsencode(folder) + b"/" + raws[0])
    assert [item.name for item in find_media(folder).items] == ["caf\\xe9.png"]
    picture(os.fsencode(folder) + b"/" + raws[1])
    paths = {item.name: os.fsencode(item.path) for item in find_media(folder).items}
    assert len(paths) == 2 and paths["caf\\xe9.png"].endswith(raws[1])


def test_captions_and_files_that_do_not_meet_are_counted_and_named(folder, tmp_path, capsys):
    decomposed = unicodedata.normalize("NFD", "caf\u00e9.png")
    for seed, name in enumerate([decomposed, "cat.png", "dog.PNG"]):
        picture(folder / name, seed)
    (folder / "cat.TXT").write_text("a cat")
    (folder / "dog.Json").write_text('"a dog"')
    (folder / "bird.txt").write_text("a bird that is not there")
    (folder / ".hidden.png").write_bytes(b"x")
    (folder / ".git").mkdir()
    table = tmp_path / "table.csv"
    table.write_text("file,caption\ncaf\u00e9.png,coffee\ncta.png,a typo\n")
    about = run(folder, tmp_path / "out", captions=CaptionsConfig(table=str(table)))
    expected = {decomposed: "coffee", "cat.png": "a cat", "dog.PNG": "a dog"}
    assert records(tmp_path / "out") == expected
    assert about["sidecars"] == 2 and about["sidecars_without_media"] == ["bird.txt"]
    assert about["table_rows_without_media"] == ["cta.png (line 3)"]
    assert about["notes"] == {
        "table rows that match no file": 1,
        "files without a row in the table": 3,
        "sidecars without a media file": 1,
        "hidden files": 1,
        "hidden folders": 1,
    }
    said = capsys.readouterr().out
    assert "cta.png" in said and "bird.txt" in said


def test_linked_folders_are_followed_and_loops_end(folder, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "deep").mkdir(parents=True)
    picture(elsewhere / "deep" / "a.png", 1)
    (folder / "b").mkdir()
    picture(folder / "b" / "b.png", 2)
    (folder / "a link").symlink_to(elsewhere)
    (folder / "again").symlink_to(elsewhere / "deep")
    (elsewhere / "loop").symlink_to(folder)
    (folder / "b" / "self").symlink_to(folder / "b")
    listed = find_media(folder)
    assert [item.name for item in listed.items] == ["a link/deep/a.png", "b/b.png"]
    assert +listed.notes == {"links to folders that are read already": 3}


def test_what_the_machine_kept_from_being_read_is_tried_again(folder, tmp_path, slow, monkeypatch):
    picture(folder / "a.png", 1)
    picture(folder / "b.png", 2)
    os.truncate(folder / "b.png", 200)
    short = WorkersConfig(time_limit=1.0)
    said = [run(folder, tmp_path, workers=short) for _ in range(TRIES - 1)]
    assert [one["files_tried_again"] for one in said] == [2] * (TRIES - 1)
    for one in said:
        assert one["files_by_reason"] == {"timed out": 2}
        assert one["by_file"][0]["refusal"]["tried_again"]
    with pytest.raises(files.InputError):
        run(folder, tmp_path, workers=short)
    about = json.loads((tmp_path / "report.json").read_bytes())
    assert about["files_tried_again"] == 0 and about["files_by_reason"] == {"timed out": 2}
    # Under another limit they are read, once; they are not looked at again.
    monkeypatch.setattr("dit_jax.prepare.stages.run", run_here)
    for _ in range(2):
        about = run(folder, tmp_path)
        assert about["files_by_reason"] == {"used": 1, "truncated": 1}
    assert lines(tmp_path) == [2] * (TRIES + 1)


def test_exit_status_says_that_files_are_left(folder, verb, slow, monkeypatch, capsys):
    picture(folder / "a.png", 1)
    assert verb() == 1
    assert "1 files and 0 clips" in capsys.readouterr().err
    monkeypatch.setattr("dit_jax.prepare.stages.run", run_here)
    assert verb() == 0


def test_a_full_disk_is_a_line_and_loses_nothing(folder, verb, tmp_path, monkeypatch, capsys):
    for seed in range(3):
        picture(folder / f"{seed}.png", seed)
    append = Logs.append

    def full(self, line):
        if b'"2.png"' in line:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "x.jsonl")
        append(self, line)

    monkeypatch.setattr(Logs, "append", full)
    assert verb() == 1
    err = capsys.readouterr().err
    assert os.strerror(errno.ENOSPC) in err and "Traceback" not in err
    monkeypatch.setattr(Logs, "append", append)
    assert verb() == 0
    assert len(records(tmp_path / "out")) == 3 and lines(tmp_path / "out") == [1, 2]
    # Pictures have no duration.
    said = capsys.readouterr()
    assert "3 pictures" in said.out and "minutes" not in said.out
    assert "clips/s" in said.err and "h of video" not in said.err
    about = json.loads((tmp_path / "out" / "report.json").read_bytes())
    assert (about["pictures_kept"], about["hours_kept"]) == (3, 0.0)
    assert about["by_file"][0]["clips"][0]["seconds"] == 0.0


def test_what_cannot_be_read_or_written_is_refused_before_any_work(folder, tmp_path, capsys):
    picture(folder / "a.png")
    (tmp_path / "file").touch()
    for source, output, why in (
        (folder, tmp_path / "file" / "out", "file/out"),
        ("gs://clips/media", tmp_path / "out", "gcsfuse"),
    ):
        assert main(["--input", str(source), "--output", str(output)]) == 2
        assert why in capsys.readouterr().err
    holder = {"host": files.socket.gethostname(), "pid": os.getppid(), "time": 1e12}
    files.write_json(tmp_path / "work" / "share-0-of-1" / "lock.json", holder)
    with pytest.raises(files.InputError, match=str(os.getppid())):
        run(folder, tmp_path)
    assert run(folder, tmp_path, shard="0/2") is None


def test_an_output_on_cloud_storage_gets_what_is_finished(folder, tmp_path, bucket, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for seed in range(2):
        picture(folder / f"{seed}.png", seed)
    output = f"{bucket}/prepared"
    run(folder, output)
    out = files.as_path(output)
    names = {path.name for path in (out / "clips" / "1.0.0").iterdir()}
    assert {"prepared.json", "dataset_info.json", "features.json"} <= names
    local = files.local_copy(out)
    assert set(records(local)) == {"0.png", "1.png"}
    assert json.loads((local / "report.json").read_bytes())["files"] == 2
    assert not (out / "work").exists() and list(tmp_path.glob("cache/dit_jax/prepare/*/examined"))
    picture(folder / "2.png", 2)
    run(folder, output, work=str(tmp_path / "work"))
    assert json.loads((out / "report.json").read_bytes())["files"] == 3
    with pytest.raises(files.InputError, match="--work"):
        run(folder, output, shard="0/2")


def test_reports_of_many_files_are_some_files(tmp_path):
    """Structure instead of gigabytes: few files, and a bound on what is listed and shown."""
    count = LISTED + 500
    items = [Item(f"{i:06d}.bin", f"/no/{i}", digest(i)) for i in range(count)]
    examined = Examined(tmp_path / "work", ExamineConfig(), WorkersConfig())
    assert len(examined.missing(items)) == count
    for half in (items[::2], items[1::2]):  # Two processes.
        with contextlib.closing(Logs(examined.logs.folder)) as logs:
            for item in half:
                refusal = ("not media", "<b>" + "x" * 100)
                report = FileReport(item.path, refusal=refusal)
                logs.append(report_line(item, report, examined.limits, False))
            logs.append(b'{"key": "torn')
    assert not examined.missing(items)
    assert len(list(tmp_path.rglob("*.jsonl"))) == 2
    assert examined.report(items[7]).path == items[7].name
    why, texts, notes = lambda name: "", lambda one: {}, Counter({"noted": 2})
    given = (tmp_path, items, examined, why, texts, {"a": "b"}, {}, notes, Progress(False))
    about = write_reports(*given)
    assert about["files_by_reason"] == {"not media": count} and len(about["by_file"]) == LISTED
    assert about["notes"] == {"noted": 2}
    told = (tmp_path / "files.jsonl").read_bytes().splitlines()
    assert [json.loads(line)["path"] for line in told] == [item.name for item in items]
    page = (tmp_path / "report.html").read_text()
    assert page.count("<tr><td>0") == SAMPLE and "<b>xxx" not in page


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_hundred_thousand_pictures(folder, tmp_path):
    """Listed, examined and written; what a file more takes of memory is told."""
    for i in range(100_000):
        if i % 1000 == 0:
            (folder / f"{i:06d}").mkdir()
        picture(folder / f"{i // 1000 * 1000:06d}" / f"{i:06d}.png", i)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    about = prepare(PrepareConfig(str(folder), str(tmp_path / "out")), shown=False)
    assert about["files"] == 100_000 and about["pictures_kept"] > 90_000
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10
    print(f"{grown / 1e6:.0f} MB more")
    assert grown < 100_000 * 4096
