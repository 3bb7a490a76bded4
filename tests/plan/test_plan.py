"""The verb: what it refuses, what a sweep tries, and one small step compiled for TPUs."""

import dataclasses
import importlib.util
import json
import re
import sys
from pathlib import Path
from unittest.mock import Mock

import jax
import pytest

from dit_jax.config import load_config
from dit_jax.parallel import MeshConfig
from dit_jax.plan import CompilerFailed, DoesNotFit, render_sweep, run_sweep
from dit_jax.plan import __main__ as verb
from dit_jax.plan.abstract import STEPS, compile_step
from dit_jax.plan.sweep import REMAT_POLICIES, candidates, meshes, state_alone
from dit_jax.plan.topologies import parse_topology

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
    __module__ = "jax._src.pallas.mosaic.error_handling"  # a private class of JAX's own


def failing(error):
    """A step whose compiling raises this."""
    step = Mock(arguments=(), state=None)
    step.function.trace.return_value.lower.return_value.compile.side_effect = error
    return step


@pytest.mark.parametrize(
    "error, kind, message",
    [
        (MosaicError("INTERNAL: Mosaic failed to compile\nx"), CompilerFailed, "to compile."),
        (NotImplementedError("Unimplemented primitive"), CompilerFailed, "primitive."),
        (TypeError("ours"), TypeError, "ours"),  # a mistake of ours is not the compiler's
    ],
)
def test_whose_failure_it_is(error, kind, message):
    with pytest.raises(kind, match=message):
        compile_step(failing(error))


@pytest.mark.parametrize(
    "text, status, message, reason",
    [
        ("INTERNAL: failed:\nno tiling\nx", 2, "INTERNAL: failed: no tiling.", "refused: the"),
        ("RESOURCE_EXHAUSTED: no room", 3, "does not fit", "does not fit: RESOURCE"),
    ],
)
def test_what_the_compiler_cannot_do_is_refused(capsys, monkeypatch, text, status, message, reason):
    error = jax.errors.JaxRuntimeError(text)
    monkeypatch.setitem(STEPS, "train", lambda *_: failing(error))
    monkeypatch.setattr(verb, "topology_devices", lambda _: jax.devices())
    assert verb.main([*GIVEN]) == status
    said = capsys.readouterr()
    assert message in said.err and "Traceback" not in said.err and not said.out
    # A sweep goes on, and none of its meshes fits.
    small = ("--sweep", "--limit", "2", "--model.dit.remat", "none")
    assert verb.main([*GIVEN, *small]) == status
    assert capsys.readouterr().out.count(reason) == 2


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


def shapes(config, slices=1, what="train"):
    return [mesh.sizes for mesh in meshes(config, what, parse_topology("v5e:2x2", slices))]


@pytest.mark.parametrize(
    "config, how, expected",
    [
        # 4 chips: rows take 1 or 2 of them, heads 1 or 3, so that tokens take the rest.
        ((2, 1024, 3), {}, [(1, 2, 2, 1), (2, 1, 2, 1), (1, 1, 4, 1)]),
        # Of 8 rows in 4 parts, 2 are computed at once.
        ((8, 1024, 3, 4), {}, [(1, 2, 2, 1), (2, 1, 2, 1), (1, 1, 4, 1)]),
        # 1025 tokens do not divide.
        ((4, 1025, 3), {}, [(1, 4, 1, 1), (4, 1, 1, 1)]),
        ((3, 1025, 3), {}, []),
        # Slices are crossed by data.
        ((8, 1025, 3), {"slices": 2}, [(2, 4, 1, 1), (8, 1, 1, 1)]),
    ],
)
def test_sensible_meshes_divide_rows_tokens_and_heads(config, how, expected):
    assert shapes(sized(*config), **how) == expected


def test_meshes_of_heads_and_of_a_guided_step():
    assert (1, 2, 1, 2) in shapes(sized(2, 1024, 4))
    assert shapes(sized(8, 1024, 3), what="sample")[0] == (1, 2, 2, 1)  # two rows


def test_every_policy_is_tried_on_every_mesh():
    config, topology = sized(4, 1025, 3), parse_topology("v5e:2x2")
    assert {"none", "full", "offload"} <= set(REMAT_POLICIES)
    tried = [(m.sizes, remat) for m, remat, _ in candidates(config, "train", topology)]
    assert tried == [(m, r) for m in shapes(config) for r in REMAT_POLICIES]
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


@pytest.mark.slow
@needs_libtpu
def test_offloaded_moments_wait_in_the_hosts_memory(tmp_path):
    path = tmp_path / "plan.json"
    assert verb.main([*map(str, GIVEN), "--optimizer.offload", "True", "--json", str(path)]) == 0
    values = json.loads(path.read_text())
    state, moments = values["state"], 2 * values["state"]["params"]
    assert state["optimizer"] < 100
    # Twice the parameters, there and back in each step; small arrays are padded to tiles.
    assert 0.99 * moments <= values["memory"]["host"] < 1.5 * moments
    assert 2 * 0.9 * moments <= values["host_bytes"] < 2 * 1.5 * moments
