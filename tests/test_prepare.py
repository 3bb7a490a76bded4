"""The verb, from a folder of media to records: what is in them, after a failure, on two machines."""

import dataclasses
import errno
import json
import os
import subprocess
import sys
import time
from functools import partial

import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds

from dit_jax.codec.causal_autoencoder import CausalAutoencoderConfig
from dit_jax.codec.config import codec_copies
from dit_jax.data import RecordsConfig, RecordsSource
from dit_jax.parallel import MeshConfig, make_mesh
from dit_jax.prepare import __main__ as verb
from dit_jax.prepare.__main__ import BatchConfig, CaptionsConfig, PrepareConfig, main, prepare
from dit_jax.prepare.clips import ClipConfig
from dit_jax.prepare.examining import ExamineConfig
from dit_jax.prepare.workers import WorkersConfig
from dit_jax.prepare.writing import _Split
from dit_jax.text.folders import load_text_encoder
from tests.codecs import make_codec
from tests.prepare.chat_server import Response, serving, words
from tests.prepare.made_media import moving, run_here, write_video
from tests.runs import ROOT, free_port
from tests.text_files import needs_tokenizers, write_t5

SMALL = ExamineConfig(clips=ClipConfig(area=32 * 32, max_seconds=2.0))


@pytest.fixture(autouse=True)
def here(monkeypatch):
    """Media are read in this process; what is `prepared`, and what the verb's processes do, is not."""
    monkeypatch.setattr("dit_jax.prepare.stages.run", run_here)


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    """Five good files, captioned in three ways or not at all, one twice, and four that are none."""
    folder = tmp_path_factory.mktemp("media")
    (folder / "deep").mkdir()
    for i, name in enumerate(["a.mp4", "b.mkv", "deep/c.mp4", "deep/d.mp4"]):
        size = (64, 96) if i % 2 else (80, 64)
        write_video(folder / name, moving(20 if i < 3 else 41, *size, i), 12)
    (folder / "e twice.mp4").write_bytes((folder / "a.mp4").read_bytes())
    (folder / "a.txt").write_text("squares, moving\n")
    (folder / "b.json").write_text(json.dumps({"caption": "B", "licence": "CC0"}))
    (folder / "table.csv").write_text("file,caption\ndeep/c.mp4,from the table\n")
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "cut.mp4").write_bytes((folder / "a.mp4").read_bytes()[:300])
    (folder / "notes.pdf").write_bytes(b"%PDF-1.4 nothing")
    (folder / ".hidden").write_bytes(b"x")
    return folder


def run(media, output, **changes):
    given = dict(examine=SMALL, batch=BatchConfig(files=2, clips=2), workers=WorkersConfig(count=1))
    given |= dict(captions=CaptionsConfig(table=str(media / "table.csv"), licence="mine"))
    return prepare(PrepareConfig(str(media), str(output), **{**given, **changes}), shown=False)


@pytest.fixture(scope="module")
def prepared(media, tmp_path_factory):
    output = tmp_path_factory.mktemp("prepared")
    return output, run(media, output)


def shards(output):
    files = sorted((output / "clips" / "1.0.0").iterdir())
    assert any("array_record" in file.name for file in files)
    return {file.name: file.read_bytes() for file in files}


def test_records_say_what_the_clips_are_and_where_from(prepared):
    output, _ = prepared
    source = tfds.data_source("clips", data_dir=output, split="train")
    names = [record["source"].decode() for record in source]
    # 41 frames at 12 fps are 3.4 s, at most 2 s a clip: two.
    assert names == ["a.mp4", "b.mkv", "deep/c.mp4", "deep/d.mp4", "deep/d.mp4"]
    a, b, c, d, d2 = source
    captions = [one["caption"] for one in (a, b, c, d)]
    assert captions == [b"squares, moving", b"B", b"from the table", b""]
    assert b["caption_origin"] == b"caption: sidecar" and c["caption_origin"] == b"caption: table"
    assert b["licence"] == b"CC0" and a["licence"] == b"mine"
    # 80 x 64 keeps its shape in 1024 pixels, in multiples of 16; 17 = 1 + 4 * 4 of 20 frames.
    samples = RecordsSource(RecordsConfig(str(output / "clips/1.0.0")))
    assert samples.sizes[:2].tolist() == [[17, 32, 16], [17, 16, 32]]
    assert (a["source_height"], a["source_width"], a["source_fps"]) == (80, 64, 12.0)
    assert a["fps"] == 12.0 and a["stop"] - a["start"] == pytest.approx(17 / 12)
    assert d2["start"] > d["start"] and d["stop"] <= d2["start"]
    pixels, mean = samples[0]["video"], moving(20, 80, 64, 0)[1:18, :, 4:-4].mean((0, 1, 2))
    assert pixels.shape == (17, 32, 16, 3) and np.abs(pixels.mean((0, 1, 2)) - mean).max() < 8


