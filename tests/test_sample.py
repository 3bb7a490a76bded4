"""Sampling as a user starts it, from a run that was trained by one process with one device.

Most of it runs in this process, on one device.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from dit_jax import sample, train
from dit_jax.files import write_whole
from dit_jax.sampling import Generator, grid
from dit_jax.sampling.media import read_video, write_video
from tests.runs import CONFIG, Run, Verbs, end, free_port, item_arrays, upload_checkpoint

PROMPT = "a big red circle moves left"
OTHER = "a small green cross moves up"
UPSCALE = str(Path(CONFIG).with_name("tiny_upscale_config.py"))
ACROSS = 1
"""Grey levels of 255 that a pixel may differ by where the same sums are made in another order."""

Captured = pytest.CaptureFixture[str]
Refused = Callable[..., str]
Sampled = Callable[..., np.ndarray]
pytestmark = pytest.mark.usefixtures("device")


@pytest.fixture(scope="module")
def device() -> Iterator[pytest.MonkeyPatch]:
    """One device; what is undone has eight."""
    with pytest.MonkeyPatch.context() as patch:
        first = jax.devices()[:1]
        for name in ("devices", "local_devices"):
            patch.setattr(jax, name, lambda: first)
        yield patch


@pytest.fixture(scope="module")
def run(whole: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What sampling reads of the run: averaged weights and configs."""
    directory = tmp_path_factory.mktemp("run") / "run"
    ignore = shutil.ignore_patterns("params", "opt", "data")
    shutil.copytree(
        whole.directory,
        directory,
        ignore=lambda at, names: ignore(at, names) if Path(at).parent.name == "checkpoints" else [],
    )
    return directory


@pytest.fixture
def sampled(run: Path, tmp_path: Path) -> Sampled:
    """Samples in this process and gives the pixels of the file."""

    def sampled(
        *arguments: object, mode: str = "text", output: str = "clip.png", prompt: str = PROMPT
    ) -> np.ndarray:
        given = [mode, "--checkpoint", run, "--output", tmp_path / output, *arguments]
        if "--prompts-file" not in arguments:
            given += ["--prompt", prompt]
        assert sample.main([str(one) for one in given]) == 0
        return read_video(tmp_path / output)[0] if Path(output).suffix else np.zeros(0)

    return sampled


@pytest.fixture(scope="module")
def plain(device: Any, run: Path, tmp_path_factory: Any) -> np.ndarray:
    """The strip of what is made of the prompt alone."""
    file = tmp_path_factory.mktemp("plain") / "clip.png"
    given = ["--checkpoint", str(run), "--output", str(file), "--prompt", PROMPT]
    assert sample.main(given) == 0
    return read_video(file)[0]


def frames_of(strip: np.ndarray, count: int = 5) -> np.ndarray:
    return np.stack(np.split(strip[0], count, axis=1))


def test_a_clip_is_enlarged_in_a_file_of_video(
    sampled: Sampled, plain: np.ndarray, tmp_path: Path, capfd: Captured
):
    assert plain.shape == (1, 24, 5 * 24, 3) and plain.std() > 0
    # For mp4 halves the resolution of colours.
    clip = sampled("--scale", 4, output="clip.mp4")
    assert capfd.readouterr().out == f"1 clip(s): {tmp_path / 'clip.mp4'}\n"
    assert clip.shape == (5, 96, 96, 3) and read_video(tmp_path / "clip.mp4")[1] == 8
    assert np.abs(clip[:, 1::4, 1::4].astype(int) - frames_of(plain)).mean() < 8


