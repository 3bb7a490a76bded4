"""The writer of records: shards, resumption after SIGKILL or a full disk, encoded video, sizes."""

import errno
import json
import os
import resource
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
import tensorflow_datasets as tfds

from dit_jax.data.records import RecordsConfig, RecordsSource, decode_video
from dit_jax.files import InputError
from dit_jax.prepare.encoded import encode_video
from dit_jax.prepare.writing import LatentsOf, StatesOf, write_records
from tests.runs import ROOT

SHARD = 40_000
KEY = {"description": "d", "encoding": "bytes", "shard_bytes": SHARD, "resume": "key"}


def sample(i):
    """Some 10 kB, so that a shard has four."""
    rng = np.random.default_rng(i)
    video = rng.integers(0, 256, (1 + i % 3, 60, 60, 3), np.uint8)
    return {"video": video, "caption": f"Nº {i}", "fps": 8.0}


class Recorded:
    """A split as a function, which records which samples were computed."""

    def __init__(self, count, fails_at=None):
        self.count, self.fails_at, self.computed = count, fails_at, []

    def __call__(self, start):
        for i in range(start, self.count):
            if i == self.fails_at:
                raise OSError(errno.ENOSPC, "No space left on device")
            self.computed.append(i)
            yield sample(i)


def contents(path):
    return {file.name: file.read_bytes() for file in sorted(path.iterdir())}


def python(code, *arguments, **environment):
    """What a process prints."""
    line, env = [sys.executable, "-c", code, *map(str, arguments)], {**os.environ, **environment}
    env["PYTHONPATH"] = str(ROOT)
    return subprocess.run(line, env=env, stdout=subprocess.PIPE, text=True, check=True).stdout


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    splits = {"train": [sample(i) for i in range(11)], "test": [sample(20)]}
    return write_records(tmp_path_factory.mktemp("whole"), "clips", splits, **KEY)


def test_shards_are_bounded_named_and_read_by_tfds(whole):
    shards = sorted(path.name for path in whole.glob("*train.array_record*"))
    total = len(shards)
    assert total > 2
    assert shards == [f"clips-train.array_record-{i:05d}-of-{total:05d}" for i in range(total)]
    read = tfds.data_source("clips", data_dir=whole.parents[1])
    assert (len(read["train"]), len(read["test"])) == (11, 1)
    for i in (0, 5, 10):
        np.testing.assert_array_equal(read["train"][i]["video"], sample(i)["video"])
        assert read["train"][i]["caption"].decode() == f"Nº {i}"
    assert "tensorflow" not in sys.modules


def begun(root):
    """Ten records of eleven, of which the finished shards are kept."""
    with pytest.raises(OSError) as raised:
        write_records(root, "clips", {"train": Recorded(11, 10), "test": Recorded(1)}, **KEY)
    assert raised.value.errno == errno.ENOSPC and not (root / "clips" / "1.0.0").exists()
    return sorted((root / "clips" / "1.0.0.incomplete" / "data").iterdir())


def test_a_rerun_after_an_error_computes_no_finished_shard_again(whole, tmp_path):
    begun(tmp_path)
    again = Recorded(11)
    splits = {"train": again, "test": lambda start: [sample(20)][start:]}
    path = write_records(tmp_path, "clips", splits, **KEY)
    lengths = tfds.builder_from_directory(path).info.splits["train"].shard_lengths
    kept = sum(n for i, n in enumerate(lengths) if sum(lengths[: i + 1]) <= 10)
    assert kept >= 4 and again.computed == list(range(kept, 11))
    assert contents(path) == contents(whole)
    assert [p.name for p in path.parent.iterdir()] == ["1.0.0"]


@pytest.mark.parametrize("change", [{}, {"resume": "other"}, {"shard_bytes": 30_000}])
def test_after_damage_or_under_other_settings_all_is_written_anew(whole, tmp_path, change):
    first = begun(tmp_path)[0]
    if not change:
        os.truncate(first, 1000)
    again = Recorded(11)
    splits = {"train": again, "test": [sample(20)]}
    path = write_records(tmp_path, "clips", splits, **{**KEY, **change})
    assert again.computed == list(range(11))
    assert (contents(path) == contents(whole)) == ("shard_bytes" not in change)


