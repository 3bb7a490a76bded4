"""Clips of the frames that are examined: those that are read later, and records of either are alike."""

import os
import shutil

import numpy as np
import pytest

from dit_jax.prepare import examining, stages
from dit_jax.prepare.__main__ import PrepareConfig, prepare
from dit_jax.prepare.clips import ClipConfig
from dit_jax.prepare.examining import ExamineConfig, examine, read_clip
from dit_jax.prepare.workers import WorkersConfig
from tests.prepare.made_media import moving

SHORT = ExamineConfig(clips=ClipConfig(min_seconds=0.4, max_seconds=1.0, multiple=8))


@pytest.fixture
def path(written, bars):
    """Shots of 30, 5, 40 and 70 frames, the last, if asked for, between black bars."""
    parts = [moving(n, seed=n, speed=1) for n in (30, 5, 40, 70)]
    parts[-1][:, : 16 * bars] = parts[-1][:, 96 - 16 * bars :] = 0
    return written("four.mp4", [frame for part in parts for frame in part], 25)


def given_away(path, **options):
    """The report, and (clip, frames) of those that were."""
    held = []
    return examine(path, SHORT, lambda *one: held.append(one), **options), held


@pytest.mark.parametrize("bars", [True])
def test_they_are_those_that_are_read_later(path):
    report, held = given_away(path)
    assert report.clips == examine(path, SHORT).clips
    kept = [clip for clip in report.clips if clip.rejection is None]
    assert {clip.shot for clip in kept} == {0, 2, 3}
    # The bars are known too late for the frames of their shot.
    assert [one.start for one, _ in held] == [one.start for one in kept if one.shot < 3]
    for clip, frames in held:
        np.testing.assert_array_equal(frames, read_clip(path, clip))


@pytest.mark.parametrize("bars", [False])
def test_of_a_long_shot_none_is_held_and_after_some_time_none_at_all(path, monkeypatch):
    assert not given_away(path, keep_seconds=0.0)[1]
    frames = given_away(path)[1][0][1]
    # Some frames more are held before a shot is known to have ended.
    monkeypatch.setattr(examining, "HELD", 60 * frames[0].size)
    shots = {clip.shot for clip, _ in given_away(path)[1]}
    assert 0 in shots and 2 not in shots


@pytest.mark.parametrize("bars", [False])
def test_records_are_the_same_bytes_and_stored_clips_are_not_decoded(path, tmp_path, monkeypatch):
    def records(output):
        given = PrepareConfig(str(folder), str(output), examine=SHORT, workers=WorkersConfig(1))
        assert prepare(given, shown=False)
        return [one.read_bytes() for one in sorted(output.glob("clips/1.0.0/*array_record*"))]

    folder, output = tmp_path / "media", tmp_path / "once"
    folder.mkdir()
    path = path.rename(folder / path.name)
    once = records(output)
    assert len(list((output / "work").glob("examined/*/clips/*/*.mkv"))) == 7
    # A file of the same size and time of change of which nothing can be read but what was stored.
    about, data = path.stat(), path.read_bytes()
    path.write_bytes(bytes(len(data)))
    os.utime(path, ns=(about.st_atime_ns, about.st_mtime_ns))
    shutil.rmtree(output / "clips")
    assert records(output) == once
    path.write_bytes(data)
    monkeypatch.setattr(stages, "ENCODING", 0.0)
    assert records(tmp_path / "twice") == once
    assert not list((tmp_path / "twice" / "work").glob("examined/*/clips"))
