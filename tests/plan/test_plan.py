"""The verb: what it refuses, what a sweep tries, and one small step compiled for TPUs."""

import dataclasses
import importlib.util
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import pytest

from dit_jax.config import load_config
from dit_jax.parallel import MeshConfig
from dit_jax.plan import CompilerFailed, DoesNotFit, render_sweep, run_sweep
from dit_jax.plan import __main__ as verb
from dit_jax.plan.abstract import STEPS, compile_step
from dit_jax.plan.sweep import REMAT_POLICIES, candidates, meshes, state_alone
from dit_jax.plan.topologies import parse_topology

ROOT = Path(__file__).resolve().parents[2]
CONFIG = str(Path(__file__).with_name("small_config.py"))
GIVEN = ("--config", CONFIG, "--topology", "v5e:2x4")
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed (dit-jax[tpu])"
)


def refused(capsys, *arguments):
    """What is said where these are refused."""
    try:
        status = verb.main([str(one) for one in arguments])
    except SystemExit as error:
        status = error.code
    said = capsys.readouterr()
    assert status == 2 and not said.out and "Traceback" not in said.err
    return " ".join(re.sub("[╭─╮│╰╯]", " ", said.err).split())


def test_without_libtpu_it_is_told_how_to_get_it(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "libtpu", None)
    said = refused(capsys, *GIVEN)
    assert "pip install 'dit-jax[tpu]', in a clone pip install -e '.[tpu]'" in said


@pytest.mark.parametrize(
    "arguments, message",
    [
        (GIVEN[:2], "topology"),
        (GIVEN[2:], "--config FILE is required"),
        ((*GIVEN[:3], "v9:2x2"), "'v9'"),
        ((*GIVEN, "--mesh.fsdpp", "2"), "fsdpp"),
        ((*GIVEN, "--limit", "0"), "limit is 0"),
        ((*GIVEN, "--slices", "0"), "slices is 0"),
        ((*GIVEN, "--price", "-1"), "price is -1"),
        ((*GIVEN, "--what", "dream"), "dream"),
        ((*GIVEN, "--what", "sample", "--tokens", "1e9"), "--tokens is 1000000000.0"),
        ((*GIVEN, "--what", "sample", "--price", "2"), "--price is 2.0 and --what is sample"),
        ((*GIVEN, "--price", "2"), "--price is 2.0 and --tokens is unset"),
    ],
)
def test_wrong_arguments_are_refused(capsys, arguments, message):
    assert message in refused(capsys, *arguments)


