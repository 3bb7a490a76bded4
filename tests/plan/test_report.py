"""The arithmetic of plans, and how they read."""

import dataclasses
import json

import pytest

from dit_jax.plan import DoesNotFit, render
from dit_jax.plan.analysis import KernelUse, Tally, Use
from dit_jax.plan.lowering import Memory, Program, State
from dit_jax.plan.report import budget, make_plan, times
from dit_jax.plan.topologies import parse_topology

TOPOLOGY = parse_topology("v5p:2x2x2")
CHIP = TOPOLOGY.chip
LABELS = {
    "what": "train",
    "config": "c",
    "mesh": {"data": 1, "fsdp": 8},
    "remat": "none",
    "parts": 1,
}


def tally(**fields):
    return dataclasses.replace(Tally(), **fields)


PROGRAM = Program(
    text="",
    kernels=[],
    parameters=10**9,
    state=State(4e9 / 8, 4e9 / 8, 8e9 / 8),
    memory=Memory(2e9, 30e9, 2.1e9, 2e9, 5e9),
    tokens=1e6,
    model_flops=8 * 459e12,  # One second of each chip.
    traced_flops=8 * 600e12,
    compiler_flops=1e12,
    compiler_bytes=None,
    compile_seconds=12.3,
)
TALLY = tally(
    flops=459e12,
    kernel_flops=459e12 / 2,
    hbm_bytes=2765e9,
    op_seconds=2.0,
    sync_seconds=0.25,
    wait_seconds=0.25,
    collectives={("all-gather", "ici", 8): Use(3, 3, 2e9, 1.75e9, 0.5)},
    kernels={"splash": KernelUse(2, 459e12 / 2, 1e9)},
    warnings={"something"},
)


@pytest.mark.parametrize(
    "fields, bound, seconds",
    [
        ({"flops": 459e12, "kernel_flops": 459e12}, "flops", 2.0),
        ({"flops": 459e12, "hbm_bytes": 3 * 2765e9}, "hbm", 3.0),
        ({"collectives": {("all-reduce", "ici", 8): Use(1, 0, 1, 1, 4.0)}}, "ici", 4.0),
        ({"collectives": {("all-reduce", "dcn", 2): Use(1, 0, 1, 1, 5.0)}}, "dcn", 5.0),
        ({"host_bytes": 6 * CHIP.host_bandwidth}, "host", 6.0),
    ],
)
def test_the_busiest_resource_bounds(fields, bound, seconds):
    found = times(tally(**fields), TOPOLOGY)
    assert (found.bound_by, found.roofline) == (bound, seconds)
    # No time is below the roofline.
    assert found.per_op == found.scheduled == seconds


def test_permutations_in_both_directions_overlap():
    one = tally(
        ring_up=3.0,
        ring_down=2.0,
        collectives={("collective-permute", "ici", 8): Use(2, 2, 1, 1, 5.0)},
    )
    assert times(one, TOPOLOGY).ici == 3.0


def test_a_device_of_two_on_a_chip_has_half_its_peaks():
    topology = parse_topology("tpu7x:2x2x1")
    assert times(tally(flops=2307e12), topology).flops == 2.0


def test_days_and_chip_hours():
    found = budget(tokens=864e9, step_tokens=1e6, step_seconds=2.0, chips=64, price=3.0)
    # 864,000 steps of 2 s are 20 days of 24 h, on 64 chips.
    assert (found.steps, found.days, found.chip_hours) == (864_000, 20, 20 * 24 * 64)
    assert found.price == 3 * 20 * 24 * 64
    assert budget(1e9, 1e6, 1, 8, None).price is None


def test_a_plan():
    plan = make_plan(PROGRAM, TALLY, TOPOLOGY, LABELS, tokens=1e9, price=2.0)
    assert plan.peak_bytes == 2e9 + 30e9 + 2.1e9 - 2e9 and plan.capacity == 95e9
    assert plan.flops.model == 459e12 and plan.flops.compiled == 1.5 * 459e12
    assert plan.flops.traced == 600e12
    assert (plan.seconds.roofline, plan.seconds.per_op, plan.seconds.scheduled) == (1.5, 2.25, 2.5)
    assert plan.mfu == pytest.approx({"roofline": 1 / 1.5, "per_op": 1 / 2.25, "scheduled": 0.4})
    assert plan.wire_bytes == {"ici": 1.75e9, "dcn": 0}
    assert plan.budget is not None and plan.budget.steps == 1000