def test_several_prompts_share_a_grid_or_a_directory(
    sampled: Sampled, plain: np.ndarray, tmp_path: Path, capfd: Captured
):
    file = tmp_path / "prompts.txt"
    file.write_text(f"{PROMPT}\n\n{OTHER}\n")
    sampled("--num", 2, "--prompts-file", file, "--format", "png", output="clips")
    assert "4 clip(s) in" in capfd.readouterr().out
    slugs = [re.sub(" ", "-", prompt) for prompt in (PROMPT, PROMPT, OTHER, OTHER)]
    names = [f"{i:04d}-{slug}.png" for i, slug in enumerate(slugs)]
    assert sorted(path.name for path in (tmp_path / "clips").iterdir()) == names
    strips = [read_video(tmp_path / "clips" / name)[0] for name in names]
    # Noise comes from a clip's own seed, whatever else is made.
    for strip, alone in ((strips[0], plain), (strips[3], sampled("--seed", 3, prompt=OTHER))):
        assert np.abs(strip.astype(int) - alone).max() <= ACROSS
    assert np.abs(strips[1].astype(int) - plain).mean() > 5
    together = sampled("--num", 2, "--prompts-file", file)
    clips = [frames_of(strip) for strip in strips]
    np.testing.assert_array_equal(together[0], np.concatenate(list(grid(clips)), axis=1))


def test_a_long_clip_begins_as_the_plain_one_and_follows_its_storyboard(
    sampled: Sampled, plain: np.ndarray, tmp_path: Path
):
    strip = sampled("--length", 13, mode="long")
    assert strip.shape == (1, 24, 13 * 24, 3) and strip.std() > 0
    np.testing.assert_array_equal(strip[:, :, : 5 * 24], plain)

    board = tmp_path / "board.txt"
    board.write_text(f"0s: {PROMPT}\n1.1s: {OTHER}\n")
    # New frames 5 to 6, 7 to 8, 9 to 10: the last have their middle behind 1.1 s of 8 a second.
    other = sampled("--length", 13, "--storyboard", board, mode="long")
    np.testing.assert_array_equal(other[:, :, : 9 * 24], strip[:, :, : 9 * 24])
    assert (other[:, :, 9 * 24 :] != strip[:, :, 9 * 24 :]).any()


@pytest.mark.parametrize(
    ("arguments", "frames", "known"),
    [
        ("image --image A --keyframe 4=B", 5, {0: 0, 4: 1}),
        ("video --video A --strength 0.5", 5, {}),
        ("extend --video A --forward 2 --context 3", 7, {i: i for i in range(5)}),
        ("connect --videos A B --gap 3", 13, {0: 0, 4: 4, 8: 5, 12: 9}),
        ("loop --video A --gap 3", 8, {0: 0, 4: 4}),
        ("interpolate --video A --factor 2", 9, {0: 0, 2: 1, 8: 4}),
        ("loop", 4, {}),
        ("long --start A --length 13", 13, {i: i for i in range(5)}),
    ],
)
def test_every_mode_keeps_what_is_known(
    sampled: Sampled,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: str,
    frames: int,
    known: dict[int, int],
):
    """Frames ``known`` (of those that come out: of the files', one after the other) are exact, even if
    the model makes noise; tests/sampling/test_modes.py has one that makes clips."""
    noise = lambda self, _, inputs, *rest: self.begin(inputs, np.float32(1))[0]  # noqa: E731
    monkeypatch.setattr(Generator, "__call__", noise)
    rng = np.random.default_rng(0)
    files = {name: tmp_path / f"{name}.gif" for name in "AB"}
    for file in files.values():
        write_video(
            file, np.repeat(rng.integers(0, 256, (5, 3, 3, 3), np.uint8), 8, 1).repeat(8, 2), 8
        )
    inputs = [read_video(file)[0] for file in files.values()]
    if "image" in arguments:
        inputs = [clip[:1] for clip in inputs]
    named = re.sub(r"\b[AB]\b", lambda m: str(files[m[0]]), arguments).split()
    strip = sampled(*named[1:], "--fps", 8, "--seed", 2, mode=named[0])
    out, expected = frames_of(strip, frames), np.concatenate(inputs)
    for frame, number in known.items():
        np.testing.assert_array_equal(out[frame], expected[number])
    assert all(out[i].std() > 0 for i in range(frames))


