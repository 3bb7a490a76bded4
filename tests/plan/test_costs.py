"""Flops, bytes and trips of compiled programs, by closed forms."""

import pytest

from dit_jax.plan.analysis import analyse
from dit_jax.plan.hlo import parse, trip_count


@pytest.fixture
def tally(program, chips):
    return lambda name: analyse(program(name), [], *chips("v5e:2x4"))


def trips(module):
    bodies = module.computations.values()
    loops = [(one, body) for body in bodies for one in body.values() if one.opcode == "while"]
    return {loop.name: trip_count(module, loop, body) for loop, body in loops}


@pytest.mark.parametrize(
    "name, counts",
    [("scanned", [6]), ("nested", [5, 7])],  # fori_loop(0, 5) around fori_loop(3, 10)
)
def test_trips_of_compiled_loops(program, name, counts):
    assert sorted(trips(program(name)).values()) == counts


LOOP = """
%body (s: (s32[], f32[8])) -> (s32[], f32[8]) {{
  %s = (s32[], f32[8]{{0}}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %step = s32[] constant({step})
  %next = s32[] {change}(%i, %step)
  %x = f32[8]{{0}} get-tuple-element(%s), index=1
  ROOT %t = (s32[], f32[8]{{0}}) tuple(%next, %x)
}}

%condition (c: (s32[], f32[8])) -> pred[] {{
  %c = (s32[], f32[8]{{0}}) parameter(0)
  %j = s32[] get-tuple-element(%c), index=0
  %end = s32[] constant({end})
  ROOT %test = pred[] compare({sides}), direction={direction}
}}

ENTRY %main (p: f32[8]) -> f32[8] {{
  %p = f32[8]{{0}} parameter(0)
  %begin = s32[] constant({begin})
  %state = (s32[], f32[8]{{0}}) tuple(%begin, %p)
  %loop = (s32[], f32[8]{{0}}) while(%state), condition=%condition, body=%body
  ROOT %y = f32[8]{{0}} get-tuple-element(%loop), index=1
}}
"""


@pytest.mark.parametrize(
    "begin, end, step, change, sides, direction, count",
    [
        (0, 6, 1, "add", "%j, %end", "LT", 6),
        (2, 7, 2, "add", "%j, %end", "LT", 3),  # 2, 4, 6
        (2, 6, 2, "add", "%j, %end", "LE", 3),  # 2, 4, 6
        (9, 0, 3, "subtract", "%j, %end", "GT", 3),  # 9, 6, 3
        (9, 0, 3, "subtract", "%j, %end", "GE", 4),  # 9, 6, 3, 0
        (0, 6, 1, "add", "%end, %j", "GT", 6),
        (0, 6, 1, "add", "%j, %end", "NE", 6),
        (7, 6, 1, "add", "%j, %end", "LT", 0),
        (0, 6, 2, "multiply", "%j, %end", "LT", None),
    ],
)
def test_trips_of_a_counter(begin, end, step, change, sides, direction, count):
    text = LOOP.format(
        begin=begin, end=end, step=step, change=change, sides=sides, direction=direction
    )
    assert trips(parse(text)) == {"loop": count}


def test_trips_that_cannot_be_counted_are_believed_or_told(chips):
    text = LOOP.format(begin=0, end=6, step=2, change="multiply", sides="%j, %end", direction="LT")
    known = 'body=%body, backend_config={"known_trip_count":{"n":"11"}}'
    assert trips(parse(text.replace("body=%body", known))) == {"loop": 11}
    tally = analyse(parse(text), [], *chips("v5e:2x4"))
    warnings = [key[1] for key in tally if key[0] == "warnings"]
    assert [warning.split()[:3] for warning in warnings] == [["trips", "of", "loop"]]


def test_a_scanned_and_an_unrolled_program_cost_the_same(tally):
    scanned, unrolled = tally("scanned"), tally("unrolled")
    # Six products [512, 512] x [512, 512]: exact.
    assert scanned["flops"] == unrolled["flops"] == 6 * 2 * 512**3
    # The weights are read once; activations stay on the chip but for the first and last.
    weights, activations = 6 * 512 * 512 * 2, 2 * 512 * 512 * 2
    for one in (scanned, unrolled):
        assert weights + activations <= one["hbm_bytes"] < 1.05 * (weights + activations)


@pytest.mark.parametrize(
    "name, flops",
    [
        ("nested", 35 * 2 * 256**3),
        # q k^T of 4 heads: XLA writes a convolution over a dilated dimension of 4, most taps of
        # which meet nothing.
        ("batched", 2 * 4 * 256 * 256 * 72),
    ],
)
def test_products_are_counted_as_they_are(tally, name, flops):
    assert tally(name)["flops"] == flops


def test_a_dot_contracts_its_left_side(chips):
    text = """
ENTRY %main (a: bf16[4,8,16], b: bf16[4,16,32]) -> bf16[4,8,32] {
  %a = bf16[4,8,16]{2,1,0} parameter(0)
  %b = bf16[4,16,32]{2,1,0} parameter(1)
  ROOT %d = bf16[4,8,32]{2,1,0} dot(%a, %b), lhs_batch_dims={0}, rhs_batch_dims={0}, \
lhs_contracting_dims={2}, rhs_contracting_dims={1}
}
"""
    assert analyse(parse(text), [], *chips("v5e:2x4"))["flops"] == 2 * 4 * 8 * 32 * 16


def test_an_update_in_place_moves_the_update_and_reads_run_beside_computation(tally):
    update, whole, part = tally("update"), 8192 * 8192 * 2, 128 * 8192 * 2
    # The copy of an argument that is not donated, the update read ahead and written in place.
    assert update["hbm_bytes"] == 2 * whole + 2 * part
    assert update["op_seconds"] == pytest.approx((2 * whole + part) / 819e9, rel=1e-12)


def test_offloading_is_told_apart_from_hbm(chips):
    text = """
ENTRY %main (p: f32[1024]) -> f32[1024] {
  %p = f32[1024]{0} parameter(0)
  %out = (f32[1024]{0:S(5)}, f32[1024]{0}, u32[]{:S(2)}) copy-start(%p)
  %away = f32[1024]{0:S(5)} copy-done(%out)
  %in = (f32[1024]{0:S(1)}, f32[1024]{0:S(5)}, u32[]{:S(2)}) copy-start(%away)
  ROOT %back = f32[1024]{0:S(1)} copy-done(%in)
}
"""
    tally = analyse(parse(text), [], *chips("v5e:2x4"))
    assert (tally["host_bytes"], tally["hbm_bytes"]) == (2 * 4096, 4096)


def test_the_dearest_branch_is_counted_and_told(chips):
    text = """
%cheap (a: f32[64,64]) -> f32[64,64] {
  ROOT %a = f32[64,64]{1,0} parameter(0)
}

%dear (b: f32[64,64]) -> f32[64,64] {
  %b = f32[64,64]{1,0} parameter(0)
  ROOT %d = f32[64,64]{1,0} dot(%b, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

ENTRY %main (i: s32[], x: f32[64,64]) -> f32[64,64] {
  %i = s32[] parameter(0)
  %x = f32[64,64]{1,0} parameter(1)
  ROOT %c = f32[64,64]{1,0} conditional(%i, %x, %x), branch_computations={%cheap, %dear}
}
"""
    tally = analyse(parse(text), [], *chips("v5e:2x4"))
    assert tally["flops"] == 2 * 64**3
    assert any("2 branches" in key[1] for key in tally if key[0] == "warnings")
