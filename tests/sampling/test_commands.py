"""The command line of sampling: what options mean, and what is refused before a run is opened."""

import dataclasses
import types
from typing import Any

import numpy as np
import pytest

from dit_jax import sample
from dit_jax.codec.codec import PixelCodec
from dit_jax.model import PatchConfig
from dit_jax.sample import COMMANDS, Job, seconds_of
from dit_jax.sampling import Request, SamplingConfig, Space, media, to_float
from dit_jax.sampling.modes import (
    Storyboard,
    check_storyboard,
    decode_long,
    plan_windows,
    window_requests,
)
from tests.tiny_config import get_config

SPACE = Space(PixelCodec(), PatchConfig(2, 8, 8, 3, 8.0))
TEMPLATE = Request("a", 9, 24, 24, 8.0, 0)
FILES = {name: np.full((9, 24, 24, 3), i, np.uint8) for i, name in enumerate("ab")}


@dataclasses.dataclass
class Pipeline:
    """As much of a run as options are read by."""

    config: Any
    space: Space = SPACE


def pipeline(frames: int = 5, **dit: Any) -> Any:
    config = get_config()
    model = dataclasses.replace(config.model, dit=dataclasses.replace(config.model.dit, **dit))
    sampling = dataclasses.replace(config.sampling, frames=frames)
    return Pipeline(dataclasses.replace(config, model=model, sampling=sampling))


def job_of(run: Any) -> Job:
    return Job(run, SPACE, run.config.sampling, FILES)


def command(mode: str, **options: Any) -> Any:
    return COMMANDS[mode](checkpoint="run", **options)


def length(mode: str, count: int = 9, **options: Any) -> int:
    """Frames of what a mode makes of clips of nine frames."""
    job = job_of(pipeline(count))
    template = dataclasses.replace(TEMPLATE, frames=count)
    generation = command(mode, **options).generation(job, template)
    counts = [request.frames for request in generation.requests]
    return len(generation.finish([np.zeros((n, 24, 24, 3), np.uint8) for n in counts]))


def test_every_mode_makes_as_many_frames_as_its_options_say():
    assert length("text") == length("image", image="a", last_image="b") == 9
    assert length("image", keyframe=(("0.25s=a", "4=b"),)) == 9
    assert length("video", video="a") == 9 and length("video", 5, video="a", frames=5) == 5
    assert length("interpolate", video="a", factor=2) == 17
    assert length("extend", video="a", forward="0.5s", backward="2") == 15
    assert length("connect", videos=("a", "b"), gap="3") == 21
    assert length("connect", videos=("a", "b"), blend="5") == 13
    assert length("loop", video="a", gap="0.4s") == 12 and length("loop") == 8
    # How much of the clip the model is shown, and how much there is of it.
    assert length("loop", 5, video="a", gap="0.4s", frames=5) == 12
    assert length("loop", 5, video="a", gap="0.4s", duration="5") == 8


@pytest.mark.parametrize(
    ("mode", "options", "value"),
    [
        ("image", {"keyframe": (("9=a",),)}, "9=a is frame 9 of a clip of 9"),
        ("image", {"keyframe": (("8=a",),), "last_image": "b"}, "frame 8"),
        ("image", {"keyframe": (("a.png",),)}, "a.png"),
        ("extend", {"video": "a"}, "--forward LENGTH"),
        ("extend", {"video": "a", "forward": "2 s"}, "2 s"),
        ("extend", {"video": "a", "forward": "0s"}, "0s"),
        ("extend", {"video": "a", "forward": "2", "context": "11"}, "11 frames"),
    ],
)
def test_options_that_make_no_sense_are_refused(mode: str, options: dict[str, Any], value: str):
    with pytest.raises(ValueError, match=value):
        length(mode, **options)


def test_a_loop_of_text_needs_frames_and_attention_all_around():
    job = job_of(pipeline(9, depth=2, window=16, global_every=2))
    with pytest.raises(ValueError, match="16 tokens"):
        command("loop").generation(job, TEMPLATE)
    command("loop", video="a").generation(job, TEMPLATE)
    with pytest.raises(ValueError, match="1 frame"):
        length("loop", 1)


