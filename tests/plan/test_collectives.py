"""Collectives of compiled programs: groups, bytes on the wires, and which network they cross."""

import numpy as np
import pytest

from dit_jax.plan.analysis import SYNC, WAIT, analyse
from dit_jax.plan.costs import coordinates, links, replica_groups
from dit_jax.plan.hlo import parse

LINK, DCN = 50e9, 3.125e9  # Of v5e.


@pytest.mark.parametrize(
    "text, groups",
    [
        ("{{0,1},{2,3}}", [[0, 1], [2, 3]]),
        ("[2,4]<=[8]", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("[4,2]<=[2,4]T(1,0)", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("mesh['a'=2,'b'=4] {'b'}", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("mesh['a'=2,'b'=4] {'a'}", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("mesh['a'=2,'b'=2,'c'=2] {'a','c'}", [[0, 1, 4, 5], [2, 3, 6, 7]]),
        ("mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("{}", None),
        ("{{0,1},{2}}", None),
        ("mesh['a'=2] {'b'}", None),
        ("something new", None),
    ],
)
def test_groups(text, groups):
    found = replica_groups(text)
    assert groups == (None if found is None else found.tolist())


@pytest.mark.parametrize(
    "topology, group, number, longest, ring",
    [
        ("v5e:2x4", range(8), 2, 4, False),  # A mesh of 2 x 4: no ring.
        ("v5e:2x4", [0, 1], 1, 2, False),
        ("v5e:2x4", [0, 2, 4, 6], 1, 4, False),
        ("v5e:16x16", range(16), 2, 16, True),  # A whole row of the pod closes.
        ("v5e:16x16", range(8), 1, 8, False),
        ("v5p:4x4x4", range(64), 6, 4, True),  # A cube is a torus.
        ("v5p:4x4x4", range(4), 2, 4, True),
        ("v5p:2x2x2", range(8), 3, 2, False),
    ],
)
def test_links_of_a_group(chips, topology, group, number, longest, ring):
    devices, topology = chips(topology, slices=2)
    points = coordinates(devices, topology)  # of one slice
    assert points.shape == (len(devices) // 2, len(topology.shape))
    assert links(points[np.array(group)], topology) == (number, longest, ring)


def lines(tally):
    """The tally's collectives: executions, asynchronous ones, logical and wire bytes, seconds."""
    return {key: tuple(sums.values()) for key, sums in tally.lines("collectives").items()}


COLLECTIVE = """
%add (x: f32[], y: f32[]) -> f32[] {{
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %z = f32[] add(%x, %y)
}}

ENTRY %main (p: f32[1024]) -> f32[{out}] {{
  %p = f32[1024]{{0}} parameter(0)
  ROOT %c = f32[{out}]{{0}} {code}(%p), channel_id=1, {attributes}
}}
"""
ALL = "replica_groups=[1,8]<=[8]"
N = 4096  # Bytes of an operand.


@pytest.mark.parametrize(
    "code, out, attributes, expected",
    [
        # (n - 1) / n of the whole array, over the 2 links of a 2 x 4 mesh.
        ("all-gather", 8192, f"{ALL}, dimensions={{0}}", (8 * N, 7 * N, 7 * N / (2 * LINK))),
        ("reduce-scatter", 128, f"{ALL}, to_apply=%add", (N, 7 / 8 * N, 7 / 8 * N / (2 * LINK))),
        ("all-reduce", 1024, f"{ALL}, to_apply=%add", (N, 7 / 4 * N, 7 / 4 * N / (2 * LINK))),
        # Half of everything crosses the middle of the 4 long axis.
        ("all-to-all", 1024, f"{ALL}, dimensions={{0}}", (N, 7 / 8 * N, N * 4 / (4 * LINK))),
        ("all-gather", 2048, "replica_groups=[4,2]<=[8], dimensions={0}", (2 * N, N, N / LINK)),
        ("collective-permute", 1024, "source_target_pairs={{0,1},{1,0}}", (N, N, N / LINK)),
    ],
)
def test_a_collective_by_its_closed_form(chips, code, out, attributes, expected):
    text = COLLECTIVE.format(code=code, out=out, attributes=attributes)
    tally = analyse(parse(text), [], *chips("v5e:2x4"))
    (((kind, network, _), (executions, background, *amounts)),) = lines(tally).items()
    assert (kind, network, executions, background) == (code, "ici", 1, 0)
    assert tuple(amounts) == pytest.approx(expected, rel=1e-12)
    assert tally[SYNC] == amounts[-1] and tally[WAIT] == 0


def test_groups_that_are_not_understood_are_told(chips):
    text = COLLECTIVE.format(
        code="all-reduce", out=1024, attributes="replica_groups=new[3], to_apply=%add"
    )
    tally = analyse(parse(text), [], *chips("v5e:2x4"))
    assert list(lines(tally)) == [("all-reduce", "ici", 8)]
    assert any("new[3]" in key[1] for key in tally if key[0] == "warnings")


def test_a_reduce_scatter_is_known_in_its_disguise(program, chips):
    # The sum of [8, 4096, 1024] over 8 chips: XLA writes an all-reduce and a slice, fused.
    tally = analyse(program("scatter"), [], *chips("v5e:2x4"))
    whole = 4096 * 1024 * 2
    seconds = whole * 7 / 8 / (2 * LINK)
    assert lines(tally) == {("reduce-scatter", "ici", 8): (1, 0, whole, whole * 7 / 8, seconds)}


def test_an_exchange(program, chips):
    # [512, 2048] a chip from rows to columns.
    tally = analyse(program("exchange"), [], *chips("v5e:2x4"))
    whole = 512 * 2048 * 2
    (((*key, _), sums),) = lines(tally).items()
    assert (*key, sums[2:4]) == ("all-to-all", "ici", (whole, whole * 7 / 8))


def test_a_chain_of_fusions_is_one_collective(program, chips):
    tally = analyse(program("chain"), [], *chips("v5e:2x4"))
    part, whole = 32 * 512 * 2, 256 * 512 * 2
    seconds = whole * 7 / 8 / (2 * LINK)
    assert lines(tally) == {("all-gather", "ici", 8): (1, 1, whole, whole * 7 / 8, seconds)}
    # Its arrays move once, and the product beside it reads its own (its result stays on the chip).
    product = (1024 * 1536 + 1536 * 1024) * 2
    assert tally["hbm_bytes"] == part + whole + product
    assert tally["flops"] == 2 * 1024 * 1536 * 1024
    # The product takes longer than the wires: nothing waits.
    assert tally["flops"] / 197e12 > seconds
    assert (tally[SYNC], tally[WAIT]) == (0, 0)


def test_asynchronous_collectives_wait_for_what_nothing_hides(chips):
    text = """
ENTRY %main (p: f32[262144], x: f32[64,64]) -> f32[262144] {
  %p = f32[262144]{0} parameter(0)
  %x = f32[64,64]{1,0:S(1)} parameter(1)
  %s = (f32[262144]{0}, f32[262144]{0}) collective-permute-start(%p), source_target_pairs={{0,1}}
  %d = f32[64,64]{1,0:S(1)} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %r = f32[262144]{0} collective-permute-done(%s)
}
"""
    tally = analyse(parse(text), [], *chips("v5e:2x4"))
    wire, product = 2**20 / LINK, 2 * 64**3 / 197e12
    assert tally[SYNC] == 0
    assert tally[WAIT] == pytest.approx(wire - product, rel=1e-9)
    assert tally.seconds == pytest.approx(wire, rel=1e-9)


def test_what_crosses_slices_is_dcn(program, chips):
    # The gradient of a [2048, 1024] matrix, laid over 8 chips, in two slices: gathered and reduced
    # within a slice, and each chip's eighth reduced across both.
    tally = analyse(program("slices"), [], *chips("v5e:2x4", 2))
    whole = 2048 * 1024 * 2
    within = (1, 0, whole, whole * 7 / 8, pytest.approx(whole * 7 / 8 / (2 * LINK)))
    across = (1, 1, whole / 8, whole / 8, pytest.approx(whole / 8 / DCN))
    assert lines(tally) == {
        ("all-gather", "ici", 8): within,
        ("reduce-scatter", "ici", 8): within,
        ("all-reduce", "dcn", 2): across,
    }
    # Nothing is left to run beside it.
    assert tally[WAIT] == pytest.approx(whole / 8 / DCN)


@pytest.mark.parametrize(
    "kind, slices, logical, wire",
    [
        ("ALL_REDUCE", 4, N, 2 * N * 3 / 4),
        ("ALL_GATHER", 4, N, N * 3 / 4),
        ("REDUCE_SCATTER", 4, 4 * N, 4 * N * 3 / 4),
        ("ALL_TO_ALL", 2, N, N / 2),
        ("ONE_TO_ONE", 2, N, N),
    ],
)
def test_transfers_across_slices(chips, kind, slices, logical, wire):
    text = f"""
ENTRY %main (p: f32[]) -> (f32[1024], token[]) {{
  %p = f32[] parameter(0)
  %a = token[] after-all()
  %r = (f32[1024]{{0}}, u32[], token[]) recv(%a), channel_id=1, is_host_transfer=true, \
frontend_attributes={{_xla_megascale_transfer_type="{kind}"}}
  ROOT %d = (f32[1024]{{0}}, token[]) recv-done(%r), channel_id=1
}}
"""
    tally = analyse(parse(text), [], *chips("v5e:2x4", slices))
    (((_, network, group), sums),) = lines(tally).items()
    assert (network, group, *sums[2:4]) == ("dcn", slices, logical, wire)