def test_a_file_that_cannot_be_written_is_refused_first(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(verb, "topology_devices", lambda _: pytest.fail("too late"))
    (tmp_path / "file").write_text("")
    for place, message in (
        (tmp_path / "file" / "x.json", "cannot be written"),
        ("/proc/plans/x.json", "cannot be written"),
        (tmp_path, "is a directory"),
        (tmp_path / f"{'x' * 300}.json", "cannot be"),
    ):
        assert message in refused(capsys, *GIVEN, "--json", place)


class MosaicError(Exception):
    """As JAX raises it: a private class of its own."""

    __module__ = "jax._src.pallas.mosaic.error_handling"


@pytest.mark.parametrize(
    "error, status, message",
    [
        (jax.errors.JaxRuntimeError("INTERNAL: failed:\nno tiling\nx"), 2, "failed: no tiling."),
        (MosaicError("INTERNAL: Mosaic failed to compile\nx"), 2, "Mosaic failed to compile."),
        (NotImplementedError("Unimplemented primitive"), 2, "Unimplemented primitive."),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: no room"), 3, "does not fit"),
    ],
)
def test_what_the_compiler_cannot_do_is_refused(capsys, monkeypatch, error, status, message):
    def fake(*_):
        raise error

    function = SimpleNamespace(trace=fake_trace(fake))
    step = SimpleNamespace(function=function, arguments=(), state=None)
    monkeypatch.setitem(STEPS, "train", lambda *_: step)
    monkeypatch.setattr(verb, "topology_devices", lambda _: jax.devices())
    assert verb.main([*GIVEN]) == status
    said = capsys.readouterr()
    assert message in said.err and "Traceback" not in said.err and not said.out
    if status == 2:
        assert "error: the compiler failed: " in said.err
    # A sweep goes on, and none of its meshes fits.
    small = ("--sweep", "--limit", "2", "--model.dit.remat", "none")
    assert verb.main([*GIVEN, *small]) == status
    said = capsys.readouterr()
    reason = "refused: the compiler failed" if status == 2 else "does not fit: RESOURCE"
    assert said.out.count(reason) == 2


def fake_trace(compile):
    return lambda: SimpleNamespace(lower=lambda: SimpleNamespace(compile=compile))


def test_a_mistake_of_ours_is_not_the_compilers(monkeypatch):
    def fake():
        raise TypeError("ours")

    step: Any = SimpleNamespace(function=SimpleNamespace(trace=fake_trace(fake)), arguments=())
    with pytest.raises(TypeError, match="ours"):
        compile_step(step)


@needs_libtpu
def test_a_mesh_that_does_not_fill_the_topology_is_refused(capsys):
    mesh = ("--mesh.data", 1, "--mesh.fsdp", 3)
    said = refused(capsys, *GIVEN, *mesh)
    assert "mesh data 1 x fsdp 3 x context 1 x tensor 1 does not divide 8 device(s)" in said


def sized(rows, row_tokens, heads, accumulate=1):
    config = load_config(CONFIG)
    packing = dataclasses.replace(config.data.packing, rows=rows, row_tokens=row_tokens)
    dit = dataclasses.replace(config.model.dit, heads=heads, width=64 * heads)
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, packing=packing),
        model=dataclasses.replace(config.model, dit=dit),
        optimizer=dataclasses.replace(config.optimizer, accumulate=accumulate),
    )


def shapes(config, topology, slices=1, what="train"):
    return [mesh.sizes for mesh in meshes(config, what, parse_topology(topology, slices))]


def test_sensible_meshes_divide_rows_tokens_and_heads():
    # 4 chips: rows take 1 or 2 of them, heads 1 or 3, so that tokens take the rest.
    assert shapes(sized(2, 1024, 3), "v5e:2x2") == [
        (1, 2, 2, 1),
        (2, 1, 2, 1),
        (1, 1, 4, 1),
    ]
    assert (1, 2, 1, 2) in shapes(sized(2, 1024, 4), "v5e:2x2")
    # Of 8 rows in 4 parts, 2 are computed at once.
    assert shapes(sized(8, 1024, 3, accumulate=4), "v5e:2x2") == shapes(
        sized(2, 1024, 3), "v5e:2x2"
    )
    # 1025 tokens do not divide.
    assert shapes(sized(4, 1025, 3), "v5e:2x2") == [(1, 4, 1, 1), (4, 1, 1, 1)]
    assert shapes(sized(3, 1025, 3), "v5e:2x2") == []


def test_slices_are_crossed_by_data():
    assert shapes(sized(8, 1025, 3), "v5e:2x2", slices=2) == [(2, 4, 1, 1), (8, 1, 1, 1)]


def test_a_guided_step_has_two_rows():
    assert shapes(sized(8, 1024, 3), "v5e:2x2", what="sample")[0] == (1, 2, 2, 1)


def test_every_policy_is_tried_on_every_mesh():
    config, topology = sized(4, 1025, 3), parse_topology("v5e:2x2")
    assert {"none", "full", "offload"} <= set(REMAT_POLICIES)
    tried = [(m.sizes, remat) for m, remat, _ in candidates(config, "train", topology)]
    assert tried == [(m, r) for m in shapes(config, "v5e:2x2") for r in REMAT_POLICIES]
    assert all(
        c.mesh == m and c.model.dit.remat == r for m, r, c in candidates(config, "train", topology)
    )


