"""The options of modes: what contradicts itself is refused, and what is asked for is found."""

import dataclasses
import types

import numpy as np
import pytest
import tyro

from dit_jax.codec.codec import PixelCodec
from dit_jax.config import CodecConfig
from dit_jax.model import PatchConfig
from dit_jax.sampling import Request, SamplingConfig, Space
from dit_jax.sampling.options import gathered
from dit_jax.sampling.pipeline import SamplingOverrides, chosen
from dit_jax.sampling.requested import ModeArguments, Plan, Shape, _check_latents, make_plan
from dit_jax.text.opening import cut_note
from tests.tiny_config import get_config

UNSET = {}
SPACE = Space(PixelCodec(), PatchConfig(2, 8, 8, 3, 8.0))


def asked(**fields):
    return fields


@pytest.mark.parametrize(
    ("given", "sampling", "message"),
    [
        ({"image": "a", "video": "b"}, UNSET, "--image and --video: each makes a clip of its own"),
        ({"strength": 0.5}, UNSET, "--strength says something of --video"),
        ({"video": "a", "strength": 1.5}, UNSET, "--strength 1.5: it is above 0"),
        ({"interpolate": "2x"}, UNSET, "--interpolate says something of --video"),
        ({"video": "a", "interpolate": "1x"}, UNSET, "from 2x on"),
        ({"forward": "2s"}, UNSET, "--forward says something of --extend"),
        ({"extend": "a"}, UNSET, "give --forward LENGTH, --backward LENGTH or both"),
        ({"extend": "a", "forward": "2 s"}, UNSET, "--forward 2 s: give seconds, as 2s"),
        ({"extend": "a", "forward": "0s"}, UNSET, "--forward 0s: give seconds"),
        ({"gap": "1s"}, UNSET, "--gap says something of --connect"),
        ({"connect": ("a", "b"), "gap": "1s", "blend": "1s"}, UNSET, "give one of them"),
        ({"image": "a", "loop": True}, UNSET, "--loop and --image"),
        ({"video": "a", "loop": True, "strength": 0.5}, UNSET, "--strength says something"),
        ({"video": "a", "loop": True, "interpolate": "2x"}, UNSET, "--loop and --interpolate"),
        ({"duration": "2s"}, asked(frames=9), "--duration 2s and --frames 9"),
        ({"extend": "a", "forward": "2s", "duration": "2s"}, UNSET, "--duration says something"),
        ({"negative_prompt": "red"}, asked(cfg_scale=1.0), "--cfg-scale 1 is no guidance"),
        ({"keyframe": ("a.png",)}, UNSET, "give T=FILE"),
        ({"keyframe": ("x=a.png",)}, UNSET, "--keyframe x: give seconds"),
        ({"video": "a", "given_noise": 0.1}, UNSET, "--given-noise says something of"),
        ({"image": "a", "given_noise": 1.0}, UNSET, "it is at least 0 and below 1"),
        ({"loop": True, "given_noise": 0.1}, UNSET, "or --video with --loop"),
        (
            {"extend": "a", "forward": "2", "context": "3"},
            asked(frames=9),
            "--frames 9 and --context",
        ),
        ({"connect": ("a", "b"), "blend": "1s"}, asked(frames=9), "--frames 9 and --blend 1s"),
    ],
)
def test_contradictions_are_refused(given, sampling, message):
    with pytest.raises(ValueError) as error:
        ModeArguments(**given).check(sampling)
    assert message in str(error.value)


def test_a_long_clip_is_extended_without_a_length():
    given = ModeArguments(extend="a")
    given.check(UNSET, long=True)
    ModeArguments(extend="a", context="3").check(asked(frames=9), long=True)
    media = {"a": np.zeros((9, 24, 24, 3), np.uint8)}
    shape = Shape(24, 24, 8.0, False)
    long = make_plan(given, UNSET, get_config(), [shape])
    assert long.beginning(media) is media["a"] and long.context(SPACE) is None
    context = make_plan(ModeArguments(extend="a", context="0.5s"), UNSET, get_config(), [shape])
    assert context.context(SPACE) == 5
    assert make_plan(ModeArguments(), UNSET, get_config(), []).beginning({}) is None


def plan(given, sampling=UNSET, *shapes):
    given.check(sampling)
    config = get_config()
    made = dataclasses.replace(config.sampling, **sampling)
    # The run's config with these options, as a run is opened with them.
    object.__setattr__(config, "sampling", made)
    return make_plan(given, sampling, config, shapes)


def likes(made):
    return made.likes([Request("a", 5, 24, 24, 8.0, 0, negative="red")], SPACE)


def test_size_and_rate_are_asked_for_or_the_clips_own():
    video, picture = Shape(61, 37, 12.0, False), Shape(61, 37, 1.0, True)
    remade = ModeArguments(video="a")
    assert plan(remade, UNSET, video) == Plan(remade, 56, 32, 12.0, None, 5)
    half = plan(remade, asked(height=32, fps=6.0), video)
    assert (half.height, half.width, half.fps) == (32, 16, 6.0)
    assert plan(ModeArguments(image="a"), UNSET, picture).fps == 8.0
    assert plan(ModeArguments(video="a"), UNSET, picture).fps == 8.0
    assert plan(ModeArguments(video="a", interpolate="4"), UNSET, video).output_fps == 48.0
    with pytest.raises(ValueError, match="shows 7 x 30 pixels, less than one patch of 8 x 8"):
        plan(remade, UNSET, Shape(7, 30, 8.0, False))


