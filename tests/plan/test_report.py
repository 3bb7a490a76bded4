"""The arithmetic of plans, and how they read."""

import dataclasses
import json
from types import SimpleNamespace

import pytest

from dit_jax.config import load_config
from dit_jax.plan import DoesNotFit, plan_step, render, report
from dit_jax.plan.abstract import AbstractStep
from dit_jax.plan.analysis import SYNC, WAIT, Tally
from dit_jax.plan.topologies import parse_topology

TOPOLOGY = parse_topology("v5p:2x2x2")


def use(kind, network, group, seconds=0.0, logical=1.0, wire=1.0, executions=1.0, background=0.0):
    sums = {"executions": executions, "asynchronous": background, "logical_bytes": logical}
    sums |= {"wire_bytes": wire, "seconds": seconds}
    return {("collectives", kind, network, group, name): value for name, value in sums.items()}


STEP = AbstractStep(
    function=None,
    arguments=(),
    flops=8 * 459e12,  # One second of each chip.
    parameters=10**9,
    tokens=1e6,
    state={"params": 4e9 / 8, "ema": 4e9 / 8, "optimizer": 8e9 / 8},
)
TALLY = Tally(
    {
        **{"flops": 459e12, "kernel_flops": 459e12 / 2, "hbm_bytes": 2765e9, "op_seconds": 2.0},
        **{SYNC: 0.25, WAIT: 0.25, ("warnings", "something"): 1},
        **use("all-gather", "ici", 8, 0.5, 2e9, 1.75e9, 3.0, 3.0),
        ("kernels", "splash", "executions"): 2.0,
        ("kernels", "splash", "flops"): 459e12 / 2,
        ("kernels", "splash", "hbm_bytes"): 1e9,
    }
)


@pytest.fixture
def plan(monkeypatch):
    """``plan(...)``: of a step that was compiled and tallied as above."""
    sizes = {"argument": 2e9, "temp": 30e9, "output": 2.1e9, "alias": 2e9}
    sizes |= {"host_temp": 5e9, "host_argument": 0.0}
    used = SimpleNamespace(**{f"{name}_size_in_bytes": size for name, size in sizes.items()})
    compiled = SimpleNamespace(
        as_text=str, memory_analysis=lambda: used, cost_analysis=lambda: {"flops": 1e12}
    )
    traced = SimpleNamespace(jaxpr=None)
    monkeypatch.setattr(report, "make_mesh", lambda *_: MESH)
    monkeypatch.setitem(report.STEPS, "train", lambda *_: STEP)
    monkeypatch.setattr(report, "compile_step", lambda _: (traced, compiled, 12.3))
    monkeypatch.setattr(report, "parse", str)
    monkeypatch.setattr(report, "find_kernels", lambda _: [])
    monkeypatch.setattr(report, "analyse", lambda *_: TALLY)
    monkeypatch.setattr(report, "traced_flops", lambda *_: 8 * 600e12)
    config = load_config("tests/plan/small_config.py")
    return lambda **budget: plan_step("train", config, "c", TOPOLOGY, [], **budget)


MESH = SimpleNamespace(shape={"data": 1, "fsdp": 8}, size=8, devices=SimpleNamespace(flat=[]))


@pytest.mark.parametrize(
    "sums, bound, seconds",
    [
        ({"flops": 459e12, "kernel_flops": 459e12}, "flops", 2.0),
        ({"flops": 459e12, "hbm_bytes": 3 * 2765e9}, "hbm", 3.0),
        (use("all-reduce", "ici", 8, 4.0), "ici", 4.0),
        (use("all-reduce", "dcn", 2, 5.0), "dcn", 5.0),
        ({"host_bytes": 6 * TOPOLOGY.chip.host_bandwidth}, "host", 6.0),
    ],
)
def test_the_busiest_resource_bounds(sums, bound, seconds):
    times = report.least_times(Tally(sums), TOPOLOGY)
    assert (times["bound_by"], times["roofline"]) == (bound, seconds)
    # No time is below the roofline.
    assert times["per_op"] == times["scheduled"] == seconds


def test_permutations_in_both_directions_overlap():
    sums = {"ring_up": 3.0, "ring_down": 2.0, **use("collective-permute", "ici", 8, 5.0)}
    assert report.least_times(Tally(sums), TOPOLOGY)["ici"] == 3.0


def test_a_device_of_two_on_a_chip_has_half_its_peaks():
    times = report.least_times(Tally({"flops": 2307e12}), parse_topology("tpu7x:2x2x1"))
    assert times["flops"] == 2.0