def test_a_plan_is_json():
    plan = make_plan(PROGRAM, TALLY, TOPOLOGY, LABELS, tokens=1e9)
    values = json.loads(json.dumps(plan.to_dict()))
    assert values["state"] == {"params": 5e8, "ema": 5e8, "optimizer": 1e9}
    assert values["memory"]["temporary"] == 30e9 and values["seconds"]["bound_by"] == "flops"
    assert values["collectives"][0]["wire_bytes"] == 1.75e9
    assert values["budget"]["price"] is None and values["warnings"] == ["something"]


def test_a_plan_as_text():
    text = render(make_plan(PROGRAM, TALLY, TOPOLOGY, LABELS, tokens=1e9, price=2.0))
    assert "train step of c on v5p:2x2x2 (8 chips), mesh fsdp 8, remat none" in text
    assert "1 G parameters, 1,000,000 tokens a step" in text
    assert "state        2 GB: parameters 500 MB, average 500 MB, optimizer 1 GB" in text
    assert "32.1 GB of 95 GB (34%)" in text and "host 5 GB" in text
    assert "model 459 T; compiled 688 T (1.50 x), kernels 230 T of them" in text
    assert "splash: 2 x, 230 Tflop, 1 GB" in text
    assert "all-gather among 8: 3 x (3 asynchronous), 2 GB, on the wire 1.75 GB, 500 ms" in text
    assert "1.5 s a step, bound by flops" in text and "per op       2.25 s" in text
    assert "roofline 66.7%, per_op 44.4%, scheduled 40.0%" in text
    assert "1 G tokens: 1,000 steps, at least 0.026 days, 5 chip-hours, 10 USD" in text
    assert text.endswith("warning      something")


@pytest.mark.parametrize(
    "message",
    [
        "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. "
        "Used 245.84G of 95.74G hbm. Exceeded hbm capacity by 150.11G.",
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries "
        "(245.84G) exceeds available HBM (95.74G).",
    ],
)
def test_what_the_compiler_says_of_memory_is_read(message):
    error = DoesNotFit(message)
    assert error.used == pytest.approx(245.84 * 2**30)
    assert error.capacity == pytest.approx(95.74 * 2**30)
    assert "needs 264.0 of 102.8 GB of HBM. Spread it over more devices" in str(error)


def test_another_want_of_memory_is_told_as_it_is():
    error = DoesNotFit("RESOURCE_EXHAUSTED: no room\nmore")
    assert error.used is None and "does not fit: RESOURCE_EXHAUSTED: no room." in str(error)


VMEM = """RESOURCE_EXHAUSTED: E1001: CompileTimeScopedVmemOom:
Ran out of memory in memory space vmem while allocating on stack for %{}.2 = (f32[8]) custom-call(). \
Scoped allocation with size 25.83M and limit 16.00M exceeded scoped vmem limit by 9.83M."""


@pytest.mark.parametrize(
    "kernel, remedy",
    [
        ("splash_mha_fwd_segmented_residuals", "(block_q, block_kv, block_kv_compute)"),
        (
            "splash_mha_dkv_segmented_no_residuals",
            "(block_q_backward, block_kv_backward, block_kv_backward_compute)",
        ),
        ("another", "if it is attention's, try other attention.splash blocks"),
    ],
)
def test_a_kernel_that_wants_too_much_vmem_needs_smaller_blocks(kernel, remedy):
    error = DoesNotFit(VMEM.format(kernel))
    assert error.space == "vmem" and error.used == pytest.approx(25.83 * 2**20)
    assert f"does not fit: {kernel} needs 25.83 of 16 MiB of vmem. More devices do not" in str(
        error
    )
    assert remedy in str(error) and "mesh" not in str(error) and "accumulate" not in str(error)