def test_every_file_is_accounted_for(prepared):
    output, about = prepared
    assert json.loads((output / "report.json").read_text()) == about
    assert about["files"] == 8 and about["sidecars"] == 2
    told = {file["path"]: file for file in about["by_file"]}
    assert told["empty.mp4"]["refusal"]["reason"] == "empty file"
    assert told["cut.mp4"]["refusal"] and told["notes.pdf"]["refusal"]
    assert told["e twice.mp4"]["clips"][0]["left_out"] == "near-duplicate: of a.mp4#0"
    assert about["files_by_reason"]["used"] == 4 and about["clips_by_reason"]["kept"] == 5
    assert about["captioned"] == 3 and about["bottleneck"]["stage"] in about["stages"]
    page = (output / "report.html").read_text()
    assert page.count("data:image/jpeg;base64") == 6 and "empty file" in page
    assert "squares, moving" in page and "src=" in page and "http" not in page


def test_nothing_is_done_twice_and_a_changed_caption_is_written_anew(media, prepared):
    output, _ = prepared
    before = shards(output)
    again = run(media, output)
    assert again["stages"]["examine"]["clips"] == 0 and "records" not in again["stages"]
    (media / "a.txt").write_text("other words\n")
    try:
        changed = run(media, output)
    finally:
        (media / "a.txt").write_text("squares, moving\n")
    assert changed["stages"]["examine"]["clips"] == 0 and "records" in changed["stages"]
    assert shards(output) != before
    run(media, output)
    assert shards(output) == before


def test_two_machines_make_the_same_records(media, prepared, tmp_path):
    for shard in ("1/2", "0/2"):
        assert run(media, tmp_path, shard=shard) is None
        assert not (tmp_path / "clips").exists()
    finished = run(media, tmp_path)
    assert finished["stages"]["examine"]["clips"] == 0
    assert shards(tmp_path) == shards(prepared[0])


def test_records_go_on_after_a_full_disk_and_keep_what_was_left_out(media, tmp_path, monkeypatch):
    """Every record is a shard, one clip cannot be read, and the disk is full at the third shard."""
    read = []

    def read_clips(kept, *arguments, **options):
        clips = list(kept)
        for one, outcome in zip(clips, read_all(clips, *arguments, **options), strict=True):
            read.append(one.name)
            gone = one.name.startswith("b.mkv")
            yield dataclasses.replace(outcome, reason="truncated", value=None) if gone else outcome

    read_all = verb.read_clips
    monkeypatch.setattr(verb, "read_clips", read_clips)
    monkeypatch.setattr(verb, "write_builder", partial(verb.write_builder, shard_bytes=1))
    expected = run(media, tmp_path / "whole")
    assert len(list((tmp_path / "whole" / "clips" / "1.0.0").glob("*array_record*"))) == 4

    def third(split, records, most):
        if len(split.lengths) == 2:
            next(records)
            raise OSError(errno.ENOSPC, "No space left on device")
        write_shard(split, records, most)

    write_shard = _Split._write_shard
    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr(_Split, "_write_shard", third)
        run(media, tmp_path / "cut")
    read.clear()
    # As if it had also been killed while records were written.
    unfinished = tmp_path / "cut" / "clips" / "1.0.0.incomplete"
    (unfinished / "half").write_bytes(b"x")
    about = run(media, tmp_path / "cut")
    assert read == ["deep/d.mp4#0", "deep/d.mp4#1"]
    assert about["stages"]["records"]["clips"] == 2
    assert [one["clips"] for one in about["by_file"]] == [
        one["clips"] for one in expected["by_file"]
    ]
    assert "truncated" in str(about["by_file"])
    assert shards(tmp_path / "cut") == shards(tmp_path / "whole")
    assert not unfinished.exists()