def test_durations_choose_frames_that_fit():
    (one,) = likes(plan(ModeArguments(duration="1s")))
    assert (one.frames, one.fps, one.negative) == (9, 8.0, "red")
    assert likes(plan(ModeArguments(duration="1s"), asked(fps=16.0)))[0].frames == 17
    assert likes(plan(ModeArguments()))[0].frames == 5


def test_every_option_makes_its_edit():
    frames = np.zeros((9, 24, 24, 3), np.uint8)
    media, shape = {"a": frames, "b": frames}, Shape(24, 24, 8.0, False)

    def length(sampling=UNSET, **given):
        mode = ModeArguments(**given)
        made = plan(mode, sampling, *[shape] * len(mode.files))
        (edit,) = made.edits(likes(made), SPACE, media)
        sizes = [r.frames for r in edit.requests]
        return len(edit.finish([np.zeros((n, 24, 24, 3), np.uint8) for n in sizes]))

    assert length(image="a", last_image="b") == length(image="a", keyframe=("0.25s=a",)) == 5
    assert length(video="a", strength=0.5) == 9 and length(video="a", duration="4") == 5
    assert length(video="a", interpolate="2x") == 17
    assert length(extend="a", forward="0.5s", backward="2") == 15
    assert length(connect=("a", "b"), gap="3") == 21 and length(connect=("a", "b"), blend="5") == 13
    assert length(video="a", loop=True, gap="0.4s") == 12 and length(loop=True) == 4
    # How much of a clip the model is shown, and not how much there is of it.
    assert length(asked(frames=5), video="a", loop=True, gap="0.4s") == 12
    assert length(asked(frames=5), video="a", strength=0.5) == 5
    assert length(video="a", loop=True, gap="0.4s", duration="5") == 8
    with pytest.raises(ValueError, match="--keyframe 9=a is frame 9 of a clip of 5"):
        length(keyframe=("9=a",))
    with pytest.raises(ValueError, match="frame 4 is given twice"):
        length(keyframe=("4=a",), last_image="b")


def test_what_a_model_cannot_make_is_refused():
    picture = Shape(24, 24, 1.0, True)
    with pytest.raises(ValueError, match="1 frame, which is given: nothing is to be made"):
        plan(ModeArguments(image="a"), asked(frames=1), picture)
    config = get_config()
    dit = dataclasses.replace(config.model.dit, band=16, dense_every=2)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, dit=dit))
    with pytest.raises(ValueError, match="see 16 tokens to either side"):
        make_plan(ModeArguments(loop=True), UNSET, config, [])
    make_plan(ModeArguments(loop=True, video="a"), UNSET, config, [picture])


def test_options_that_are_given_again_go_on():
    several = ("keyframe", "super-resolve")
    line = "--a 1 --keyframe 0=x 1=y --b --keyframe=2=z --super_resolve p --a 2 --keyframe w"
    assert gathered(line.split(), several) == (
        "--a 1 --keyframe 0=x 1=y 2=z w --b --super-resolve p --a 2".split()
    )


def test_sizes_that_patches_of_latents_do_not_divide_are_told_in_pixels():
    patch = PatchConfig(2, 8, 4, 3, 8.0)
    config = types.SimpleNamespace(
        codec=CodecConfig(t=4, h=8, w=8), model=types.SimpleNamespace(patch=patch)
    )
    for size, message in (
        ((9, 72, 64), "height 72 is not a multiple of 64, .* 64 and 128"),
        ((9, 64, 16), "width 16 is not a multiple of 32, .* 32 and 64"),
        ((13, 64, 64), "13 frames: give 1 [+] 8n, .* 9 and 17"),
    ):
        with pytest.raises(ValueError, match=message):
            _check_latents(config, *size)  # pyright: ignore[reportArgumentType]
    _check_latents(config, 9, 64, 96)  # pyright: ignore[reportArgumentType]
    _check_latents(get_config(), 4, 71, 1)  # of pixels: the patch refuses them


def test_none_that_is_given_is_another_value_than_the_runs():
    run = SamplingConfig(shift=2.0, last_step=0.04, cfg_channels=3)

    def options(*arguments):
        overrides = chosen(tyro.cli(SamplingOverrides, args=list(arguments)))
        config = dataclasses.replace(run, **overrides)
        return config.shift, config.last_step, config.cfg_channels, config.steps

    assert options() == options("--shift", "run") == (2.0, 0.04, 3, 30)
    none = ("--shift", "None", "--last-step", "None", "--cfg-channels", "None", "--steps", "1")
    assert options(*none) == (None, None, None, 1)
    with pytest.raises(SystemExit):  # It has no meaning there.
        options("--steps", "None")


def test_texts_that_a_model_does_not_read_whole_are_counted_once():
    config = get_config()
    limit = config.model.text.max_bytes
    fits, long = "a" * limit, "雪" * (limit // 3 + 1)
    assert cut_note(config, [fits, ""]) is None
    note = cut_note(config, [fits, long, "b" * (limit + 1), long])
    assert f"2 of 3 texts are longer than the {limit} bytes" in note
    assert f"has {3 * (limit // 3 + 1)}: {long!r}" in note
    assert config.model.text.length(fits) == config.model.text.max_tokens
    # What is read of it is whole characters.
    read = config.model.text_tokens(long)
    assert (read[1:] - 2).astype(np.uint8).tobytes().decode() == "雪" * (limit // 3)