def test_a_full_disk_is_an_error_of_the_world(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, limits[1]))
    try:
        with pytest.raises(OSError) as raised:
            write_records(tmp_path, "clips", {"train": Recorded(11)}, **KEY)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert raised.value.errno == errno.EFBIG and not list(tmp_path.rglob("*.part"))


def test_records_after_sigkill_are_the_same_bytes(whole, tmp_path):
    def killed(start):
        for i in range(start, 11):
            if i == 7:  # What is on the disk now is what is left of a process that is killed.
                shutil.copytree(tmp_path / "one", tmp_path / "two")
            yield sample(i)

    write_records(tmp_path / "one", "clips", {"train": killed, "test": [sample(20)]}, **KEY)
    assert list((tmp_path / "two").rglob("*.part"))
    next((tmp_path / "two").rglob("lock.json")).unlink()
    again = Recorded(11)
    splits = {"train": again, "test": [sample(20)]}
    path = write_records(tmp_path / "two", "clips", splits, **KEY)
    assert 0 < again.computed[0] <= 7 and again.computed[-1] == 10
    assert contents(path) == contents(whole)


def test_two_writers_of_one_place_are_refused(tmp_path):
    folder = tmp_path / "clips" / "1.0.0.incomplete"
    folder.mkdir(parents=True)
    other = {"host": os.uname().nodename, "pid": os.getppid(), "time": time.time()}
    (folder / "lock.json").write_text(json.dumps(other))
    with pytest.raises(InputError, match=str(os.getppid())):
        write_records(tmp_path, "clips", {"train": [sample(0)]}, **KEY)
    assert (folder / "lock.json").exists()