def test_what_cannot_be_is_refused(media, tmp_path, capsys):
    (tmp_path / "clips" / "1.0.0").mkdir(parents=True)
    for source in (media, tmp_path / "no"):
        assert main(["--input", str(source), "--output", str(tmp_path)]) == 2
        assert str(tmp_path / ("clips" if source == media else "no")) in capsys.readouterr().err
    for changes in ({"shard": "2/2"}, {"caption_server": "http://localhost:1"}):
        with pytest.raises(ValueError, match=str(*changes)[:4]):
            PrepareConfig(str(media), str(tmp_path), **changes)


@needs_tokenizers
def test_latents_and_states_are_those_of_codec_and_encoder(tmp_path, monkeypatch, capsys):
    few = tmp_path / "few"
    few.mkdir()
    for i in range(4):
        write_video(few / f"{i}.mp4", moving(7, 64, 64, i), 12)
        if i:
            (few / f"{i}.txt").write_text("a red circle " + "moves " * i)
    (few / "4 is 0.mp4").write_bytes((few / "0.mp4").read_bytes())
    # 2 x 2 x 2 pixels to a latent.
    shape = {"latent_channels": 3, "widths": (4, 4), "strides": ((2, 2),), "layers": 1}
    codec = make_codec(CausalAutoencoderConfig(**shape, mid_attention=False))
    encoder = load_text_encoder(write_t5(tmp_path / "t5"))
    # Opened once, so that they are compiled once.
    monkeypatch.setattr("dit_jax.codec.converting.load_codec", lambda path: codec)
    monkeypatch.setattr("dit_jax.text.config.load_text_encoder", lambda path, **_: encoder)
    tokens = lambda text: 10_000 if text == "a red circle moves moves" else 1  # noqa: E731
    monkeypatch.setattr("dit_jax.text.config.text_length", lambda path: (tokens, 512))
    copies = codec_copies(codec, make_mesh(MeshConfig(), jax.devices()[1:3]))
    monkeypatch.setattr("dit_jax.codec.converting.codec_copies", lambda *_: copies)
    given = {"text_encoder": "t5", "captions": CaptionsConfig(), "encoding": "zlib"}
    given["examine"] = ExamineConfig(clips=ClipConfig(area=16 * 16, min_seconds=0.4))
    run(few, tmp_path / "pixels", **given)
    pixels = list(RecordsSource(RecordsConfig(str(tmp_path / "pixels" / "clips" / "1.0.0"))))
    given["codec"] = "tiny"
    for shard, stages in (("1/2", 0), ("0/2", 2), ("1/2", 2)):
        assert run(few, tmp_path / "two", shard=shard, **given) is None
        # A share waits until the others are examined: which clips are near-duplicates is known then.
        made = list((tmp_path / "two" / "work").glob("latents/*/*/*.npy"))
        told = capsys.readouterr().out
        assert ("files of other shares are not" in told) == (not stages)
        assert len(made) == {"1/2": 2 * stages, "0/2": 2}[shard]
    next((tmp_path / "two" / "work").glob("latents/*/*/1.mp4*.npy")).unlink()
    about = run(few, tmp_path / "two", **given)
    assert about["stages"]["latents"]["clips"] == 2 and about["stages"]["examine"]["clips"] == 0
    assert about["clips_by_reason"] == {"kept": 4, "near-duplicate": 1} and about["captioned"] == 3
    assert about["notes"] == {"captions longer than the text encoder reads": 1}
    path = str(tmp_path / "two" / "clips" / "1.0.0")
    source = RecordsSource(RecordsConfig(path, text_states_key="text_states"))
    assert (source.codec, source.text_encoder) == (codec.hash, encoder.hash)
    assert tfds.builder_from_directory(path).info.metadata["codec_name"] == "tiny"
    for part in ((0, 1), (2, 3)):
        videos = np.stack([pixels[i]["video"] for i in part]).astype(np.float32) / 127.5 - 1
        states = encoder.encode(sorted(pixels[i]["caption"] for i in part))
        for i, expected, state in zip(part, codec.encode_many(videos), states, strict=True):
            found = source[i]
            # One device made what is expected, and two others what was found.
            np.testing.assert_array_equal(found["video"], expected.astype(np.float16))
            np.testing.assert_array_equal(found["text_states"], state.astype(np.float32))
            assert found["fps"] == 6.0 and found["caption"] == pixels[i]["caption"]