def test_a_sweep_ranks_what_fits_and_says_why_the_rest_does_not(monkeypatch, capsys):
    config, topology = sized(4, 1025, 3), parse_topology("v5e:2x2")

    def fake(what, config, name, topology, devices, **_):
        if config.mesh.data == 4:
            raise DoesNotFit("RESOURCE_EXHAUSTED: Used 20.00G of 15.75G hbm.")
        if config.model.dit.remat == "offload":
            raise ValueError("no host")
        if config.model.dit.remat == "full":
            raise CompilerFailed("INTERNAL: Mosaic failed.")
        return plans[config.model.dit.remat]

    rest = {"mfu": {"per_op": 0.5}, "peak_bytes": 1e9, "wire_bytes": {"ici": 2e9}}
    plans = {
        remat: {"seconds": {"per_op": 1.0 + i, "bound_by": "hbm"}, **rest}
        for i, remat in enumerate(reversed(REMAT_POLICIES))
    }
    monkeypatch.setattr("dit_jax.plan.sweep.plan_step", fake)
    monkeypatch.setattr("dit_jax.plan.sweep.state_alone", lambda *_: None)
    limit = 2 * len(REMAT_POLICIES) - 1
    trials, left_out = run_sweep("train", config, "c", topology, [], limit)
    printed = [line.split()[0] for line in capsys.readouterr().err.splitlines()]
    assert left_out == 1 and printed == [f"[{i + 1}/{limit}]" for i in range(limit)]
    fitting = [trial for trial in trials if trial["plan"]]
    seconds = [trial["plan"]["seconds"]["per_op"] for trial in fitting]
    assert seconds == sorted(seconds) and trials[: len(fitting)] == fitting
    assert fitting[0]["mesh"] == dataclasses.asdict(MeshConfig(1, 4))
    reasons = {trial["reason"] for trial in trials[len(fitting) :]}
    assert reasons == {
        "refused: no host",
        f"refused: {CompilerFailed('INTERNAL: Mosaic failed.')}",
        "does not fit: the program needs 21.5 of 16.9 GB of HBM",
    }
    table = render_sweep(trials, left_out)
    assert "1x4x1x1" in table and "50.0%" in table and "1 more combinations were not tried" in table


def test_a_state_that_is_too_large_need_not_be_compiled():
    config, topology = load_config(CONFIG), parse_topology("v5e:2x4")
    tiny = dataclasses.replace(topology, chip=dataclasses.replace(topology.chip, hbm_bytes=10e6))
    # 859 k parameters of 16 bytes: 13.7 MB on each of `data`, an eighth of it by fsdp.
    whole = dataclasses.replace(config, mesh=MeshConfig(data=8))
    assert state_alone(whole, topology, jax.devices()) is None
    reason = state_alone(whole, tiny, jax.devices())
    assert reason is not None and "the state alone needs 0.0137 of 0.01 GB of HBM" in reason
    assert state_alone(config, tiny, jax.devices()) is None


@pytest.mark.slow
@needs_libtpu
def test_a_small_step_is_planned(capsys, tmp_path):
    path = tmp_path / "plan.json"
    given = (*GIVEN, "--tokens", "1e9", "--json", path)
    assert verb.main([str(one) for one in given]) == 0
    text, values = capsys.readouterr().out, json.loads(path.read_text())
    assert "train step of small_config on v5e:2x4 (8 chips), mesh fsdp 8" in text
    assert values["warnings"] == [] and values["chips"] == 8
    # Float32 parameters, their average and Adam's two moments, nearly all of them over 8 chips.
    state, whole = values["state"], 4 * values["parameters"]
    assert state["params"] == state["ema"] and whole / 8 <= state["params"] < 1.2 * whole / 8
    assert 2 * state["params"] <= state["optimizer"] < 2.01 * state["params"]
    assert sum(state.values()) <= values["memory"]["arguments"] < values["peak_bytes"]
    flops = values["flops"]
    # Nothing is recomputed but inside attention, and all that is traced is compiled; XLA's own count
    # leaves loops' trips and kernels out.
    assert 1 < flops["compiled"] / flops["model"] < 1.5 and flops["kernels"] > 0
    assert flops["traced"] == pytest.approx(flops["compiled"], rel=0.02)
    assert flops["compiler"] < flops["compiled"] / 2
    networks = {line["network"] for line in values["collectives"]}
    assert networks == {"ici"} and values["wire_bytes"]["dcn"] == 0
    seconds = values["seconds"]
    assert seconds["roofline"] <= seconds["per_op"] <= seconds["scheduled"]
    assert values["budget"]["steps"] == 1e9 / values["tokens"]