def test_lengths_are_seconds_or_frames():
    assert [seconds_of(x, 8.0) for x in ("2s", "1.5s", "16")] == [2, 1.5, 2]
    for text in ("x", "-1", "1.5", "0", "1 s"):
        with pytest.raises(ValueError, match=f"length {text}"):
            seconds_of(text, 8.0)


def test_size_and_rate_are_asked_for_or_the_first_files(monkeypatch: pytest.MonkeyPatch):
    shown = {"video": (61, 37, 12.0, False), "picture": (61, 37, 1.0, True)}

    def opened(mode: str, file: str = "", **options: Any) -> tuple[int, int, int, float]:
        monkeypatch.setattr(media, "video_shape", lambda _: shown[file])
        monkeypatch.setattr(media, "read_video", lambda *_: (np.zeros(1), 0))
        size = command(mode, **options).open(pipeline()).size
        return size.frames, size.height, size.width, size.fps

    assert opened("text") == (5, 24, 24, 8.0)
    assert opened("text", duration="1s") == (9, 24, 24, 8.0)
    assert opened("text", duration="1s", fps=16.0) == (17, 24, 24, 16.0)
    assert opened("video", "video", video="a") == (5, 56, 32, 12.0)
    assert opened("video", "video", video="a", height=32, fps=6.0) == (5, 32, 16, 6.0)
    assert opened("video", "picture", video="a")[3] == 8.0
    assert opened("image", "picture", image="a") == opened("image", "video", image="a")
    shown["video"] = (7, 30, 8.0, False)
    assert opened("video", "video", video="a")[1:3] == (8, 24)  # no less than one patch
    for size in ({"frames": 4}, {"height": 20}, {"width": 7}):
        (value,) = size.values()
        with pytest.raises(ValueError, match=str(value)):
            opened("text", **size)


def test_sizes_that_latents_do_not_fill_are_told_in_pixels():
    space = Space(
        dataclasses.replace(PixelCodec(), strides=(4, 8, 8)), PatchConfig(2, 8, 4, 3, 8.0)
    )
    for size, message in (
        ((9, 72, 64), "height 72 .*64 and 128"),
        ((9, 64, 16), "width 16 .*32 and 64"),
        ((13, 64, 64), "13 frames.*1 [+] 8n.*9 and 17"),
    ):
        with pytest.raises(ValueError, match=message):
            space.check_size(*size)
    space.check_size(9, 64, 96)


def test_what_is_enlarged_has_a_prompt_for_each_one_for_all_or_none(tmp_path, monkeypatch):
    for i, clip in enumerate(FILES.values()):
        media.write_video(tmp_path / f"{i}.gif", clip[: 3 + i], 10)
    (tmp_path / "notes.txt").touch()
    monkeypatch.setattr(sample, "cut_note", lambda *_: None)
    low_res: Any = types.SimpleNamespace(
        enlarge=lambda requests, clips, *_: [
            (r.prompt, r.seed, len(clip)) for r, (clip, _) in zip(requests, clips, strict=True)
        ]
    )
    run: Any = types.SimpleNamespace(
        config=get_config(),
        codec=PixelCodec(),
        request=lambda prompt, seed, **_: dataclasses.replace(TEMPLATE, prompt=prompt, seed=seed),
        encode_text=list,
        sample=lambda generations, progress: generations,
    )
    with pytest.raises(ValueError, match="does not enlarge"):
        command("upscale", videos=(str(tmp_path),)).clips(run)
    model = types.SimpleNamespace(**{**vars(run.config.model), "conditioners": {"low": low_res}})
    run.config = types.SimpleNamespace(model=model, sampling=run.config.sampling)

    def enlarged(*prompts: str, num: int = 1) -> tuple[list[tuple[str, int, int]], list[float]]:
        given = (prompts,) if prompts else ()
        one = command("upscale", videos=(str(tmp_path),), prompt=given, num=num, seed=5)
        names, clips, rates = one.clips(run)
        assert list(names) == [prompt for ((prompt, _, _),) in clips]
        return [clip for (clip,) in clips], rates

    assert enlarged() == ([("", 5, 3), ("", 6, 4)], [10.0, 10.0])
    assert enlarged("x")[0] == [("x", 5, 3), ("x", 6, 4)]
    assert enlarged("x", "y")[0] == [("x", 5, 3), ("y", 6, 4)]
    assert enlarged("x", num=2)[0] == [("x", 5, 3), ("x", 6, 3), ("x", 7, 4), ("x", 8, 4)]
    with pytest.raises(ValueError, match="3 prompts for 2 clips"):
        enlarged("x", "y", "z")