def test_clips_are_captioned_by_a_server_and_the_rest_next_time(media, tmp_path):
    down = True

    def respond(body, turn):
        if down and "squares" in words(body):
            return Response(status=400)
        short = words(body).startswith("Here is")
        return Response("Squares." if short else "Many squares go by.")

    with serving(respond) as server:
        asked = {"caption_server": server.url, "caption_model": "seer"}
        first = run(media, tmp_path, **asked)
        assert server.bill == 5  # What was to make the short ones was refused.
        assert len(first["problems"]) == 5 and first["captioned"] == 3
        down = False
        second = run(media, tmp_path, **asked)
        # Equal descriptions make equal requests.
        assert server.bill == 6 and not second["problems"] and second["captioned"] == 5
    a, *_, d = tfds.data_source("clips", data_dir=tmp_path, split="train")
    assert a["caption"] == b"squares, moving" and a["caption_short"] == b"Squares."
    assert d["caption"] == d["caption_descriptive"] == b"Many squares go by."
    assert d["caption_origin"].startswith(b"caption: model:seer; caption_short: model:seer")
    with pytest.raises(ValueError, match="127.0.0.1:9"):
        run(media, tmp_path / "one", **{**asked, "caption_server": "http://127.0.0.1:9"})


def command(media, output):
    """What starts the verb as ``run`` does, and its environment."""
    flags = {"--input": media, "--output": output, "--captions.table": media / "table.csv"}
    flags |= {"--examine.clips.area": 1024, "--examine.clips.max-seconds": 2}
    flags |= {"--captions.licence": "mine", "--batch.files": 2, "--batch.clips": 2}
    line = [sys.executable, "-m", "dit_jax.prepare", "--workers.count", "1"]
    line += [str(one) for pair in flags.items() for one in pair]
    return line, {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}


def test_records_after_sigkill_are_the_same_bytes(media, prepared, tmp_path):
    line, env = command(media, tmp_path)
    with subprocess.Popen(line, env=env, stderr=subprocess.DEVNULL) as process:
        while (
            sum(p.read_bytes().count(b"\n") for p in tmp_path.glob("work/examined/*/*.jsonl")) < 3
        ):
            assert process.poll() is None
            time.sleep(0.01)
        process.kill()
    assert not (tmp_path / "clips").exists()
    # As if it had been killed again, while records were written.
    (tmp_path / "clips" / "1.0.0.incomplete").mkdir(parents=True)
    (tmp_path / "clips" / "1.0.0.incomplete" / "half").write_bytes(b"x")
    assert run(media, tmp_path)["stages"]["examine"]["clips"] < 6
    assert shards(tmp_path) == shards(prepared[0])


@pytest.mark.slow
def test_two_processes_of_a_cluster_make_the_same_records(media, prepared, tmp_path):
    line, env = command(media, tmp_path)
    line += ["--coordinator", f"127.0.0.1:{free_port()}", "--num-processes", "2"]
    started = [subprocess.Popen([*line, "--process-id", str(i)], env=env) for i in range(2)]
    try:
        assert [process.wait(120) for process in started] == [0, 0]
    finally:
        for process in started:
            process.kill()
            process.wait()
    assert shards(tmp_path) == shards(prepared[0])