def test_guidance_negative_prompt_and_checkpoint_are_chosen(sampled: Sampled, plain: np.ndarray):
    changes = ["--cfg-scale", 1], ["--step", 8], ["--negative-prompt", OTHER]
    strips = [plain] + [sampled(*change) for change in changes]
    for one, other in itertools.combinations(strips, 2):
        assert one.shape == other.shape and (one != other).any()


MESH = ["--mesh.data", 1, "--mesh.fsdp", 2, "--mesh.context", 2, "--mesh.tensor", 2]


@pytest.fixture
def eight(device: pytest.MonkeyPatch) -> Iterator[None]:
    """All devices that there are."""
    one = {name: getattr(jax, name) for name in ("devices", "local_devices")}
    device.undo()
    yield
    for name, function in one.items():
        device.setattr(jax, name, function)


def test_eight_devices_make_what_one_makes(plain: np.ndarray, eight: None, sampled: Sampled):
    for mesh in ([], MESH):
        assert np.abs(sampled(*mesh).astype(int) - plain).max() <= ACROSS


@pytest.mark.parametrize("mode", ["extend", pytest.param("long", marks=pytest.mark.slow)])
def test_two_processes_make_what_one_makes(run: Path, verbs: Verbs, tmp_path: Path, mode: str):
    if mode == "extend":
        file = tmp_path / "given.gif"
        pixels = np.random.default_rng(0).integers(0, 256, (5, 3, 3, 3), np.uint8)
        write_video(file, pixels.repeat(8, 1).repeat(8, 2), 8)
        # Both directions: two clips, a row for each process.
        asked = ["--prompt", PROMPT, "--video", file, "--forward", 2, "--backward", 2]
    else:
        # Longer than a window: what the first made is the history of the second, on both processes.
        asked = ["--prompt", PROMPT, OTHER, "--length", 9]
    given = [mode, "--checkpoint", run, *asked, "--seed", 5, "--steps", 2, "--output"]
    alone, shared = tmp_path / "alone.png", tmp_path / "shared.png"
    assert sample.main([str(one) for one in [*given, alone]]) == 0
    port = free_port()
    alike = dataclasses.replace(verbs, cache=verbs.logs / str(port))
    ended = end(*(alike.start("sample", [*given, shared], place=(i, 2, port)) for i in (0, 1)))
    assert [one.status for one in ended] == [0, 0]
    assert "clip(s)" in ended[0].text and "clip(s)" not in ended[1].text
    one, two = read_video(alone)[0], read_video(shared)[0]
    assert one.shape == two.shape and one.std() > 0
    assert np.abs(one.astype(int) - two).max() <= ACROSS


@pytest.mark.slow
def test_files_are_enlarged_on_every_mesh(eight: None, tmp_path: Path):
    """A loop of four frames, which do not fill their last token, by a run of super-resolution."""
    run, file = tmp_path / "run", tmp_path / "small.gif"
    pixels = np.random.default_rng(0).integers(0, 256, (4, 3, 3, 3), np.uint8)
    write_video(file, pixels.repeat(4, 1).repeat(4, 2), 8)
    training = ["--config", UPSCALE, "--output", run, "--steps", 1, *MESH]
    training += ["--evaluators.1.prompts", 0, "--log.draw-every", 50]
    assert train.main([str(one) for one in training]) == 0
    out = []
    for name, where in (("one.png", []), ("many.png", MESH)):
        asked = ["upscale", "--checkpoint", run, "--videos", file, "--prompt", PROMPT, *where]
        assert sample.main([str(one) for one in [*asked, "--output", tmp_path / name]]) == 0
        out.append(read_video(tmp_path / name)[0].astype(int))
    assert out[0].shape == (1, 24, 4 * 24, 3) and out[0].std() > 0
    assert np.abs(out[0] - out[1]).max() <= ACROSS