@pytest.mark.parametrize("size", [(1, 1, 1), (1, 33, 17), (7, 9, 7), (30, 48, 64)])
def test_encoded_video_keeps_size_and_colours(tmp_path, size):
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (size[0], size[1] // 8 + 1, size[2] // 8 + 1, 3))
    video = np.kron(coarse, np.ones((1, 8, 8, 1))).astype(np.uint8)[:, : size[1], : size[2]]
    given = {"video": video, "caption": "", "fps": 29.97}
    encoded = {**given, "video": encode_video(video, 29.97)}
    made = {"description": "d", "encoding": "video"}
    paths = [
        write_records(tmp_path / name, "clips", {"train": [one]}, **made)
        for name, one in (("a", given), ("b", encoded))
    ]
    assert contents(paths[0]) == contents(paths[1])
    source = RecordsSource(RecordsConfig(str(paths[0])))
    out = source[0]["video"]
    assert out.shape == video.shape and out.dtype == np.uint8
    error = out.astype(float) - video
    assert (error**2).mean() < 255**2 / 10**4.4  # 44 dB
    assert np.abs(error.mean((0, 1, 2))).max() <= (0.5 if video.size > 3 else 1)
    assert source.sizes.tolist() == [[*size]]


def test_encoding_depends_on_no_memory_of_others(tmp_path):
    rng = np.random.default_rng(0)
    wide = np.cumsum(np.cumsum(rng.normal(size=(144, 268, 3)), 0), 1)
    wide = (wide - wide.min()) / np.ptp(wide) * 255
    video = np.stack([wide[:, 2 * i : 2 * i + 208] for i in range(24)])
    video = (video + rng.normal(size=video.shape) * 4).clip(0, 255).astype(np.uint8)
    np.save(tmp_path / "video.npy", video)
    code = """
import sys
import numpy as np
from dit_jax.prepare.encoded import encode_video
print(encode_video(np.load(sys.argv[1]), 12.0).data.hex())
"""
    # glibc fills what is allocated and freed with other bytes there.
    there = python(code, tmp_path / "video.npy", MALLOC_PERTURB_="85")
    assert there.strip() == encode_video(video, 12.0).data.hex()


def test_damaged_video_is_not_decoded():
    rng = np.random.default_rng(0)
    data = encode_video(rng.integers(0, 256, (9, 64, 64, 3), np.uint8), 8.0).data
    for end in (0, 100, len(data) // 2, len(data) * 7 // 8):
        with pytest.raises(ValueError):
            decode_video(data[:end])
    for place in np.linspace(2000, len(data) - 200, 12).astype(int):
        with pytest.raises(ValueError):
            decode_video(data[:place] + bytes(200) + data[place + 200 :])


def test_sizes_are_those_of_the_records_of_any_slice(whole, tmp_path):
    path = str(whole)
    expected = [[1 + i % 3, 60, 60] for i in range(11)]

    def sizes(split="train"):
        return RecordsSource(RecordsConfig(path, split)).sizes

    assert sizes().dtype == np.int32 and sizes().tolist() == expected
    assert sizes("train[30%:80%]").tolist() == expected[3:9]
    assert sizes("train[8:]+test").tolist() == [*expected[8:], [3, 60, 60]]
    for file in whole.iterdir():
        if not file.name.startswith("sizes"):
            (tmp_path / file.name).write_bytes(file.read_bytes())
    assert RecordsSource(RecordsConfig(str(tmp_path))).sizes is None
    rows = [{**FINE, "text_states": np.ones((n, 2), np.float32)} for n in (3, 1)]
    path = write_records(tmp_path, "clips", {"train": rows}, description="d", **LATENTS)
    assert np.load(path / "sizes-train.npy")[:, 4].tolist() == [3, 1]


LATENTS = {"latents": LatentsOf(3, "h"), "text_states": StatesOf(2, "h", "t5")}
FINE = {"video": np.ones((1, 2, 2, 3), np.float32), "caption": "x", "fps": 8.0, "score": 1.0}
FINE["text_states"] = np.ones((1, 2), np.float32)


@pytest.mark.parametrize(
    "changes",
    [
        {"video": np.full((1, 2, 2, 3), np.nan, np.float32)},
        {"video": np.full((1, 2, 2, 3), 1e5, np.float32)},  # Above float16's largest.
        {"text_states": np.full((1, 2), 1e300)},
        {"fps": np.inf},
        {"fps": 1e300},
        {"score": np.nan},
    ],
)
def test_values_that_are_not_finite_are_refused_by_name(tmp_path, changes):
    splits = {"train": [FINE, {**FINE, **changes}]}
    with pytest.raises(ValueError, match="sample 1 of split 'train'"):
        write_records(tmp_path, "x", splits, description="d", numbers=["score"], **LATENTS)
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


def test_text_that_cannot_be_encoded_is_repaired_and_named(tmp_path, capsys):
    rows = [{**sample(0), "source": "caf\udce9"}, {**sample(1), "caption": "\ud83d", "source": "b"}]
    path = write_records(tmp_path, "x", {"train": rows}, description="d", texts=["source"])
    assert RecordsSource(RecordsConfig(str(path)))[1]["caption"] == "\ufffd"
    source = RecordsSource(RecordsConfig(str(path), caption_key="source"))
    assert source[0]["caption"] == "caf\ufffd"
    said = capsys.readouterr().err
    assert "2 texts" in said and "sample 0" in said
    assert np.load(path / "sizes-train.npy")[1, 3] == len("\ufffd".encode())


PEAK = """
import resource, sys
import numpy as np
from dit_jax.prepare.writing import write_records
def samples(start):
    for i in range(start, 320):
        video = np.random.default_rng(i).integers(0, 256, (50, 256, 256, 3), np.uint8)
        yield dict(video=video, caption=str(i), fps=8.0)
write_records(sys.argv[1], "big", {"train": samples}, description="d", encoding="bytes")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


@pytest.mark.slow
def test_three_gigabytes_are_written_in_little_memory(tmp_path):
    assert int(python(PEAK, tmp_path)) < 1024
    source = RecordsSource(RecordsConfig(str(tmp_path / "big" / "1.0.0")))
    assert source.sizes[:, 0].tolist() == [50] * 320
