"""The circle of a loop, and its two cuts."""

import jax.numpy as jnp
import numpy as np

from dit_jax.sampling.sampler import on_two_cuts
from tests.denoiser import struct


def test_the_two_cuts_of_a_loop_are_half_a_turn_apart():
    where = np.zeros((2, 6, 3), np.float32)
    where[:, :, 0] = 2 + 0.5 * np.arange(6)
    cycles = np.array([[6, 2, 0.5], [0, 0, 0]], np.float32)
    asked = []

    def evaluate(inputs):
        asked.append((inputs.positions[..., 0], inputs.group_t[:, 0]))
        return inputs.tokens * inputs.positions[..., :1]

    x = np.ones((4, 6, 2), np.float32)  # with guidance: prompts, and then empty ones
    made = on_two_cuts(evaluate, jnp.asarray(cycles), jnp.int32(0))(
        struct(
            tokens=x,
            positions=jnp.tile(where, (2, 1, 1)),
            segment_ids=np.ones((4, 6)),
            group_ids=np.zeros((4, 6)),
            group_t=np.arange(4)[:, None],
        )
    )
    ((clock, level),) = asked
    assert level.tolist() == [0, 1, 2, 3] * 2 and clock.shape == (8, 6)
    number = (np.asarray(clock) - 2) / 0.5
    assert number[0].tolist() == [0, 1, 2, 3, 4, 5] == number[1].tolist() == number[5].tolist()
    assert number[4].tolist() == [3, 4, 5, 0, 1, 2] == number[6].tolist()
    # Equal shares half way between the cuts, and the least next to one.
    share = np.sin(np.pi * (np.arange(6) + 0.5) / 6) ** 2
    expected = share * clock[0] + (1 - share) * clock[4]
    np.testing.assert_allclose(made[0, :, 0], expected, rtol=1e-6)
    np.testing.assert_allclose(made[2], made[0])
    np.testing.assert_allclose(made[1, :, 0], where[1, :, 0], rtol=1e-6)
