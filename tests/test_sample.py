"""Sampling as a user starts it, from a run that was trained by one process with one device.

Most of it runs in this process, whose devices are eight; so all of it is sharded.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
import pytest

from dit_jax import sample
from dit_jax.files import write_whole
from dit_jax.prepare import read_prompts
from dit_jax.prepare.prompting import read_prompt
from dit_jax.sampling import grid
from dit_jax.sampling.media import read_video, write_video
from tests.optional import optional
from tests.prepare.chat_server import Response, serving, words
from tests.runs import CONFIG, Run, Verbs, end, free_port, item_arrays, upload_checkpoint

PROMPT = "a big red circle moves left"
OTHER = "a small green cross moves up"
ACROSS = 1
"""Grey levels of 255 that a pixel may differ by where the same sums are made in another order."""

Sampled = Callable[..., np.ndarray]


pytestmark = pytest.mark.usefixtures("cached")


@pytest.fixture
def sampled(whole: Run, tmp_path: Path) -> Sampled:
    """Samples in this process and gives the pixels of the file."""

    def run(*arguments: object, output: str = "clip.png", prompt: str = PROMPT) -> np.ndarray:
        given = ["--checkpoint", whole.directory, "--output", tmp_path / output, *arguments]
        if "--prompts-file" not in arguments:
            given += ["--prompt", prompt]
        assert sample.main([str(one) for one in given]) == 0
        return read_video(tmp_path / output)[0] if Path(output).suffix else np.zeros(0)

    return run


def test_files_of_every_format(sampled: Sampled, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    strip = sampled()
    assert strip.shape == (1, 24, 5 * 24, 3) and strip.std() > 0
    assert capfd.readouterr().out == f"1 clip(s): {tmp_path / 'clip.png'}\n"
    frames = np.stack(np.split(strip[0], 5, axis=1))
    # Enlarged, for mp4 halves the resolution of colours; GIF has but 256 of them.
    for output, error in (("clip.mp4", 8), ("clip.gif", 15)):
        clip = sampled("--scale", 4, output=output)
        assert clip.shape == (5, 96, 96, 3) and read_video(tmp_path / output)[1] == 8
        assert np.abs(clip[:, 1::4, 1::4].astype(int) - frames).mean() < error


def test_same_seed_is_the_same_file_and_another_is_not(sampled: Sampled, tmp_path: Path):
    first = sampled("--seed", 7, output="a.mp4")
    sampled("--seed", 7, output="b.mp4")
    other = sampled("--seed", 8, output="c.mp4")
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()
    assert np.abs(first.astype(int) - other).mean() > 5


@pytest.mark.parametrize(
    ("frames", "height", "width"), [(13, 40, 24), (1, 24, 24)], ids=["longer and larger", "image"]
)
def test_sizes_and_lengths_that_were_not_trained(
    sampled: Sampled, frames: int, height: int, width: int
):
    strip = sampled("--frames", frames, "--height", height, "--width", width)
    assert strip.shape == (1, height, frames * width, 3) and strip.std() > 0


def test_several_prompts_share_a_grid_or_a_directory(
    sampled: Sampled, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    alone = [sampled(prompt=PROMPT), sampled("--seed", 1, prompt=OTHER)]
    file = tmp_path / "prompts.txt"
    file.write_text(f"{PROMPT}\n\n{OTHER}\n")
    together = sampled("--prompts-file", file)
    # Noise comes from a clip's own seed, whatever else is made.
    clips = [np.stack(np.split(strip[0], 5, axis=1)) for strip in alone]
    np.testing.assert_array_equal(together[0], np.concatenate(list(grid(clips)), axis=1))

    sampled("--num", 2, "--prompts-file", file, "--format", "png", output="clips")
    assert "4 clip(s) in" in capfd.readouterr().out
    slugs = [re.sub(" ", "-", prompt) for prompt in (PROMPT, PROMPT, OTHER, OTHER)]
    names = [f"{i:04d}-{slug}.png" for i, slug in enumerate(slugs)]
    assert sorted(path.name for path in (tmp_path / "clips").iterdir()) == names
    np.testing.assert_array_equal(read_video(tmp_path / "clips" / names[0])[0], alone[0])


def test_a_long_clip_begins_as_the_plain_one_and_follows_its_storyboard(
    whole: Run, sampled: Sampled, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    strip = sampled("--long", 13)
    assert strip.shape == (1, 24, 13 * 24, 3) and strip.std() > 0
    assert "1 clip(s) of 13 frames in 5 windows" in capfd.readouterr().out
    np.testing.assert_array_equal(strip[:, :, : 5 * 24], sampled())

    board, told = tmp_path / "board.txt", tmp_path / "told.png"
    board.write_text(f"0s: {PROMPT}\n1.1s: {OTHER}\n")
    arguments = ["--checkpoint", whole.directory, "--output", told, "--long", 13]
    assert sample.main([str(one) for one in [*arguments, "--storyboard", board]]) == 0
    # New frames 5 to 6, 7 to 8, 9 to 10: the last have their middle behind 1.1 s of 8 a second.
    other = read_video(told)[0]
    np.testing.assert_array_equal(other[:, :, : 9 * 24], strip[:, :, : 9 * 24])
    assert (other[:, :, 9 * 24 :] != strip[:, :, 9 * 24 :]).any()
    assert not list(tmp_path.glob("*.npz"))


@pytest.mark.parametrize(
    ("arguments", "frames", "held"),
    [
        (["--image", "A", "--keyframe", "4=B"], 5, {0: 0, 4: 1}),
        (["--keyframe", "0=A", "--keyframe", "4=B"], 5, {0: 0, 4: 1}),
        (["--video", "A", "--strength", "0.5"], 5, {}),
        (
            ["--extend", "A", "--forward", "2", "--backward", "2"],
            9,
            dict(zip(range(2, 7), range(5), strict=True)),
        ),
        (["--connect", "A", "B", "--gap", "3"], 13, {0: 0, 4: 4, 8: 5, 12: 9}),
        (["--video", "A", "--loop", "--gap", "3"], 8, {0: 0, 4: 4}),
        (["--video", "A", "--interpolate", "2x"], 9, {0: 0, 2: 1, 8: 4}),
        (["--loop"], 4, {}),
        (["--image", "A", "--long", "9"], 9, {0: 0}),
        (["--extend", "A", "--long", "13"], 13, {i: i for i in range(5)}),
        (["--image", "A", "--last-image", "B", "--duration", "1s"], 9, {0: 0, 8: 5}),
        (["--connect", "A", "B", "--blend", "5"], 5, {0: 0, 3: 8, 4: 9}),
        (["--extend", "A", "--forward", "2", "--context", "3"], 7, {i: i for i in range(5)}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_every_mode_keeps_what_is_given(
    sampled: Sampled, tmp_path: Path, arguments: list[str], frames: int, held: dict[int, int]
):
    """Frames ``held`` (of those that are made: of the files', one after the other) come out exactly."""
    optional("av")
    rng = np.random.default_rng(0)
    files = {name: tmp_path / f"{name}.gif" for name in "AB"}
    for file in files.values():
        write_video(
            file, np.repeat(rng.integers(0, 256, (5, 3, 3, 3), np.uint8), 8, 1).repeat(8, 2), 8
        )
    given = [read_prompt(file, 24, 24, 8.0) for file in files.values()]
    if any("=" in one for one in arguments):
        given = [clip[:1] for clip in given]
    named = [re.sub(r"\b[AB]$", lambda m: str(files[m[0]]), one) for one in arguments]
    strip = sampled(*named, "--fps", 8, "--seed", 2)
    made = np.stack(np.split(strip[0], frames, axis=1))
    shown = np.concatenate(given)
    for frame, number in held.items():
        np.testing.assert_array_equal(made[frame], shown[number])
    free = [made[i] for i in range(frames) if i not in held]
    assert all(frame.std() > 0 for frame in free)


def test_guidance_solver_steps_and_checkpoint_are_chosen(sampled: Sampled):
    changes = ["--cfg-scale", 1], ["--solver", "heun"], ["--steps", 4], ["--step", 8]
    changes = *changes, ["--negative-prompt", OTHER]
    strips = [sampled()] + [sampled(*change) for change in changes]
    for i, one in enumerate(strips):
        for other in strips[:i]:
            assert one.shape == other.shape and (one != other).any()


def test_eight_devices_make_what_one_makes(
    whole: Run, verbs: Verbs, sampled: Sampled, tmp_path: Path
):
    one = tmp_path / "one.png"
    arguments = ["--checkpoint", whole.directory, "--output", one, "--prompt", PROMPT]
    alone = verbs.start("sample", arguments)
    mesh = ["--mesh.data", 1, "--mesh.fsdp", 2, "--mesh.context", 2, "--mesh.tensor", 2]
    many = [sampled(), sampled(*mesh)]
    (ended,) = end(alone)
    assert ended.status == 0
    for clip in many:
        assert np.abs(clip - read_video(one)[0].astype(int)).max() <= ACROSS


def test_run_prompts_and_output_lie_on_cloud_storage(
    whole: Run, sampled: Sampled, bucket: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    run = upload_checkpoint(whole.directory, 20, f"{bucket}/run")
    write_whole(f"{bucket}/prompts.txt", f"{PROMPT}\n")
    out = f"{bucket}/clips/clip.png"
    given = ["--checkpoint", run, "--output", out, "--prompts-file", f"{bucket}/prompts.txt"]
    assert sample.main([str(one) for one in given]) == 0
    assert capfd.readouterr().out == f"1 clip(s): {out}\n"
    np.testing.assert_array_equal(read_video(out)[0], sampled())
    assert sample.main(["--checkpoint", "gs://nobody-has-this/run", "--prompt", PROMPT]) == 2
    assert "gs://nobody-has-this/run" in capfd.readouterr().err


def test_a_prompt_that_is_cut_is_told_once(
    whole: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    """The tiny model reads 47 bytes, of Chinese 15 characters."""
    long = "雪" * 20
    arguments = ("--prompt", long, "a cat", "--num", "2", "--negative-prompt", "b" * 48)
    assert run_small(whole, tmp_path / "clips", *arguments) == 0
    err = capfd.readouterr().err
    (line,) = [line for line in err.splitlines() if "are longer than" in line]
    assert "2 of 3 texts are longer than the 47 bytes" in line and f"has 60: {long!r}" in line


def test_averaged_weights_are_all_that_is_read(whole: Run, sampled: Sampled, tmp_path: Path):
    run = tmp_path / "run"
    shutil.copytree(whole.directory, run)
    for item in ("params", "opt", "data"):
        shutil.rmtree(run / "checkpoints" / "20" / item)
    np.testing.assert_array_equal(sampled("--checkpoint", run), sampled())


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
        (["--frames", "4"], ["4 frames", "1 + 2n", "nearest are 3 and 5"]),
        (["--frames", "0"], ["frames is 0", "at least 1"]),
        (["--height", "20"], ["height 20 is not a multiple of the patch's 8", "16 and 24"]),
        (["--width", "-8"], ["width is -8", "at least 1"]),
        (["--fps", "0"], ["fps is 0.0", "above 0"]),
        (["--fps", "inf"], ["fps is inf", "finite"]),
        (["--frames", "x"], ["'x'", "--frames", "INT"]),
        (["--speed", "2"], ["Unrecognized options: --speed"]),
        (["--solver", "rk4"], ["'rk4'", "--solver", "heun"]),
        (["--steps", "0"], ["steps is 0", "at least 1"]),
        (["--num", "0"], ["--num 0", "at least 1"]),
        (["--mesh.context", "3"], ["context 3", "8 device(s)", "Change mesh.*"]),
        (["--step", "3"], ["no checkpoint of step 3: there are [4, 8, 12, 16, 20]"]),
        (["--output", "clip.avi"], ["extension '.avi'", ".mp4, .gif, .png"]),
        (["--output", f"{CONFIG}/clip.mp4"], ["cannot be written", "give another path"]),
        (["--output", "/proc/clips"], ["'/proc/clips' cannot be written", "give another"]),
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


@pytest.mark.parametrize("option", ["--prompt", "--negative-prompt", "--output", "--image"])
def test_bytes_that_are_no_text_are_refused(refused: Refused, option: str):
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
    assert "checkpoints/20' is a checkpoint of another model: ema 'params/dit/" in message()
    stored["model"]["dit"]["width"], stored["model"]["text"]["depth"] = 32, 2
    config.write_text(json.dumps(stored))
    assert "'params/text/block_1/mlp/down/bias' is absent there and (16,) in" in message()
    stored["speed"] = 1
    config.write_text(json.dumps(stored))
    assert "holds no config" in (unknown := message()) and "'speed'" in unknown
    config.write_text("[]")
    assert "holds no config that this version" in message()
    config.write_text("{")
    assert "checkpoints/20' cannot be read" in (broken := message())
    assert "Take another of [4, 8, 12, 16, 20]" in broken

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


# Prompts written out by a language model on a server, here on loopback.

ANSWERS = {
    "a cat": Response('"A grey cat sleeps. The sun shines."'),
    "a dog": Response("I'm sorry, I can't help with that."),
    "雪": Response("雪が降る夜の町。"),
}


def respond(body: Mapping[str, Any], turn: int) -> Response:
    return ANSWERS[words(body)]


SMALL = ("--steps", "1", "--frames", "1", "--format", "png")


def run_small(whole: Run, output: Path, *arguments: str) -> int:
    return sample.main(
        ["--checkpoint", str(whole.directory), "--output", str(output), *SMALL, *arguments]
    )


def test_sample_tells_what_it_changed_and_what_not(
    whole: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    """Its text encoder reads 47 bytes."""
    cache = tmp_path / "answers.sqlite"
    asked = ("--prompt", "a cat", "a dog", "雪", "--num", "2", "--upsample-cache", str(cache))
    with serving(respond) as server:
        named = ("--upsample", "--upsample-server", server.url, "--upsample-model", "seer")
        assert run_small(whole, tmp_path / "clips", *asked, *named) == 0
        out, err = capfd.readouterr()
        assert run_small(whole, tmp_path / "again", *asked, *named) == 0
        assert server.bill == 3 and "0 answered, 3 from cache" in capfd.readouterr().out
    assert "'a cat'\n  -> 'A grey cat sleeps. The sun shines.'" in out
    assert "3 asked in" in out and "billed: 30 + 9 tokens" in out
    warning = "python -m dit_jax.sample: warning: 1 of 3 prompts were NOT upsampled:\n"
    assert warning + "used as given: 'a dog': refused by the model" in err
    names = [
        f"{i:04d}-{slug}.png" for i, slug in enumerate(["a-cat"] * 2 + ["a-dog"] * 2 + ["雪"] * 2)
    ]
    found = sorted(path.name for path in (tmp_path / "clips").iterdir())
    assert found == [*names, "prompts.json"]
    # What it wrote makes the same clips without a server.
    file = tmp_path / "clips" / "prompts.json"
    used = ["A grey cat sleeps. The sun shines.", "a dog", "雪が降る夜の町。"]
    assert read_prompts(file) == used
    assert run_small(whole, tmp_path / "same", "--prompts-file", str(file), "--num", "2") == 0
    same = sorted((tmp_path / "same").iterdir())
    assert [one.read_bytes() for one in same] == [
        (tmp_path / "clips" / name).read_bytes() for name in names
    ]
    assert same[0].name == "0000-a-grey-cat-sleeps-the-sun-shines.png"


def test_sample_without_a_server_says_so_and_goes_on(
    whole: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    named = ("--upsample-server", f"http://127.0.0.1:{free_port()}", "--upsample-model", "seer")
    cache = ("--upsample-cache", str(tmp_path / "a.sqlite"))
    output = tmp_path / "cat.png"
    assert run_small(whole, output, "--prompt", "a cat", "--upsample", *named, *cache) == 0
    out, err = capfd.readouterr()
    assert "no prompt was changed" in out and output.exists()
    assert "1 of 1 prompts were NOT upsampled" in err and "no server answers at" in err
    assert read_prompts(tmp_path / "cat.prompts.json") == ["a cat"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--upsample",), "give --upsample-server URL and --upsample-model NAME"),
        (("--upsample", "--upsample-server", "URL"), "give --upsample-server URL and"),
        (("--upsample", "--upsample-server", "h", "--upsample-model", "m"), "http://HOST:PORT"),
        (("--upsample", "--upsample-server", "URL", "--upsample-model", "m"), "has no model 'm'"),
        (("--chat.retries", "-1"), "chat.retries is -1"),
    ],
)
def test_sample_refuses(
    whole: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str], arguments, said: str
):
    with serving(respond) as server:
        given = [server.url if one == "URL" else one for one in arguments]
        try:
            status = run_small(whole, tmp_path / "cat.png", "--prompt", "a cat", *given)
        except SystemExit as error:
            status = error.code
    text = re.sub(r"[│\s]+", " ", capfd.readouterr().err)
    assert status == 2 and said in text and not (tmp_path / "cat.png").exists()