def test_days_and_chip_hours(plan):
    # 38,400 steps of 2.25 s are a day of 24 h, on 8 chips.
    budget = plan(tokens=38.4e9, price=3.0)["budget"]
    expected = {"tokens": 38.4e9, "steps": 38_400, "days": 1, "chip_hours": 24 * 8, "price": 576}
    assert budget == expected
    assert plan(tokens=38.4e9)["budget"]["price"] is None and plan()["budget"] is None


def test_a_plan(plan):
    plan = plan()
    assert plan["peak_bytes"] == 2e9 + 30e9 + 2.1e9 - 2e9 and plan["capacity"] == 95e9
    assert plan["flops"]["model"] == 459e12 and plan["flops"]["compiled"] == 1.5 * 459e12
    assert plan["flops"]["traced"] == 600e12
    seconds = [plan["seconds"][name] for name in ("roofline", "per_op", "scheduled")]
    assert seconds == [1.5, 2.25, 2.5]
    expected = {"roofline": 1 / 1.5, "per_op": 1 / 2.25, "scheduled": 0.4}
    assert plan["mfu"] == pytest.approx(expected)
    assert plan["wire_bytes"] == {"ici": 1.75e9, "dcn": 0}


def test_a_plan_is_json(plan):
    values = json.loads(json.dumps(plan(tokens=1e9)))
    assert values["state"] == {"params": 5e8, "ema": 5e8, "optimizer": 1e9}
    memory = {"arguments": 2e9, "temporary": 30e9, "outputs": 2.1e9, "aliased": 2e9, "host": 5e9}
    assert values["memory"] == memory and values["seconds"]["bound_by"] == "flops"
    assert values["collectives"][0]["wire_bytes"] == 1.75e9
    kernel = {"name": "splash", "executions": 2, "flops": 459e12 / 2, "hbm_bytes": 1e9}
    assert values["kernels"] == [kernel]
    assert values["budget"]["price"] is None and values["warnings"] == ["something"]


def test_a_plan_as_text(plan):
    text = render(plan(tokens=1e9, price=2.0))
    assert "train step of c on v5p:2x2x2 (8 chips), mesh fsdp 8, remat none" in text
    assert "1 G parameters, 1,000,000 tokens a step" in text
    assert "state        2 GB: parameters 500 MB, average 500 MB, optimizer 1 GB" in text
    assert "32.1 GB of 95 GB (34%)" in text and "host 5 GB" in text
    assert "model 459 T; compiled 688 T (1.50 x), kernels 230 T of them" in text
    assert "splash: 2 x, 230 Tflop, 1 GB" in text and "(XLA's count none)" in text
    assert "all-gather among 8: 3 x (3 asynchronous), 2 GB, on the wire 1.75 GB, 500 ms" in text
    assert "1.5 s a step, bound by flops" in text and "per op       2.25 s" in text
    assert "roofline 66.7%, per_op 44.4%, scheduled 40.0%" in text
    assert "1 G tokens: 1,000 steps, at least 0.026 days, 5 chip-hours, 10 USD" in text
    assert text.endswith("warning      something")


def test_a_plan_above_the_published_capacity_does_not_fit(plan, monkeypatch):
    chip = dataclasses.replace(TOPOLOGY.chip, hbm_bytes=30e9)
    monkeypatch.setattr(f"{__name__}.TOPOLOGY", dataclasses.replace(TOPOLOGY, chip=chip))
    with pytest.raises(DoesNotFit, match=r"32\.1 of 30\.0 GB"):
        plan()


@pytest.mark.parametrize(
    "message, reason",
    [
        # Of 2^30 bytes.
        ("in memory space hbm. Used 245.84G of 95.74G hbm.", "needs 264.0 of 102.8 GB of HBM"),
        (
            "out of memory on HBM, HLO temporaries (245.84G) exceeds available HBM (95.74G).",
            "needs 264.0 of 102.8 GB of HBM",
        ),
        ("no room\nmore", "RESOURCE_EXHAUSTED: no room"),  # as it is
    ],
)
def test_what_the_compiler_says_of_memory_is_read(message, reason):
    assert DoesNotFit(f"RESOURCE_EXHAUSTED: {message}").reason.endswith(reason)


VMEM = """RESOURCE_EXHAUSTED: E1001: CompileTimeScopedVmemOom:
Ran out of memory in memory space vmem while allocating on stack for %{}.2 = (f32[8]) custom-call(). \
Scoped allocation with size 25.83M and limit 16.00M exceeded scoped vmem limit by 9.83M."""


def test_a_kernel_that_wants_too_much_vmem_needs_smaller_blocks():
    error = DoesNotFit(VMEM.format("splash_mha_dkv"))
    assert error.space == "vmem"
    assert "splash_mha_dkv needs 25.83 of 16 MiB of vmem" in error.reason
    assert "attention.splash" in str(error) and "mesh" not in str(error)
