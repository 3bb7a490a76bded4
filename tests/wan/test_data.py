"""A folder of videos to records that a run of Wan is trained on: the run says how."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dit_jax.codec.config import LatentCodecConfig
from dit_jax.config import DataConfig, VideoRun, to_dict
from dit_jax.data import (
    Loader,
    MixedSetConfig,
    MixtureConfig,
    PackingConfig,
    RecordsConfig,
    RecordsSource,
)
from dit_jax.files import write_json
from dit_jax.model import DiTConfig, ModelConfig, PatchConfig, TextStatesConfig
from dit_jax.prepare import __main__ as verb
from dit_jax.sampling import SamplingConfig
from dit_jax.sampling.media import write_png
from dit_jax.text.config import TextEncoderConfig
from dit_jax.text.folders import load_text_encoder
from dit_jax.training.video_task import tokenize
from tests.prepare.made_media import moving, run_here, write_video
from tests.runs import changed
from tests.wan.small_pipeline import TEXT_DIM

SmallWan = Callable[[str], Path]
STATES = 64
"""The states of a padded caption here: Wan has 512."""


def run_of(folder: Path, **sampling: Any) -> VideoRun:
    """A run of a pipeline's codec and text encoder, as it is converted."""
    text = TextStatesConfig(folder.name, TEXT_DIM, STATES, padded=True)
    patch = PatchConfig(t=1, h=2, w=2, channels=16, reference_fps=4.0)
    size = SamplingConfig(frames=17, height=64, width=96, fps=16.0)
    run = VideoRun()
    return VideoRun(
        model=ModelConfig(DiTConfig(width=48, depth=2, heads=2), patch, text),
        diffusion=dataclasses.replace(run.diffusion, caption_dropout=0.0),
        codec=LatentCodecConfig(path=str(folder / "vae"), t=4, h=8, w=8),
        text_encoder=TextEncoderConfig(str(folder / "text_encoder")),
        sampling=dataclasses.replace(size, **sampling),
        data=DataConfig(RecordsConfig("none"), PackingConfig(row_text=512)),
        log=dataclasses.replace(run.log, draw_every=0),
    )


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clip with a caption, one without, and a picture."""
    folder = tmp_path_factory.mktemp("videos")
    write_video(folder / "a.mp4", moving(26, 96, 160, 0), 24)
    write_video(folder / "b.mp4", moving(18, 96, 160, 1), 16)
    (folder / "a.txt").write_text("a red circle moves left\n")
    write_png(folder / "c.png", moving(1, 96, 128, 2)[0])
    return folder


@pytest.fixture(scope="module")
def prepared(
    small_wan: SmallWan, videos: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[VideoRun, Path]:
    """The run, and the records of the videos for it."""
    config, output = run_of(small_wan("2.1-t2v")), tmp_path_factory.mktemp("prepared")
    write_json(output / "run" / "config.json", to_dict(config))
    words = ["--input", videos, "--output", output, "--for-run", output / "run"]
    words += ["--captions.prefix", "sks style, ", "--workers.count", 1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dit_jax.prepare.stages.run", run_here)
        assert verb.main([str(one) for one in words]) == 0
    return config, output / "clips" / "1.0.0"


def test_clips_are_what_the_model_of_the_run_reads(prepared: Any):
    config, path = prepared
    source: Any = RecordsSource(RecordsConfig(str(path), text_states_key="text_states"))
    a, b, c = (source[i] for i in range(3))
    # 26 frames at 24 a second are 17 at 16, as many as the model's clips have. 96 x 160 pixels become
    # at most as many as 64 x 96 are, in multiples of two latents of eight pixels.
    assert a["video"].shape == (5, 6, 12, 16) and a["fps"] == 4.0
    assert b["video"].shape == a["video"].shape and c["video"].shape[0] == 1
    assert [one["caption"] for one in (a, b, c)] == ["sks style, a red circle moves left"] + [
        "sks style"
    ] * 2
    encoder = load_text_encoder(config.text_encoder.path)
    (states,) = encoder.encode([a["caption"]])
    # In another batch a state may be rounded to its neighbour.
    np.testing.assert_allclose(a["text_states"], states.astype(np.float32), rtol=0.01)
    assert source.text_encoder == encoder.hash
    assert config.codec.weights_hash() == source.codec


def test_padded_states_fill_their_share_of_a_row(prepared: Any):
    """Each caption takes all its states, also where its own end; the loader packs them so."""
    config, path = prepared
    source: Any = RecordsSource(RecordsConfig(str(path), text_states_key="text_states"))
    packing = PackingConfig(rows=1, row_tokens=128, row_text=3 * STATES, row_segments=3, bins=1)
    loader = Loader(source, lambda one: tokenize(config.model, one), packing, seed=0)
    batch = next(loader)
    loader.close()
    count = int((batch.num_tokens > 0).sum())
    assert count >= 2
    ids = batch.text_segment_ids[0]
    assert [int((ids == i + 1).sum()) for i in range(count)] == [STATES] * count
    filled = np.abs(batch.text[0]).sum(-1) > 0
    lengths = {len(source[i]["text_states"]) for i in range(3)}
    for i in range(count):
        own = filled[ids == i + 1]
        assert own.sum() in lengths and not own[own.sum() :].any()


def test_options_win_over_the_run(prepared: Any):
    config, path = prepared
    run = path.parents[1] / "run"
    words = ["--for-run", str(run), "--input", "a", "--output", "b"]
    given = verb.parse(words)
    clips = given.examine.clips
    assert (clips.fps, clips.area, clips.multiple, clips.stride) == (16.0, 64 * 96, 16, 4)
    assert clips.max_seconds == clips.min_seconds + 0.0625 == 17 / 16
    assert given.codec == config.codec.path and given.text_encoder == config.text_encoder.path
    other = verb.parse([*words, "--examine.clips.fps", "8"])
    assert other.examine.clips.fps == 8.0 and other.examine.clips.area == 64 * 96
    with pytest.raises(ValueError, match="nowhere"):
        verb.parse(["--for-run", "nowhere", *words[2:]])


def test_what_does_not_belong_together_is_refused(prepared: Any):
    """Each with the value that is wrong, and with what to do."""
    config, path = prepared
    source = RecordsConfig(str(path), text_states_key="text_states")
    fits = changed(config, {"data.source": source})
    assert fits.with_hashes().codec.hash
    for field, remedy in (("codec", "--for-run"), ("text_encoder", "text_encoder.path")):
        other = changed(fits, {f"{field}.hash": "0123456789abcdef"})
        with pytest.raises(ValueError, match="0123456789abcdef") as error:
            other.with_hashes()
        assert remedy in str(error.value)
    with pytest.raises(ValueError, match=r"caption_dropout is 0.1.*set it to 0"):
        changed(config, {"diffusion.caption_dropout": 0.1})
    bare = MixtureConfig((MixedSetConfig(str(path), captioned=False),))
    with pytest.raises(ValueError, match="captioned False"):
        changed(config, {"data.source": bare})
    with pytest.raises(ValueError, match="row_text 32 is smaller"):
        changed(config, {"data.packing.row_text": 32})
    with pytest.raises(ValueError, match="60 x 96 pixels: give multiples of 8 x 8"):
        changed(config, {"sampling.height": 60})


def test_a_prior_is_mixed_in_by_weight(prepared: Any):
    _, path = prepared
    sets = [
        MixedSetConfig(str(path), text_states_key="text_states", weight=weight)
        for weight in (1.0, 0.5)
    ]
    source = MixtureConfig(tuple(sets)).open()
    # That weights hold, tests/data/test_mixing.py says.
    assert source.weights == (1.0, 0.5) and len(source) == 6
    assert source[len(source) - 1]["caption"] == "sks style"
