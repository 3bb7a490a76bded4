"""Paths, whole files, limits, tries again and locks, locally and on an emulator of Cloud Storage."""

import errno
import json
import os
import subprocess
import time
from pathlib import Path

import pytest

from dit_jax import files
from dit_jax.files import InputError, as_path, atomic_path, check_exists, check_writable, locked


@pytest.fixture(params=["local", "storage"])
def root(request, tmp_path):
    if request.param == "local":
        return str(tmp_path)
    return f"{request.getfixturevalue('bucket')}/{tmp_path.name}-{time.time_ns()}"


def test_home_is_expanded_and_relative_paths_become_absolute(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert files.absolute("~/run") == files.absolute("run") == str(tmp_path / "run")
    assert files.absolute("gs://clips/a/b") == "gs://clips/a/b"


@pytest.mark.parametrize("path", ["", "gs://", "gs:///"])
def test_a_path_that_names_nothing_is_refused(path):
    with pytest.raises(InputError):
        as_path(path)


def test_files_are_written_whole_and_read_back(root):
    path = f"{root}/a/b.json"
    files.write_json(path, {"x": "\u00e9"})
    assert json.loads(as_path(path).read_bytes()) == {"x": "\u00e9"}
    with pytest.raises(RuntimeError), atomic_path(path) as fresh:
        fresh.write_text("half")
        raise RuntimeError
    assert json.loads(as_path(path).read_bytes()) == {"x": "\u00e9"}
    assert [one.name for one in as_path(f"{root}/a").iterdir()] == ["b.json"]
    if not root.startswith("gs"):  # A link stays a link.
        link = Path(root, "link")
        link.symlink_to(path)
        files.write_whole(link, "new")
        assert link.is_symlink() and Path(path).read_text() == "new"


def test_a_folder_is_copied_for_those_who_read_local_files(root):
    contents = {"config.json": b"{}", "deep/weights": b"123"}
    for name, value in contents.items():
        files.write_whole(f"{root}/codec/{name}", value)
    local = files.local_copy(f"{root}/codec")
    assert {name: (local / name).read_bytes() for name in contents} == contents
    assert files.local_copy(f"{root}/codec") == local


def test_what_cannot_be_written_or_is_not_there_is_one_line_with_its_option(root, tmp_path):
    assert check_writable(f"{root}/new", "--output") == as_path(f"{root}/new")
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="--output"):
        check_writable(tmp_path / "file" / "run")
    with pytest.raises(InputError, match="--checkpoint"):
        check_exists(f"{root}/absent", "--checkpoint")
    if root.startswith("gs"):
        with pytest.raises(InputError, match=r"\A.*no-such-bucket.*\Z"):
            check_writable("gs://no-such-bucket/run")


def test_reading_stops_at_its_limit(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes(b"12345")
    assert files.read_bytes(path, 5) == b"12345"
    with pytest.raises(InputError, match="4"):
        files.read_bytes(path, 4)
    with pytest.raises(InputError, match="1,000"):
        files.read_bytes("/dev/zero", 1000)


def test_errors_that_pass_are_tried_again_and_others_are_not(monkeypatch, capsys):
    monkeypatch.setattr(files, "WAIT_SECONDS", 0.0)
    tries = []

    def work(error):
        tries.append(1)
        if len(tries) < 3:
            raise error
        return "done"

    assert files.retry(lambda: work(OSError(errno.ESTALE, "stale")), "saving") == "done"
    assert capsys.readouterr().err.count("saving failed") == 2
    tries.clear()
    assert files.retry(lambda: work(RuntimeError("UNAVAILABLE: 503")), "saving") == "done"
    for error in (OSError(errno.ENOSPC, "full"), ValueError("height 503 is not a multiple of 8")):
        tries.clear()
        with pytest.raises(type(error)):
            files.retry(lambda error=error: work(error), "saving")
        assert len(tries) == 1


def other_holder(root, **changes):
    holder = {"host": files.socket.gethostname(), "pid": os.getppid(), "time": time.time()}
    files.write_json(f"{root}/lock.json", holder | changes)


def test_a_directory_in_use_is_refused_and_its_holder_named(root, monkeypatch):
    other_holder(root)
    with pytest.raises(InputError, match=str(os.getppid())), locked(as_path(root)):
        pass
    other_holder(root, host="elsewhere", pid=7)
    monkeypatch.setattr(files.time, "sleep", lambda _: other_holder(root, host="elsewhere", pid=7))
    with pytest.raises(InputError, match="elsewhere"), locked(as_path(root)):
        pass


def test_a_stale_lock_is_taken_over_with_a_message(root, capsys, monkeypatch):
    monkeypatch.setattr(files, "STALE_SECONDS", 0.2)
    ended = subprocess.Popen(["true"])
    ended.wait()
    for changes in ({"pid": ended.pid}, {"host": "elsewhere", "time": 0.0}):
        other_holder(root, **changes)
        path = as_path(root) / "lock.json"
        with locked(path.parent):
            assert "stale" in capsys.readouterr().err
            assert json.loads(path.read_bytes())["pid"] == os.getpid()
            with locked(path.parent):  # One's own is no obstacle.
                pass
        assert not path.exists()


def test_a_lock_gives_signs_of_life_until_it_is_released(root, monkeypatch):
    monkeypatch.setattr(files, "HEARTBEAT_SECONDS", 0.05)
    path = as_path(root) / "lock.json"
    with locked(path.parent):
        first = json.loads(path.read_bytes())["time"]
        deadline = time.monotonic() + 60
        while json.loads(path.read_bytes())["time"] == first:
            assert time.monotonic() < deadline
            time.sleep(0.02)


def test_without_gcsfs_the_message_says_what_to_install(monkeypatch):
    files._configure_storage.cache_clear()
    monkeypatch.setitem(__import__("sys").modules, "gcsfs", None)
    with pytest.raises(InputError, match="gcs"):
        as_path("gs://clips/x")
    files._configure_storage.cache_clear()