# --- the words of a command line ---


def parse(line: str) -> Any:
    return sample.parse(line.split())


def test_a_command_without_a_mode_makes_clips_of_text(monkeypatch: pytest.MonkeyPatch):
    run = SamplingConfig(shift=2.0, last_step=0.04, cfg_channels=3, frames=5)
    monkeypatch.setattr(sample, "stored_sampling", lambda _: run)
    plain = parse("--checkpoint run --prompt a b --prompt=c --num 2 --label 3 4 --seed 1")
    assert plain == dataclasses.replace(
        parse("text --checkpoint run"), prompt=(("a", "b"), ("c",)), label=((3, 4),), num=2, seed=1
    )
    assert plain.prompts() == ["a", "a", "b", "b", "c", "c", 3, 3, 4, 4]
    # What is not given is the run's own, and None is a value.
    settings = plain.sampling
    assert (settings.shift, settings.last_step, settings.steps) == (2.0, 0.04, 30)
    none = parse("--checkpoint run --shift None --cfg-channels None --steps 1 --last-step None")
    assert (none.sampling.shift, none.sampling.cfg_channels, none.sampling.steps) == (None, None, 1)
    assert plain.frames is None and parse("--checkpoint run --frames 9").frames == 9


@pytest.mark.parametrize(
    "line",
    [
        "text --frames 9 --duration 2s",
        "connect --videos a b --gap 1s --blend 1s",
        "extend --forward 2s",
        "long --length 9s --forward 1s",
        "--steps None",
        "loop --loop",
    ],
)
def test_contradictions_cannot_be_written(line: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sample, "stored_sampling", lambda _: SamplingConfig())
    with pytest.raises(SystemExit) as error:
        parse(f"{line} --checkpoint run")
    assert error.value.code == 2


