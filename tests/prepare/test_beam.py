"""The pipeline of Apache Beam: what it examines is what is examined without it."""

import json

import pytest

from dit_jax.prepare.clips import ClipConfig
from dit_jax.prepare.examining import ExamineConfig
from dit_jax.prepare.listing import find_media
from dit_jax.prepare.stages import BeamConfig, Examined, examine_files
from dit_jax.prepare.work import Progress
from dit_jax.prepare.workers import WorkersConfig
from tests.prepare.made_media import moving


def found(folder):
    """Reports by their keys, without what they took."""
    lines = [json.loads(line) for path in folder.rglob("*.jsonl") for line in path.open()]
    return {one["key"]: {**one, "cost": 0} for one in lines}


@pytest.mark.filterwarnings("ignore")
def test_direct_runner_makes_the_same_reports(written, tmp_path):
    pytest.importorskip("apache_beam", reason="needs the extra: pip install -e '.[beam]'")
    for i in range(3):
        written(f"{i}.mp4", moving(26, seed=i))
    (tmp_path / "bad.mp4").write_bytes(b"nothing")
    items = find_media(tmp_path).items
    progress = Progress(shown=False)
    how = ExamineConfig(clips=ClipConfig(area=32 * 32)), WorkersConfig(count=1)
    plain, beam = (Examined(tmp_path / name, *how) for name in ("plain", "beam"))
    examine_files(items, plain, progress)
    examine_files(items, beam, progress, BeamConfig("DirectRunner"))
    assert len(found(tmp_path / "plain")) == 4
    assert found(tmp_path / "plain") == found(tmp_path / "beam")
    assert progress.clips["examine"] == 6
    # Everything is there: no pipeline runs.
    examine_files(items, beam, progress, BeamConfig("NoSuchRunner"))