def test_run_prompts_and_output_lie_on_cloud_storage(
    whole: Run, plain: np.ndarray, bucket: str, capfd: Captured
):
    run = upload_checkpoint(whole.directory, 20, f"{bucket}/run")
    write_whole(f"{bucket}/prompts.txt", f"{PROMPT}\n")
    out = f"{bucket}/clips/clip.png"
    given = ["--checkpoint", run, "--output", out, "--prompts-file", f"{bucket}/prompts.txt"]
    assert sample.main([str(one) for one in given]) == 0
    assert capfd.readouterr().out == f"1 clip(s): {out}\n"
    np.testing.assert_array_equal(read_video(out)[0], plain)
    assert sample.main(["--checkpoint", "gs://nobody-has-this/run", "--prompt", PROMPT]) == 2
    assert "gs://nobody-has-this/run" in capfd.readouterr().err


def test_a_prompt_that_is_cut_is_told_once(run: Path, tmp_path: Path, capfd: Captured):
    """The tiny model reads 47 bytes, of Chinese 15 characters. Neither size nor length was trained."""
    long, size = "雪" * 20, "--frames 13 --height 40 --width 24"
    arguments = ["--checkpoint", str(run), "--output", str(tmp_path), *size.split()]
    arguments += ["--steps", "1", "--format", "png", "--num", "2"]
    arguments += ["--prompt", long, "a cat", "--negative-prompt", "b" * 48]
    assert sample.main(arguments) == 0
    err = capfd.readouterr().err
    (line,) = [line for line in err.splitlines() if "are longer than" in line]
    assert "2 of 3 texts are longer than the 47 bytes" in line and f"has 60: {long!r}" in line
    strips = [read_video(file)[0] for file in tmp_path.glob("*.png")]
    assert [strip.shape for strip in strips] == [(1, 40, 13 * 24, 3)] * 4
    assert all(strip.std() > 0 for strip in strips)


COUNTED = """
import atexit, collections, json, os, runpy, sys
os.environ["XDG_CACHE_HOME"] = sys.argv.pop(1)
for name in ("COMPILATION_CACHE_DIR", "PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"):
    del os.environ[f"JAX_{name}"]
import jax
counts = collections.Counter()
jax.monitoring.register_event_listener(lambda name, **_: counts.update([name.split("/")[-1]]))
atexit.register(lambda: print(json.dumps(counts)))
runpy.run_module("dit_jax.sample", run_name="__main__", alter_sys=True)
"""
"""Sampling as a user starts it, who keeps programs in a cache of their own; then what JAX counted."""


def test_the_second_start_compiles_nothing(run: Path, verbs: Verbs, tmp_path: Path):
    cache, counted = tmp_path / "cache", []
    for name in ("first", "second"):
        given = [cache, "--checkpoint", run, "--output", tmp_path / f"{name}.png"]
        (ended,) = end(verbs.start("sample", [*given, "--prompt", PROMPT], code=COUNTED))
        assert ended.status == 0
        counts = json.loads(ended.text.splitlines()[-1])
        found = (counts.get(f"cache_{what}", 0) for what in ("misses", "hits"))
        counted.append((counts["compile_requests_use_cache"], *found))
    programs = counted[0][0]
    assert counted == [(programs, programs, 0), (programs, 0, programs)]
    # What the host knows is computed there: these are the steps of sampling themselves.
    assert programs <= 6
    assert (tmp_path / "first.png").read_bytes() == (tmp_path / "second.png").read_bytes()


# Bad input: refused at once, with the value, the constraint and the remedy.


