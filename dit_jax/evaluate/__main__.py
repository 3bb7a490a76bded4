"""``python -m dit_jax.evaluate``: FID, sFID, Inception Score, precision, recall and FVD.

Of samples on disk (``--samples``), or of some that a trained model makes first (``--checkpoint``).
Everything is checked before the long work begins: the weights of the feature network are there and are
whole, the reference has what the metrics need, and the model can make such samples.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import sys
from collections.abc import Sequence
from typing import Literal

import jax
import numpy as np
import tyro

from dit_jax.config import VideoRun, check_types, to_dict
from dit_jax.evaluate import (
    I3D_FRAMES,
    I3D_MIN_FRAMES,
    INCEPTION,
    VIDEO,
    FeatureFunction,
    ImageSet,
    Measured,
    Metric,
    NetworkFeatures,
    Reference,
    SampleStore,
    Wanted,
    check_count,
    check_frames,
    check_metrics,
    check_weights,
    class_labels,
    complete,
    fill,
    is_clips,
    measure,
    open_images,
    open_reference,
    read_weights,
    save_statistics,
)
from dit_jax.files import (
    as_path,
    check_file,
    check_writable,
    run_verb,
    write_json,
)
from dit_jax.model import ClassLabels
from dit_jax.parallel import (
    PROCESS_HELP,
    MeshConfig,
    joined,
    make_mesh,
    take_process_flags,
    tune_cpu,
)
from dit_jax.sampling import Request, SamplingConfig, plain, read_prompts
from dit_jax.sampling.pipeline import load_run, stored_sampling
from dit_jax.sampling.request import check_request
from dit_jax.training.video_task import cut_note, with_states

PROG = "python -m dit_jax.evaluate"
SHARD = 256
IMAGES_KEPT = 10_000


@dataclasses.dataclass(frozen=True)
class EvaluateArguments:
    """Measures samples against a reference. Samples are given, or made by a trained model."""

    samples: str | None = None
    """A folder of images (or clips), or an .npz that holds them as arr_0."""
    checkpoint: str | None = None
    """Directory of a training run whose averaged weights make the samples first."""
    output: str = "evaluation"
    """Directory for report.json and, of a checkpoint, samples.npz. A run killed while sampling goes on
    from what is there."""
    metrics: tuple[Metric, ...] = ()
    """Of images: fid sfid is precision recall; of clips: fvd. None: samples are made, not measured."""
    reference: str | None = None
    """What is compared with: a folder, or an .npz of statistics (mu, sigma), images (arr_0) or both."""
    features_weights: str | None = None
    """File with the weights of Inception-v3 (pt_inception-2015-12-05-6726825d.pth), for images."""
    i3d_weights: str | None = None
    """File with the weights of I3D (rgb_imagenet.pt), for clips."""
    fvd_frames: int = I3D_FRAMES
    """Frames of every clip that fvd looks at, from the first."""
    feature_batch: int = 64
    """Images (or clips) that the feature network sees at once."""
    save_statistics: str | None = None
    """Writes the reference's statistics to this .npz, for the next time."""
    num: int = 50_000
    """Samples to make."""
    seed: int = 0
    """Sample number i (from 0) is made from noise of seed + i."""
    labels: Literal["balanced", "uniform"] = "balanced"
    """Classes of samples: each as often, or drawn at random."""
    prompts_file: str | None = None
    """Prompts for a model of text, taken in turn: a line each, or a table, or JSON."""
    step: int | None = None
    """Of the checkpoint; the newest if unset."""
    codec: str | None = None
    """Folder of the autoencoder, for a model of latents. Unset: the one that the run's config names."""
    text_encoder: str | None = None
    """Folder of the text encoder, for a model that reads its states. Unset: the one that the run's
    config names."""
    shard: int | None = None
    """Samples stored at once: what is lost at most when the run is killed. Unset: about 256."""
    sampling: SamplingConfig = SamplingConfig()
    """How samples are made; by default as the run's config says."""
    mesh: MeshConfig = MeshConfig()
    spread_parameters: bool = False
    """Shard parameters over mesh.context too."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Evaluates what the command line says; returns the exit status."""
    arguments, flags = take_process_flags(sys.argv[1:] if arguments is None else arguments)
    description = f"{EvaluateArguments.__doc__} {PROCESS_HELP}"
    logging.getLogger("absl").setLevel(logging.ERROR)

    def work() -> None:
        with joined(flags, PROG):
            default = EvaluateArguments(sampling=stored_sampling(arguments))
            given = tyro.cli(
                EvaluateArguments,
                args=arguments,
                prog=PROG,
                description=description,
                default=default,
            )
            check_types(given)
            evaluate(given)

    return run_verb(PROG, work)


