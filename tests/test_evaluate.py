"""Evaluation as a user starts it: of files, and of a run that was trained by one process.

The feature networks have random weights, from a file: numbers mean nothing, but their relations do.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from dit_jax.codec.config import LatentCodecConfig
from dit_jax.config import CodecConfig, DataConfig, LogConfig, VideoRun, to_dict
from dit_jax.data import PackingConfig, RecordsConfig
from dit_jax.evaluate import INCEPTION, VIDEO, networks, write_npz
from dit_jax.evaluate import __main__ as evaluate
from dit_jax.files import as_path
from dit_jax.model import ClassLabels, ModelConfig, NoTextConfig, PatchConfig, published
from dit_jax.parallel import MeshConfig, make_mesh
from dit_jax.sampling import SamplingConfig, write_png, write_video
from dit_jax.sampling.pipeline import Pipeline
from dit_jax.training import CheckpointConfig, Checkpointer, TrainState
from dit_jax.training.video_task import init_params, make_model
from tests.codecs import tiny_images, write_images
from tests.runs import Run, Verbs, end, free_port, upload_checkpoint

Captured = pytest.CaptureFixture[str]
Evaluated = Callable[..., dict[str, Any]]
Refused = Callable[..., str]
Weights = dict[str, list[object]]
PROMPTS = ("a big red circle moves left", "a small green cross moves up", "a big blue square")


class Small(nn.Module):
    """A network that says as many numbers as one of full size, of an image's or clip's colours."""

    widths: dict[str, int]

    @nn.compact
    def __call__(self, x: jax.Array) -> dict[str, jax.Array]:
        size = (len(x), *x.shape[1:-3], 4, 4, 3)
        x = jax.image.resize(x.astype(jnp.float32) / 255, size, "linear").reshape(len(x), -1, 48)
        dense = {name: nn.Dense(width, name=f"of_{name}") for name, width in self.widths.items()}
        return {name: layer(x.mean(1)) for name, layer in dense.items()}


WIDTHS = {"pool": 2048, "spatial": 2023, "logits": 1008}
SMALL = {
    "INCEPTION": dataclasses.replace(INCEPTION, model=Small(WIDTHS)),
    "VIDEO": dataclasses.replace(VIDEO, model=Small({"video": 400})),
}
"""In place of the networks of full size, which take long to trace and to run: what the verb does with
features is the same. tests/evaluate/test_networks.py has those."""
pytestmark = pytest.mark.usefixtures("one_device", "small_networks")


@pytest.fixture
def small_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, network in SMALL.items():
        monkeypatch.setattr(networks, name, network)


def random_weights(path: Path, network: networks.Network) -> Path:
    """A file with its keys and order of axes; norms that keep activations alive."""
    rng, arrays = np.random.default_rng(0), {}
    for entry in network.map().entries:
        shape = entry.layout.their_shape
        fan_in = np.prod(shape[1:])
        ones = np.full(shape, entry.path[-1] in ("scale", "var"), np.float32)
        values = rng.normal(size=shape) * (2 / fan_in) ** 0.5 if len(shape) > 1 else ones
        arrays[entry.keys[0]] = values.astype(np.float32)
    np.savez(path, **arrays)
    return path


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Weights:
    """By the kind of items, the options that name a file of weights."""
    directory, found = tmp_path_factory.mktemp("weights"), {}
    for kind, network in zip(("images", "clips"), SMALL.values(), strict=True):
        file = random_weights(directory / f"{kind}.npz", network)
        found[kind] = [network.flag, file, "--feature-batch", 3]
    return found


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sets of coarse random images: a folder of PNG, and an .npz of others."""
    directory = tmp_path_factory.mktemp("sets")
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (10, 4, 4, 3)).astype(np.uint8).repeat(8, 1).repeat(8, 2)
    (directory / "true").mkdir()
    for i, image in enumerate(images[:5]):
        write_png(directory / "true" / f"{i}.png", image)
    write_npz(directory / "true.npz", {}, [images[:5]], 5)
    write_npz(directory / "made.npz", {}, [images[5:] // 2 + 60], 5)
    return directory


@pytest.fixture
def evaluated(tmp_path: Path) -> Evaluated:
    """Evaluates in this process, and gives the report."""

    def run(*arguments: object, output: str = "evaluation") -> dict[str, Any]:
        given = [*arguments, "--output", tmp_path / output]
        assert evaluate.main([str(one) for one in given]) == 0
        report = tmp_path / output / "report.json"
        return json.loads(report.read_text()) if report.exists() else {}

    return run


def test_images_are_measured_and_statistics_kept(
    evaluated: Evaluated, weights: Weights, sets: Path, tmp_path: Path, capfd: Captured
):
    names = ["fid", "sfid", "is", "precision", "recall"]
    common = [*weights["images"], "--metrics", *names]
    report = evaluated("--samples", sets / "made.npz", "--reference", sets / "true", *common)
    found = report["metrics"]
    assert set(found) == {*names, "is_std"} and report["num"] == 5
    assert found["fid"] > 0 and found["sfid"] > 0 and 1 <= found["is"] <= 1008
    assert len(report["notes"]) == 4 and "5 samples for 2048 features" in report["notes"][0]
    out = capfd.readouterr().out
    assert re.search(r"fid \d", out) and "of 5 samples" in out

    kept = tmp_path / "true-statistics.npz"
    evaluated("--reference", sets / "true", "--save-statistics", kept, *weights["images"])
    with np.load(kept) as file:
        assert set(file.files) == {"arr_0", "mu", "sigma", "mu_s", "sigma_s", "count"}
        assert file["sigma_s"].shape == (2023, 2023) and int(file["count"]) == 5
    again = evaluated("--samples", sets / "made.npz", "--reference", kept, *common)["metrics"]
    np.testing.assert_allclose([again[n] for n in names], [found[n] for n in names], rtol=1e-6)
    # The same images from another kind of file, against themselves.
    own = evaluated("--samples", sets / "true.npz", "--reference", kept, *common)["metrics"]
    assert own["fid"] < 1e-4 * found["fid"] and own["precision"] == own["recall"] == 1


def test_clips_are_measured(evaluated: Evaluated, weights: Weights, tmp_path: Path):
    rng = np.random.default_rng(0)
    for name, level in (("true", 0), ("made", 60)):
        (tmp_path / name).mkdir()
        for i in range(3):
            frame = rng.integers(0, 190, (2, 2, 3)).repeat(8, 0).repeat(8, 1) + level
            write_video(tmp_path / name / f"{i}.mp4", np.stack([frame.astype(np.uint8)] * 10), 8)
    given = [*weights["clips"], "--fvd-frames", 9, "--metrics", "fvd"]
    true = ["--reference", tmp_path / "true"]
    kept = tmp_path / "true.npz"
    report = evaluated("--samples", tmp_path / "made", *true, *given, "--save-statistics", kept)
    assert report["metrics"]["fvd"] > 0 and report["shape"] == [10, 16, 16, 3]
    own = evaluated("--samples", tmp_path / "true", "--reference", kept, *given)
    assert own["metrics"]["fvd"] < 1e-4 * report["metrics"]["fvd"]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("\n".join(PROMPTS))
    return path


@pytest.fixture
def making(whole: Run, prompts: Path) -> list[object]:
    """What makes ten images from the tiny run."""
    return [
        *("--checkpoint", whole.directory, "--prompts-file", prompts, "--num", 10, "--shard", 4),
        *("--sampling.frames", 1, "--sampling.steps", 2),
    ]


def test_a_run_is_sampled_and_measured(
    evaluated: Evaluated, making: list[object], weights: Weights, sets: Path, tmp_path: Path
):
    given = [*weights["images"], "--metrics", "fid", "precision", "--reference", sets / "true"]
    report = evaluated(*making, *given)
    assert set(report["metrics"]) == {"fid", "precision"} and report["num"] == 10
    assert report["made"]["sampling"]["steps"] == 2 and report["made"]["step"] == 20
    assert "samples are 24 x 24 and references 32 x 32" in report["notes"][0]
    path = tmp_path / "evaluation" / "samples.npz"
    with np.load(path) as file:
        images = file["arr_0"]
        assert file.files == ["arr_0"] and images.dtype == np.uint8
    assert images.shape == (10, 24, 24, 3) and images.std() > 0
    assert not (tmp_path / "evaluation" / "shards").exists()
    assert (images[0] != images[3]).any()  # one prompt, other noise
    # The file is what a measurement of the file reads.
    again = evaluated("--samples", report["samples"], *given, output="other")
    assert again["metrics"] == report["metrics"] and again["made"] is None


def test_a_run_goes_on_after_it_was_killed(
    evaluated: Evaluated, making: list[object], monkeypatch: pytest.MonkeyPatch
):
    asked: list[int] = []

    def sampled(self: Any, generations: Any, progress: bool = False) -> list[np.ndarray]:
        asked.extend(one.requests[0].seed for one in generations)
        if len(asked) == 8:
            raise KeyboardInterrupt
        return [np.zeros((1, 24, 24, 3), np.uint8)] * len(generations)

    monkeypatch.setattr(Pipeline, "sample", sampled)
    with pytest.raises(KeyboardInterrupt):
        evaluated(*making)
    evaluated(*making)
    evaluated(*making)  # What is finished is not made again.
    assert asked == [*range(8), *range(4, 10)]


def test_a_run_on_cloud_storage_is_measured_into_cloud_storage(
    whole: Run, making: list[object], weights: Weights, sets: Path, bucket: str
):
    run, output = upload_checkpoint(whole.directory, 20, f"{bucket}/measured"), f"{bucket}/report"
    given = [run if one == whole.directory else one for one in making]
    given += [*weights["images"], "--metrics", "fid", "--reference", sets / "true"]
    assert evaluate.main([str(one) for one in [*given, "--output", output, "--num", 5]]) == 0
    report = json.loads(as_path(f"{output}/report.json").read_bytes())
    assert report["num"] == 5 and report["metrics"]["fid"] > 0
    assert report["made"]["checkpoint"] == run
    assert as_path(f"{output}/samples.npz").exists()


# Bad input: refused at once, with the value, the constraint and the remedy.


@pytest.fixture
def refused(capfd: Captured, tmp_path: Path) -> Refused:
    def run(*arguments: object) -> str:
        given = ["--output", tmp_path / "evaluation", *arguments]
        try:
            status = evaluate.main([str(one) for one in given])
        except SystemExit as error:
            status = error.code
        text = capfd.readouterr().err
        assert status == 2 and "Traceback" not in text and "sampling:" not in text
        return " ".join(re.sub("[╭─╮│╰╯]", " ", text).split())

    return run


MADE, TRUE = ["--samples", "SETS/made.npz"], ["--reference", "SETS/true"]


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ([], ["nothing to evaluate", "--samples", "--checkpoint"]),
        (MADE, ["nothing to measure", "--metrics"]),
        ([*MADE, "--checkpoint", "RUN"], ["--samples and --checkpoint"]),
        ([*MADE, "--metrics", "fid"], ["fid compares with a reference", "--reference PATH"]),
        (
            [*MADE, *TRUE, "--metrics", "fid"],
            ["needs the weights of Inception-v3: give --features-weights", "pytorch-fid"],
        ),
        (
            [*MADE, *TRUE, "--metrics", "is", "--features-weights", "/none.pth"],
            ["'/none.pth' is not a file", "pt_inception-2015-12-05-6726825d.pth", "Apache License"],
        ),
        ([*MADE, *TRUE, "--metrics", "fvd"], ["fvd is not a metric of images", "fid sfid is"]),
        (["--save-statistics", "a.npz"], ["--save-statistics", "--reference"]),
        ([*TRUE, "--save-statistics", "a.txt"], ["must end in .npz"]),
        ([*MADE, "--metrics", "is", "--output", "/proc/x"], ["'/proc/x' cannot be written"]),
        (["--checkpoint", "RUN"], ["reads text: give --prompts-file"]),
        (["--checkpoint", "RUN", "--step", "3"], ["no checkpoint of step 3"]),
        (
            ["--checkpoint", "RUN", "--prompts-file", "PROMPTS", "--metrics", "fid", *TRUE],
            ["fid is not a metric of clips", "the model's samples"],
        ),
        (
            ["--checkpoint", "RUN", "--prompts-file", "PROMPTS", "--sampling.height", "20"],
            ["height 20 is not a multiple of the patch's 8"],
        ),
    ],
    ids=lambda value: " ".join(value)[-40:] if isinstance(value, list) else None,
)
def test_bad_value_is_refused(
    refused: Refused, whole: Run, sets: Path, prompts: Path, arguments: list[str], parts: list[str]
):
    named = {"SETS": str(sets), "RUN": str(whole.directory), "PROMPTS": str(prompts)}
    pattern = re.compile("|".join(named))
    given = [pattern.sub(lambda found: named[found[0]], one) for one in arguments]
    message = refused(*given)
    for part in parts:
        assert part in message