@pytest.fixture
def refused(whole: Run, capfd: Captured, tmp_path: Path) -> Refused:
    """Runs the verb and gives its message, without the frame."""

    def run(*arguments: object) -> str:
        given = ["--checkpoint", whole.directory, "--output", tmp_path / "clip.mp4", *arguments]
        clock = time.perf_counter()
        try:
            status = sample.main([str(one) for one in given])
        except SystemExit as error:
            status = error.code
        text = capfd.readouterr().err
        assert status == 2 and "Traceback" not in text and "sampling:" not in text
        assert time.perf_counter() - clock < 20
        assert not (tmp_path / "clip.mp4").exists()
        return " ".join(re.sub("[╭─╮│╰╯]", " ", text).split())

    return run


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ([], ["nothing to make: give --prompt"]),
        (["--prompts-file", "/none"], ["'/none'", "check the path"]),
        (["--frames", "4"], ["4 frames", "3 and 5"]),
        (["--height", "20"], ["height 20", "16 and 24"]),
        (["--steps", "0"], ["steps is 0"]),
        (["--mesh.context", "3"], ["context 3", "1 device(s)", "Change mesh.*"]),
        (["--step", "3"], ["no checkpoint of step 3: there are [4, 8, 12, 16, 20]"]),
        (["--output", "clip.avi"], ["extension '.avi'", ".mp4, .gif, .png"]),
        (["--output", f"{CONFIG}/clip.mp4"], [f"{CONFIG}' cannot be written"]),
        (["--output", "/proc/clips"], ["'/proc/clips' cannot be written"]),
        (["--negative-prompt", os.fsdecode(b"caf\xe9")], ["'caf\\udce9'"]),
        (["--checkpoint", "/none"], ["'/none' is not there: give the output directory"]),
        (["--checkpoint", str(CONFIG.parent)], ["holds no checkpoints: give the output directory"]),
    ],
    ids=lambda value: " ".join(value)[-40:] if isinstance(value, list) else None,
)
def test_bad_value_is_refused(refused: Refused, arguments: list[str], parts: list[str]):
    prompt = [] if not arguments or arguments[0] == "--prompts-file" else ["--prompt", PROMPT]
    message = refused(*prompt, *arguments)
    for part in parts:
        assert part in message


def test_run_that_cannot_be_read_is_refused(whole: Run, refused: Refused, tmp_path: Path):
    run = tmp_path / "run"
    shutil.copytree(whole.directory, run)
    config = run / "checkpoints" / "20" / "config" / "metadata"
    text = config.read_text()
    stored = json.loads(text)

    def message() -> str:
        return refused("--checkpoint", run, "--prompt", PROMPT)

    stored["model"]["dit"]["width"] = 64
    config.write_text(json.dumps(stored))
    assert "checkpoints/20' cannot be read" in message()
    stored["model"]["dit"]["width"], stored["model"]["text"]["depth"] = 32, 2
    config.write_text(json.dumps(stored))
    assert "checkpoints/20' cannot be read" in message()
    stored["speed"] = 1
    config.write_text(json.dumps(stored))
    assert "holds no config" in (unknown := message()) and "'speed'" in unknown
    config.write_text("[]")
    assert "holds no config that this version" in message()
    config.write_text("{")
    assert "checkpoints/20" in message()

    config.write_text(text)
    shutil.rmtree(run / "checkpoints" / "20" / "ema")
    assert "checkpoints/20' cannot be read" in message()
    shutil.rmtree(run / "checkpoints")
    (run / "checkpoints").mkdir()
    assert "has no finished checkpoint yet: wait" in message()


def test_parameters_that_are_not_finite_are_refused(whole: Run, refused: Refused, tmp_path: Path):
    run = tmp_path / "run"
    shutil.copytree(whole.directory, run)
    averages = item_arrays(run, 20, "ema")
    averages["params"]["dit"]["final"]["bias"][0] = np.nan
    path = run / "checkpoints" / "20" / "ema"
    shutil.rmtree(path)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, averages)
    message = refused("--checkpoint", run, "--prompt", PROMPT)
    assert "checkpoints/20' has parameters that are NaN or infinite" in message
    assert "choose an earlier --step, of [4, 8, 12, 16, 20]" in message