def evaluate(given: EvaluateArguments) -> None:
    """Checks, makes samples if asked to, measures and reports."""
    _check_arguments(given)
    reference = open_reference(given.reference) if given.reference else None
    making = Making(given) if given.checkpoint else None
    samples = open_images(given.samples) if given.samples else None
    shape = _shape(samples, making, reference)
    clips = len(shape) == 4
    if samples or making:
        what, count = (
            given.samples or "the model's samples",
            samples.count if samples else given.num,
        )
        check_metrics(given.metrics, clips, reference, what, count, given.fvd_frames)
    if clips:
        check_frames(shape, given.fvd_frames)
    if given.save_statistics:
        _check_items(given, reference, clips)
    frames = given.fvd_frames if clips else None
    function = _feature_function(given, clips) if given.metrics or given.save_statistics else None
    if making:
        samples = making.make()
        _tell(f"{given.num} sample(s): {making.store.samples}")
    if function and given.save_statistics:
        assert reference is not None and (items := reference.items) is not None
        kinds = frozenset({"video"} if clips else {"pool", "spatial"})
        reference, _ = complete(reference, function, kinds, frames=frames)
        if jax.process_index() == 0:
            kept = items if items.count <= IMAGES_KEPT else None
            save_statistics(as_path(given.save_statistics), reference.statistics, kept)
        _tell(f"statistics of {items.count} item(s): {given.save_statistics}")
    if function and samples and given.metrics:
        found = measure(given.metrics, samples, reference, function, frames)
        _report(given, samples, making, found)


def _tell(text: str) -> None:
    if jax.process_index() == 0:
        print(text)


def _check_arguments(given: EvaluateArguments) -> None:
    """Raises ``ValueError`` where the command line asks for nothing, or for two things at once."""
    if given.samples and given.checkpoint:
        raise ValueError("--samples and --checkpoint are both given: measure one at a time.")
    if not (given.samples or given.checkpoint or given.save_statistics):
        raise ValueError(
            "nothing to evaluate: give --samples (a folder or .npz), --checkpoint (a run that makes "
            "samples), or --reference and --save-statistics."
        )
    if given.samples and not given.metrics and not given.save_statistics:
        raise ValueError("nothing to measure: give --metrics, e.g. fid sfid is precision recall.")
    if min(given.num, given.feature_batch, given.shard or 1) < 1:
        raise ValueError(
            f"--num {given.num}, --feature-batch {given.feature_batch} and --shard {given.shard} are "
            "at least 1."
        )
    if given.fvd_frames < I3D_MIN_FRAMES:
        raise ValueError(
            f"--fvd-frames is {given.fvd_frames}: I3D takes at least {I3D_MIN_FRAMES}."
        )
    if given.save_statistics:
        if not given.reference:
            raise ValueError("--save-statistics are those of a reference: give --reference too.")
        if not given.save_statistics.endswith(".npz"):
            raise ValueError(f"--save-statistics {given.save_statistics!r} must end in .npz.")
        check_file(given.save_statistics, "--save-statistics")
    if given.samples or given.checkpoint:
        check_writable(given.output)


def _shape(
    samples: ImageSet | None, making: Making | None, reference: Reference | None
) -> tuple[int, ...]:
    """The shape of one of what is looked at."""
    if samples:
        return samples.shape
    if making:
        return making.shape
    assert reference is not None
    if reference.items is None:
        raise ValueError(
            f"{reference.path!r} holds statistics already, and no images: nothing to compute."
        )
    return reference.items.shape


def _check_items(given: EvaluateArguments, reference: Reference | None, clips: bool) -> None:
    """Raises ``ValueError`` where a reference has not the items that statistics are to be made of."""
    shape = _shape(None, None, reference)
    assert reference is not None and reference.items is not None
    if (len(shape) == 4) != clips:
        kinds = ("clips", "images") if clips else ("images", "clips")
        raise ValueError(
            f"the samples are {kinds[0]}, and {reference.path!r} holds {kinds[1]}: evaluate the one, "
            "and make the statistics of the other, one after the other."
        )
    check_count("--save-statistics", reference.items.count, repr(reference.path))
    if clips:
        check_frames(shape, given.fvd_frames, f"of {reference.path!r} ")