@pytest.mark.parametrize("mode", ["video", "long", "upscale"])
def test_every_mode_has_a_help_of_its_own(mode: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as error:
        parse(f"{mode} --help")
    out = capsys.readouterr().out
    assert error.value.code == 0 and f"dit_jax.sample {mode}" in out and "--checkpoint" in out
    assert ("--strength" in out) == (mode in ("video", "connect", "interpolate"))
    # Short: what is rare, or the same in all modes, is on a page of its own.
    assert len(out.splitlines()) < 60 and "--mesh.data" not in out
    with pytest.raises(SystemExit):
        parse(f"{mode} --help-all")
    rare = capsys.readouterr().out
    assert all(one in rare for one in ("--mesh.data", "--cfg-scale", "--label", "--num-processes"))


# --- long clips ---


def plan(length: int, window: int = 9, stride: int = 1, **options: Any) -> Any:
    codec = dataclasses.replace(PixelCodec(), strides=(stride, 1, 1))
    patch = PatchConfig(t=2 if stride == 1 else 1, h=2, w=2, channels=3)
    return plan_windows(Space(codec, patch), length, window, **options)


def test_each_clip_has_the_storyboards_prompts_or_keeps_its_own():
    templates = [Request("one", 9, 4, 4, 8.0, 0), Request("two", 9, 4, 4, 8.0, 1)]
    windows = plan(16)
    kept = [window_requests(one, windows) for one in templates]
    assert [{r.prompt for r in clip} for clip in kept] == [{"one"}, {"two"}]
    board = Storyboard((0.0, 1.0), ("a", "b"))
    check_storyboard(board, windows, 8.0)
    clips = [window_requests(one, windows, board) for one in templates]
    assert [[r.prompt for r in clip] for clip in clips] == [["a", "b", "b"]] * 2
    # Middles of new frames: at 0.5, 1.44 and 2.19 s.
    for times, unused in (((0.0, 0.2), "0 s"), ((0.0, 1.0, 1.2), "1 s"), ((0.0, 9.0), "9 s")):
        with pytest.raises(ValueError, match=f"prompt at {unused}"):
            check_storyboard(Storyboard(times, tuple("abc"[: len(times)])), windows, 8.0)


def numbered(first: int, count: int) -> np.ndarray:
    """Frames that show their number."""
    return np.arange(first, first + count, dtype=np.uint8)[:, None, None, None].repeat(3, 3)


class InParts(PixelCodec):
    """Decodes the first frame, the next three, and the others."""

    def decode_parts(self, latents: np.ndarray, frames: int = 0) -> Any:
        del frames
        yield from (self.decode(part) for part in (latents[:1], latents[1:4], latents[4:]))


@pytest.mark.parametrize(("count", "context", "used"), [(1, None, 1), (12, None, 3), (12, 5, 5)])
def test_a_long_clip_goes_on_from_its_start(count: int, context: Any, used: int):
    """Of 30 frames, the first of which are known: all are there once, and the known ones untouched."""
    windows = plan(30, start=count, context=context)
    new = 30 - count + used
    assert windows[0].history == used
    assert windows[-2].start + 9 < new <= windows[-1].start + 9
    # Decoded in parts, of which the first may lie within the start, and more than is asked for.
    latents = to_float(100 + numbered(0, windows[-1].start + 9))
    parts = list(decode_long(InParts(), latents, new, numbered(0, count), used))
    numbers = np.concatenate(parts)[:, 0, 0, 0].tolist()
    assert numbers == [*range(count), *range(100 + used, 100 + new)] and len(numbers) == 30
    assert all(len(part) for part in parts)


def test_a_storyboard_begins_with_the_start():
    template, board = Request("", 9, 4, 4, 8.0, 0), Storyboard((0.0, 2.0), ("a", "b"))
    # Frames 0 to 5 come before the windows: their middles lie 0.75 s later.
    requests = window_requests(template, plan(32, start=9), board, 0.75)
    assert [r.prompt for r in requests] == ["a", "b", "b", "b"]
    # Of a clip of nine frames, seven of which the first window sees: new ones from 1.1 s on.
    late = plan(32, start=9, context=7)
    check_storyboard(Storyboard((0.0, 1.0), ("a", "b")), late, 8.0, 0.25, 1.125)
    missed = Storyboard((0.0, 1.125, 1.15), ("a", "b", "c"))
    with pytest.raises(ValueError, match="prompt at 1.125 s"):
        check_storyboard(missed, late, 8.0, 0.25, 1.125)


@pytest.mark.parametrize(
    ("options", "value"),
    [
        ({"length": 40, "history": 17}, "17"),
        ({"length": 40, "window": 1}, "window has at least 3"),
        ({"length": 8, "start": 8}, "clip of 8"),
        ({"length": 40, "start": 8, "context": 9}, "context of 9"),
        ({"length": 40, "start": 8, "context": 5, "window": 5}, "context of 5"),
    ],
)
def test_windows_that_leave_nothing_to_make_are_refused(options: dict[str, Any], value: str):
    with pytest.raises(ValueError, match=value):
        plan(**options)


# --- prompts as pictures and clips ---


def test_files_are_scaled_to_cover_a_size_and_shown_at_a_rate(tmp_path):
    clip = np.zeros((5, 16, 32, 3), np.uint8)
    clip[:, :, 8:24] = 200
    clip[1::2, :, 8:24] = 90
    media.write_video(tmp_path / "a.mp4", clip, 8)
    assert media.video_shape(tmp_path / "a.mp4") == (16, 32, 8.0, False)
    read, fps = media.read_video(tmp_path / "a.mp4", 8, 8, 16.0)
    assert read.shape == (9, 8, 8, 3) and fps == 16
    # Frame k is the nearest to k / 16; halfway between two, the later.
    assert [round(np.median(x) / 100) for x in read] == [2, 1, 1, 2, 2, 1, 1, 2, 2]
    assert len(media.read_video(tmp_path / "a.mp4", 16, 32, 4.0)[0]) == 3
    media.write_png(tmp_path / "b.png", clip[0])
    assert media.video_shape(tmp_path / "b.png")[3]
