"""Reading HLO text."""

from dit_jax.plan.hlo import HBM, HOST, VMEM, Array, arrays, parameters, parse, root, split


def test_arrays_of_a_shape():
    text = "(bf16[2,3]{1,0:T(8,128)(2,1)S(1)}, (f32[4]{0:S(5)}), u32[]{:S(2)}, s4[8], pred[])"
    found = arrays(text)
    assert [a.dtype for a in found] == ["bf16", "f32", "u32", "s4", "pred"]
    assert [a.space for a in found] == [VMEM, HOST, 2, HBM, HBM]
    # Elements times bytes: 6 x 2, 4 x 4, 1 x 4, 8 x 1/2, 1 x 1.
    assert [a.bytes for a in found] == [12, 16, 4, 4, 1]
    assert Array("f8e4m3fn", (10,), HBM).bytes == 10


def test_parts_keep_brackets_and_quotes_together():
    parts = ["a={1,2}", 'b="x, \\"y\\" {"', "c=mesh['p'=2,'q'=4] {'p'}", "d"]
    assert list(split(", ".join(parts))) == parts


def test_a_program(program):
    module = program("scanned")
    entry = module.computations[module.entry]
    assert root(entry).opcode == "copy-done"
    (loop,) = [i for i in entry.values() if i.opcode == "while"]
    body = module.computations[loop.called("body")]
    assert list(parameters(body)) == [0] and len(parameters(body)[0].results) == 4
    (fusion,) = [i for i in body.values() if i.opcode == "fusion"]
    assert fusion.operands[1] == "get-tuple-element.53"
    assert fusion.results == (Array("bf16", (512, 512), VMEM),)
    assert fusion.attributes["kind"] == "kOutput"


def test_an_instruction_over_several_lines():
    text = (
        "ENTRY %main (p: f32[2]) -> f32[2] {\n"
        "  %p = f32[2]{0} parameter(0)\n"
        '  ROOT %k = f32[2]{0} custom-call(%p), custom_call_target="t", frontend_attributes={m={\n'
        '"note":"a } b"\n'
        '}}, backend_config="{\\"x\\": 1}"\n'
        "}\n"
    )
    module = parse(text)
    kernel = root(module.computations["main"])
    assert kernel.operands == ("p",) and kernel.attributes["custom_call_target"] == '"t"'
    assert "note" in kernel.attributes["frontend_attributes"]
