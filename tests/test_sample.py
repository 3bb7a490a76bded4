"""Sampling as a user starts it, from a run that was trained by one process with one device.

Most of it runs in this process, whose devices are eight; so all of it is sharded.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
import pytest

from dit_jax import sample, train
from dit_jax.files import write_whole
from dit_jax.sampling import grid
from dit_jax.sampling.media import read_video, write_video
from tests.runs import CONFIG, Run, Verbs, end, free_port, item_arrays, upload_checkpoint

PROMPT = "a big red circle moves left"
OTHER = "a small green cross moves up"
UPSCALE = str(Path(CONFIG).with_name("tiny_upscale_config.py"))
ACROSS = 1
"""Grey levels of 255 that a pixel may differ by where the same sums are made in another order."""

Sampled = Callable[..., np.ndarray]


pytestmark = pytest.mark.usefixtures("cached")


@pytest.fixture
def sampled(whole: Run, tmp_path: Path) -> Sampled:
    """Samples in this process and gives the pixels of the file."""

    def run(
        *arguments: object, mode: str = "text", output: str = "clip.png", prompt: str = PROMPT
    ) -> np.ndarray:
        given = [mode, "--checkpoint", whole.directory, "--output", tmp_path / output, *arguments]
        if "--prompts-file" not in arguments:
            given += ["--prompt", prompt]
        assert sample.main([str(one) for one in given]) == 0
        return read_video(tmp_path / output)[0] if Path(output).suffix else np.zeros(0)

    return run


@pytest.fixture(scope="module")
def plain(cached: None, whole: Run, tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    """The strip of what is made of the prompt alone."""
    file = tmp_path_factory.mktemp("plain") / "clip.png"
    given = ["--checkpoint", str(whole.directory), "--output", str(file), "--prompt", PROMPT]
    assert sample.main(given) == 0
    return read_video(file)[0]


def test_a_clip_is_its_seeds_in_files_of_every_format(
    sampled: Sampled, plain: np.ndarray, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    assert plain.shape == (1, 24, 5 * 24, 3) and plain.std() > 0
    frames = np.stack(np.split(plain[0], 5, axis=1))
    # Enlarged, for mp4 halves the resolution of colours; GIF has but 256 of them.
    for output, error in (("clip.mp4", 8), ("clip.gif", 15)):
        clip = sampled("--scale", 4, output=output)
        assert capfd.readouterr().out == f"1 clip(s): {tmp_path / output}\n"
        assert clip.shape == (5, 96, 96, 3) and read_video(tmp_path / output)[1] == 8
        assert np.abs(clip[:, 1::4, 1::4].astype(int) - frames).mean() < error
    assert np.abs(sampled("--seed", 7).astype(int) - plain).mean() > 5


def test_sizes_and_lengths_that_were_not_trained(sampled: Sampled):
    strip = sampled("--frames", 13, "--height", 40, "--width", 24)
    assert strip.shape == (1, 40, 13 * 24, 3) and strip.std() > 0


def test_several_prompts_share_a_grid_or_a_directory(
    sampled: Sampled, plain: np.ndarray, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    other = sampled("--seed", 1, prompt=OTHER)
    file = tmp_path / "prompts.txt"
    file.write_text(f"{PROMPT}\n\n{OTHER}\n")
    together = sampled("--prompts-file", file)
    # Noise comes from a clip's own seed, whatever else is made.
    clips = [np.stack(np.split(strip[0], 5, axis=1)) for strip in (plain, other)]
    np.testing.assert_array_equal(together[0], np.concatenate(list(grid(clips)), axis=1))

    sampled("--num", 2, "--prompts-file", file, "--format", "png", output="clips")
    assert "4 clip(s) in" in capfd.readouterr().out
    slugs = [re.sub(" ", "-", prompt) for prompt in (PROMPT, PROMPT, OTHER, OTHER)]
    names = [f"{i:04d}-{slug}.png" for i, slug in enumerate(slugs)]
    assert sorted(path.name for path in (tmp_path / "clips").iterdir()) == names
    np.testing.assert_array_equal(read_video(tmp_path / "clips" / names[0])[0], plain)


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
    sampled: Sampled, tmp_path: Path, arguments: str, frames: int, known: dict[int, int]
):
    """Frames ``known`` (of those that come out: of the files', one after the other) are exact."""
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
    quick = ["--steps", 1, "--cfg-scale", 1]
    strip = sampled(*named[1:], "--fps", 8, "--seed", 2, *quick, mode=named[0])
    out, expected = np.stack(np.split(strip[0], frames, axis=1)), np.concatenate(inputs)
    for frame, number in known.items():
        np.testing.assert_array_equal(out[frame], expected[number])
    assert all(out[i].std() > 0 for i in range(frames))


def test_guidance_solver_steps_and_checkpoint_are_chosen(sampled: Sampled, plain: np.ndarray):
    changes = ["--cfg-scale", 1], ["--solver", "heun"], ["--step", 8], ["--negative-prompt", OTHER]
    strips = [plain] + [sampled(*change) for change in changes]
    for i, one in enumerate(strips):
        for other in strips[:i]:
            assert one.shape == other.shape and (one != other).any()


def test_eight_devices_make_what_one_makes(
    whole: Run, verbs: Verbs, sampled: Sampled, plain: np.ndarray, tmp_path: Path
):
    one = tmp_path / "one.png"
    arguments = ["--checkpoint", whole.directory, "--output", one, "--prompt", PROMPT]
    alone = verbs.start("sample", arguments)
    mesh = ["--mesh.data", 1, "--mesh.fsdp", 2, "--mesh.context", 2, "--mesh.tensor", 2]
    many = [plain, sampled(*mesh)]
    (ended,) = end(alone)
    assert ended.status == 0
    for clip in many:
        assert np.abs(clip - read_video(one)[0].astype(int)).max() <= ACROSS


@pytest.mark.parametrize("mode", ["extend", pytest.param("long", marks=pytest.mark.slow)])
def test_two_processes_make_what_one_makes(whole: Run, verbs: Verbs, tmp_path: Path, mode: str):
    if mode == "extend":
        file = tmp_path / "given.gif"
        pixels = np.random.default_rng(0).integers(0, 256, (5, 3, 3, 3), np.uint8)
        write_video(file, pixels.repeat(8, 1).repeat(8, 2), 8)
        # Both directions: two clips, a row for each process.
        asked = ["--prompt", PROMPT, "--video", file, "--forward", 2, "--backward", 2]
    else:
        # Longer than a window: what the first made is the history of the second, on both processes.
        asked = ["--prompt", PROMPT, OTHER, "--length", 9]
    given = [mode, "--checkpoint", whole.directory, *asked, "--seed", 5, "--output"]
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
def test_files_are_enlarged_on_every_mesh(tmp_path: Path):
    """A loop of four frames, which do not fill their last token, by a run of super-resolution."""
    run, file = tmp_path / "run", tmp_path / "small.gif"
    pixels = np.random.default_rng(0).integers(0, 256, (4, 3, 3, 3), np.uint8)
    write_video(file, pixels.repeat(4, 1).repeat(4, 2), 8)
    mesh = ["--mesh.data", 1, "--mesh.fsdp", 2, "--mesh.context", 2, "--mesh.tensor", 2]
    training = ["--config", UPSCALE, "--output", run, "--steps", 1, *mesh]
    training += ["--evaluators.1.prompts", 0, "--log.draw-every", 50]
    assert train.main([str(one) for one in training]) == 0
    out = []
    for name, where in (("one.png", []), ("many.png", mesh)):
        asked = ["upscale", "--checkpoint", run, "--videos", file, "--prompt", PROMPT, *where]
        assert sample.main([str(one) for one in [*asked, "--output", tmp_path / name]]) == 0
        out.append(read_video(tmp_path / name)[0].astype(int))
    assert out[0].shape == (1, 24, 4 * 24, 3) and out[0].std() > 0
    assert np.abs(out[0] - out[1]).max() <= ACROSS


def test_run_prompts_and_output_lie_on_cloud_storage(
    whole: Run, plain: np.ndarray, bucket: str, capfd: pytest.CaptureFixture[str]
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


def test_a_prompt_that_is_cut_is_told_once(
    whole: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    """The tiny model reads 47 bytes, of Chinese 15 characters."""
    long = "雪" * 20
    arguments = ["--checkpoint", str(whole.directory), "--output", str(tmp_path / "clips")]
    arguments += ["--steps", "1", "--frames", "1", "--format", "png", "--num", "2"]
    arguments += ["--prompt", long, "a cat", "--negative-prompt", "b" * 48]
    assert sample.main(arguments) == 0
    err = capfd.readouterr().err
    (line,) = [line for line in err.splitlines() if "are longer than" in line]
    assert "2 of 3 texts are longer than the 47 bytes" in line and f"has 60: {long!r}" in line


def test_averaged_weights_are_all_that_is_read(
    whole: Run, sampled: Sampled, plain: np.ndarray, tmp_path: Path
):
    run = tmp_path / "run"
    shutil.copytree(whole.directory, run)
    for item in ("params", "opt", "data"):
        shutil.rmtree(run / "checkpoints" / "20" / item)
    np.testing.assert_array_equal(sampled("--checkpoint", run), plain)


# Bad input: refused at once, with the value, the constraint and the remedy.

Refused = Callable[..., str]


@pytest.fixture
def refused(whole: Run, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Refused:
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
        (["--width", "-8"], ["width is -8"]),
        (["--fps", "inf"], ["fps is inf"]),
        (["--frames", "x"], ["'x'", "--frames"]),
        (["--speed", "2"], ["--speed"]),
        (["--steps", "0"], ["steps is 0"]),
        (["--num", "0"], ["num is 0"]),
        (["--mesh.context", "3"], ["context 3", "8 device(s)", "Change mesh.*"]),
        (["--step", "3"], ["no checkpoint of step 3: there are [4, 8, 12, 16, 20]"]),
        (["--output", "clip.avi"], ["extension '.avi'", ".mp4, .gif, .png"]),
        (["--output", f"{CONFIG}/clip.mp4"], [f"{CONFIG}' cannot be written"]),
        (["--output", "/proc/clips"], ["'/proc/clips' cannot be written"]),
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


def test_bytes_that_are_no_text_are_refused(refused: Refused):
    for option in ("--prompt", "--negative-prompt"):
        prompt = [] if option == "--prompt" else ["--prompt", PROMPT]
        assert "'caf\\udce9'" in refused(*prompt, option, os.fsdecode(b"caf\xe9"))


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