def _feature_function(given: EvaluateArguments, clips: bool) -> FeatureFunction:
    network, path = (VIDEO, given.i3d_weights) if clips else (INCEPTION, given.features_weights)
    why = " ".join(given.metrics) or "--save-statistics"
    params = read_weights(network, check_weights(network, path, why))
    return NetworkFeatures(network.model.apply, params, given.feature_batch)


def _report(
    given: EvaluateArguments, samples: ImageSet, making: Making | None, found: Measured
) -> None:
    """Prints the metrics, and writes them with what they are of."""
    if jax.process_index():
        return
    weights = given.i3d_weights if is_clips(samples) else given.features_weights
    report = {
        "metrics": dict(found.metrics),
        "notes": list(found.notes),
        "samples": given.samples or str(making and making.store.samples),
        "num": samples.count,
        "shape": list(samples.shape),
        "reference": given.reference,
        "weights": weights,
        "made": making and dict(making.plan),
    }
    path = as_path(given.output) / "report.json"
    write_json(path, report)
    lines = [f"{name:>10} {value:.6g}" for name, value in found.metrics.items()]
    lines += [f"note: {note}" for note in found.notes]
    print("\n".join([*lines, f"of {samples.count} samples: {path}"]))


class Making:
    """Samples of a model: what is asked for, and where they are kept. The weights are read last."""

    def __init__(self, given: EvaluateArguments) -> None:
        self._given = given
        self._pipeline = load_run(
            given.checkpoint or "",
            given.step,
            given.codec,
            given.text_encoder,
            make_mesh(given.mesh),
            given.spread_parameters,
            **vars(given.sampling),
        )
        config, made = self._pipeline.config, self._pipeline.config.sampling
        self._wanted = _wanted(given, config)
        check_request(self._wanted.request(0), config.model)
        if jax.process_index() == 0 and (note := cut_note(config, self._wanted.prompts)):
            print(f"{PROG}: warning: {note}", file=sys.stderr, flush=True)
        image = (made.height, made.width, 3)
        self.shape = image if made.frames == 1 else (made.frames, *image)
        prompts = "\n".join(self._wanted.prompts).encode()
        self.plan = {
            "checkpoint": str(self._pipeline.path.parents[1]),
            "step": self._pipeline.step,
            "seed": given.seed,
            "labels": None if self._wanted.labels is None else given.labels,
            "prompts": hashlib.sha256(prompts).hexdigest() if prompts else None,
            "sampling": to_dict(made),
            "codec": self._pipeline.codec.hash,
            "text_encoder": config.text_encoder.hash,
        }
        shard = given.shard or made.batch * max(SHARD // made.batch, 1)
        self.store = SampleStore(as_path(given.output), self.plan, given.num, shard)

    def make(self) -> ImageSet:
        """Makes what is missing."""
        if self.store.finished:
            return fill(self.store, self._wanted, lambda _: [])
        pipeline = self._pipeline
        config = pipeline.config
        encoder = config.text_encoder.open(config.model.text, pipeline.mesh)

        def make(requests: Sequence[Request]) -> list[np.ndarray]:
            return pipeline.sample([plain(one) for one in with_states(requests, encoder)])

        return fill(self.store, self._wanted, make)


def _wanted(given: EvaluateArguments, config: VideoRun) -> Wanted:
    """What the model is asked for; raises ``ValueError`` where it reads something else."""
    made, run = config.sampling, given.checkpoint
    classes = config.model.conditioners.get("label")
    size = config.codec.latent_size(made.frames, made.height, made.width)
    fps = config.codec.latent_fps(made.fps)
    if isinstance(classes, ClassLabels):
        if given.prompts_file:
            raise ValueError(
                f"the model of {run!r} knows {classes.classes} classes and no text: leave out "
                "--prompts-file (--labels says how classes are drawn)."
            )
        labels = class_labels(given.labels, classes.classes, given.num, given.seed)
        return Wanted(size, fps, given.seed, labels=labels)
    if not given.prompts_file:
        raise ValueError(
            f"the model of {run!r} reads text: give --prompts-file FILE, a prompt a line, which are "
            "taken in turn (captions of the reference, for a fair comparison)."
        )
    return Wanted(size, fps, given.seed, prompts=read_prompts(given.prompts_file))


if __name__ == "__main__":
    tune_cpu()
    raise SystemExit(main())