def test_other_settings_and_short_clips_are_refused(
    refused: Refused, making: list[object], sets: Path, tmp_path: Path
):
    clips = np.zeros((2, 5, 8, 8, 3), np.uint8)
    write_npz(tmp_path / "clips.npz", {}, [clips], 2)
    write_npz(tmp_path / "long.npz", {}, [np.zeros((2, 16, 8, 8, 3), np.uint8)], 2)
    given = ["--samples", tmp_path / "clips.npz", "--metrics", "fvd"]
    message = refused(*given, "--reference", tmp_path / "clips.npz")
    assert "clips.npz" in message and "5 frames" in message
    np.savez(tmp_path / "video.npz", mu_v=np.zeros(400), sigma_v=np.eye(400))
    message = refused(*given, "--reference", tmp_path / "video.npz")
    assert "clips.npz" in message and "5 frames" in message
    assert "at least 9" in refused(*given, "--fvd-frames", 8)
    long = ["--samples", tmp_path / "long.npz", "--metrics", "fvd"]
    assert "holds images" in refused(*long, "--reference", sets / "true")
    np.savez(tmp_path / "mu.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    given = ["--samples", sets / "made.npz", "--reference", tmp_path / "mu.npz", "--metrics"]
    assert "sfid needs more than the statistics (pool) in" in refused(*given, "fid", "sfid")
    (tmp_path / "evaluation").mkdir(exist_ok=True)
    (tmp_path / "evaluation" / "plan.json").write_text('{"seed": 5}')
    assert "holds samples made with checkpoint None, not" in refused(*making)


def test_what_cannot_be_measured_is_refused_before_samples_are_made(
    refused: Refused,
    whole: Run,
    prompts: Path,
    sets: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(Pipeline, "sample", None)
    made = ["--checkpoint", whole.directory, "--prompts-file", prompts]
    # Longer than the samples or shorter: clips of a reference have the frames that are asked for.
    write_npz(tmp_path / "short.npz", {}, [np.zeros((4, 12, 8, 8, 3), np.uint8)], 4)
    write_npz(tmp_path / "one.npz", {}, [np.zeros((1, 16, 8, 8, 3), np.uint8)], 1)
    clips = [*made, "--sampling.frames", 17, "--metrics", "fvd", "--reference"]
    message = refused(*clips, tmp_path / "short.npz")
    assert "short.npz" in message and "12 frames" in message
    assert "fvd takes at least 2 items here" in refused(*clips, tmp_path / "one.npz")
    statistics = ["--reference", tmp_path / "short.npz", "--save-statistics", tmp_path / "a.npz"]
    message = refused(*made, "--sampling.frames", 17, *statistics)
    assert "short.npz" in message and "12 frames" in message
    assert "holds clips" in refused(*made, "--sampling.frames", 1, *statistics)

    with np.load(sets / "true.npz") as file:
        write_npz(tmp_path / "few.npz", {}, [file["arr_0"][:3]], 3)
    images = [*made, "--sampling.frames", 1, "--metrics", "recall"]
    message = refused(*images, "--num", 3, "--reference", sets / "true")
    assert "recall takes at least 4" in message and "the model's samples are 3" in message
    message = refused(*images, "--num", 8, "--reference", tmp_path / "few.npz")
    assert "few.npz' are 3" in message


def classes_config(latents: bool) -> VideoRun:
    channels, side = (4, 2) if latents else (3, 8)
    return VideoRun(
        data=DataConfig(
            source=RecordsConfig(path="nowhere", label_key="label"),
            packing=PackingConfig(rows=8, row_tokens=32, row_text=4, row_segments=2),
        ),
        model=ModelConfig(
            dit=dataclasses.replace(published("S"), width=32, depth=1, heads=2),
            patch=PatchConfig(t=1, h=side, w=side, channels=channels),
            text=NoTextConfig(),
            conditioners={"label": ClassLabels(3)},
        ),
        codec=LatentCodecConfig(path="elsewhere", h=4, w=4) if latents else CodecConfig(),
        log=LogConfig(draw_every=0),
        sampling=SamplingConfig(frames=1, height=24, width=24, steps=2, batch=8),
    )


def untrained(config: VideoRun, directory: Path) -> Path:
    """A run with random parameters (fresh ones of a published DiT give zeros)."""
    model = make_model(config.model, make_mesh(MeshConfig()))
    shapes = nn.unbox(jax.eval_shape(partial(init_params, model), jax.random.key(0)))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: jnp.asarray(0.2 * rng.normal(size=x.shape), x.dtype), shapes)
    zero = jnp.zeros((), jnp.int32)
    state = TrainState(zero, zero, params, params, {"count": zero})
    checkpointer = Checkpointer(directory, CheckpointConfig())
    checkpointer.save(state, {}, to_dict(config), 1)
    checkpointer.wait()
    checkpointer.close()
    return directory


def test_classes_are_asked_for_in_turn_or_at_random_and_latents_decoded(
    evaluated: Evaluated, refused: Refused, tmp_path: Path, prompts: Path
):
    write_images(tmp_path / "codec", tiny_images(8, 8, 8, norm_groups=4))
    run = ["--checkpoint", untrained(classes_config(latents=True), tmp_path / "run"), "--num", 9]
    assert "elsewhere" in refused(*run)  # the codec that the config names
    run += ["--codec", tmp_path / "codec"]
    message = refused(*run, "--prompts-file", prompts)
    assert "knows 3 classes and no text: leave out --prompts-file" in message
    images, labels = {}, {}
    for name in ("balanced", "uniform"):
        evaluated(*run, "--labels", name, output=name)
        with np.load(tmp_path / name / "samples.npz") as file:
            images[name], labels[name] = file["arr_0"], file["arr_1"]
        assert labels[name].dtype == np.int64 and images[name].shape == (9, 24, 24, 3)
    assert labels["balanced"].tolist() == [0, 1, 2] * 3
    same = labels["balanced"] == labels["uniform"]
    assert same.any() and not same.all()
    # The same noise and class give the same image, another class another.
    for one, other, alike in zip(images["balanced"], images["uniform"], same, strict=True):
        assert (one == other).all() == alike


@pytest.mark.slow
def test_two_processes_find_what_one_does(verbs: Verbs, sets: Path, tmp_path: Path):
    """With the network of full size."""
    weights = random_weights(tmp_path / "weights.npz", INCEPTION)
    run = untrained(classes_config(latents=False), tmp_path / "run")
    given = ["--checkpoint", run, "--num", 19, "--shard", 8]
    given += ["--features-weights", weights, "--feature-batch", 5]
    given += ["--metrics", "fid", "is", "recall", "--reference", sets / "true"]
    one, two = tmp_path / "one", tmp_path / "two"
    ended = end(verbs.start("evaluate", [*given, "--output", one], devices=2))
    port = free_port()
    # JAX's compilation cache serves process 0 alone, and gloo waits for 30 s.
    alike = dataclasses.replace(verbs, cache=verbs.logs / str(port))
    ended += end(
        *(alike.start("evaluate", [*given, "--output", two], place=(i, 2, port)) for i in (0, 1))
    )
    assert [it.status for it in ended] == [0, 0, 0]
    assert (one / "samples.npz").read_bytes() == (two / "samples.npz").read_bytes()
    reports = [json.loads((path / "report.json").read_text())["metrics"] for path in (one, two)]
    for name, value in reports[0].items():
        np.testing.assert_allclose(reports[1][name], value, rtol=1e-6)
