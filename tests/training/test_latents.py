"""Latents with text states: what is recorded trains, what cannot be drawn is refused, and JSON."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from dit_jax.config import LogConfig, VideoRun, from_dict, to_dict
from dit_jax.data import open_source
from dit_jax.evaluate import ShapeEvaluator
from dit_jax.model import unpatchify
from dit_jax.parallel import MeshConfig, global_batch, make_mesh
from dit_jax.training import abstract_state, init_state, make_optimizer, make_step

STEPS = 20


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig(1, 1, 1, 1), jax.devices()[:1])


@pytest.fixture(scope="module")
def trained(latents, mesh):
    """Two batches from the loader, and the losses of a step on each and of many on the first."""
    task = latents.build(mesh)
    rows = tuple(range(task.rows))
    loader = task.loader(rows)
    batches = [next(loader) for _ in range(2)]
    loader.close()
    optimizer = make_optimizer(latents.optimizer, STEPS)
    _, shardings = abstract_state(task.init, optimizer, mesh)
    state = init_state(task.init, optimizer, shardings, jax.random.key(0))
    step = make_step(task.loss, optimizer, latents.optimizer, 0, shardings)
    placed = [global_batch(mesh, batch, rows, task.rows) for batch in batches]
    losses = []
    for i in range(STEPS + 1):
        state, metrics = step(state, placed[i == 1])
        assert int(metrics["skipped"]) == 0
        losses.append(float(metrics["loss"]))
    return task, batches, losses


def test_batches_hold_what_was_recorded(trained, latents, latent_records):
    _, batches, _ = trained
    source = open_source(latents.data.source)
    clips = [source[i] for i in range(len(source))]
    found = 0
    for batch in batches:
        assert batch.tokens.shape == (4, 16, 16) and batch.tokens.dtype == np.float32
        assert batch.text.shape == (4, 18, 8) and batch.text.dtype == np.float32
        for row, slot in np.ndindex(batch.num_tokens.shape):
            if not batch.num_tokens[row, slot]:
                continue
            tokens = batch.tokens[row][batch.segment_ids[row] == slot + 1]
            text = batch.text[row][batch.text_segment_ids[row] == slot + 1]
            # Exactly: latents are cut into patches, states get a beginning, and nothing else.
            matching = [
                np.array_equal(text[1:], clip["text_states"][:5])
                and len(tokens) == (video := clip["video"]).size // 16
                and np.array_equal(unpatchify(latents.model.patch, tokens, *video.shape[:3]), video)
                for clip in clips
            ]
            assert sum(matching) == 1 and not text[0].any()
            found += 1
    assert found >= 12


def test_latents_train(trained):
    _, _, losses = trained
    assert np.isfinite(losses).all()
    # Fresh, the model says zero: the mean of (eps - x0)^2 is 1 and the colours' own square, 0.88 and
    # 1.13, within what 60 tokens of 16 numbers leave to chance.
    assert abs(losses[0] - 2.0) < 0.3
    # The colours are known soon; that is worth far more than one step's noise differs from another's.
    assert np.mean(losses[-5:]) < 0.6 * losses[0]


def test_work_counts_states(trained, latents):
    task, (batch, _), _ = trained
    work = task.work(batch)
    assert work.tokens == batch.num_tokens.sum() and work.capacity == 64
    shorter = dataclasses.replace(batch, text_segment_ids=np.minimum(batch.text_segment_ids, 1))
    assert 0 < task.work(shorter).flops != work.flops


@pytest.mark.parametrize(
    "change",
    [{"log": LogConfig(draw_every=5)}, {"evaluators": (ShapeEvaluator(prompts=1),)}],
    ids=["draw_every", "prompts"],
)
def test_latents_that_would_be_drawn_are_refused(latents, change):
    with pytest.raises(ValueError, match="4: these are latents.* log.draw_every to 0, .* prompts"):
        dataclasses.replace(latents, **change)


def test_text_states_survive_json(latents):
    values = json.loads(json.dumps(to_dict(latents)))
    kind = "dit_jax.model.text:TextStatesConfig"
    text = {"type": kind, "encoder": "umt5-xxl", "dim": 8, "max_tokens": 6, "padded": False}
    assert values["model"]["text"] == text
    assert from_dict(VideoRun, values) == latents
