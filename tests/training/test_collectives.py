"""What a compiled train step sends between devices, read from its program (docs/parallel.md)."""

import math
import re
from collections import Counter
from typing import NamedTuple

import jax
import pytest
from flax import linen as nn

from dit_jax.config import DataConfig, VideoRun
from dit_jax.data import PackingConfig, RecordsConfig
from dit_jax.model import ByteEncoderConfig, DiTConfig, ModelConfig, PatchConfig
from dit_jax.parallel import MeshConfig, make_mesh
from dit_jax.plan.abstract import abstract_task
from dit_jax.training import abstract_state, make_optimizer, make_step

ROWS, TOKENS, TEXT, WIDTH, HIDDEN, LETTER, HEADS = 8, 256, 16, 64, 96, 40, 4
HEAD = WIDTH // HEADS
# One layer's kernels: queries, keys and values; out, and of cross-attention queries and out; keys and
# values of the text; the MLP's.
KERNELS = [(WIDTH, 3 * WIDTH), *[(WIDTH, WIDTH)] * 3, (LETTER, 2 * WIDTH)]
KERNELS += [(WIDTH, HIDDEN), (HIDDEN, WIDTH)]
KINDS = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
LINE = re.compile(rf"= (.*?) ({KINDS})(?:-start)?\(.*op_name=\"([^\"]*)\"")


class Sent(NamedTuple):
    kind: str
    shapes: tuple[tuple[int, ...], ...]
    name: str
    in_layer: bool
    forward: bool


def config(mesh):
    # Scanned, as on accelerators. Layers share one modulation, whose float32 kernels would be one more.
    dit = DiTConfig(WIDTH, depth=3, heads=HEADS, mlp_dim=HIDDEN, scan=True, modulation="shared")
    return VideoRun(
        model=ModelConfig(
            dit=dit,
            patch=PatchConfig(t=1, h=2, w=2, channels=3),
            text=ByteEncoderConfig(width=LETTER, depth=1, heads=4, max_bytes=15),
        ),
        data=DataConfig(
            source=RecordsConfig(path="nowhere"),
            packing=PackingConfig(rows=ROWS, row_tokens=TOKENS, row_text=TEXT, row_segments=1),
        ),
        mesh=mesh,
    )


def compiled(sizes):
    """Everything that the step sends on a mesh, and the step as text."""
    given = config(MeshConfig(*sizes))
    mesh = make_mesh(given.mesh)
    task = abstract_task(given, mesh)
    optimizer = make_optimizer(given.optimizer, 10)
    shapes, shardings = abstract_state(task.init, optimizer, mesh)
    state = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
    )
    step = make_step(task.loss, optimizer, given.optimizer, 0, shardings)
    text = step.trace(state, task.batch).lower().compile().as_text()
    found = []
    for shape, kind, name in LINE.findall(text):
        dims = re.findall(r"\[([\d,]*)\]", re.sub(r"\{[^}]*\}", "", shape))
        parts = tuple(tuple(int(n) for n in d.split(",") if n) for d in dims)
        found.append(Sent(kind, parts, name, "/blocks/" in name, "transpose(" not in name))
    return found


@pytest.fixture(
    scope="module",
    params=[
        (1, 2, 2, 2),
        *(
            pytest.param(sizes, marks=pytest.mark.slow)
            for sizes in [(8, 1, 1, 1), (1, 8, 1, 1), (1, 1, 8, 1), (1, 1, 4, 2)]
        ),
    ],
    ids=str,
)
def step(request):
    return request.param, compiled(request.param)


def squeezed(shape):
    return tuple(n for n in shape if n != 1)


def parts_of_kernels(tensor):
    """Shapes that one layer's kernels have on one device of ``tensor`` once gathered."""
    shapes = set(KERNELS)
    for a, b in KERNELS:
        shapes |= {(a // tensor, b), (a, b // tensor)}
    return shapes | {(b, a) for a, b in shapes}


def whole_parameters(tensor):
    """Shapes of all parameters, one layer's of those that are stacked, on one device of ``tensor``."""
    given = config(MeshConfig(-1))
    init = abstract_task(given, make_mesh(given.mesh)).init
    leaves = jax.tree.leaves(nn.unbox(jax.eval_shape(init, jax.random.key(0))))
    whole = {squeezed(shape) for leaf in leaves for shape in (leaf.shape, leaf.shape[1:])}
    parts = {
        (*shape[:i], n // tensor, *shape[i + 1 :]) for shape in whole for i, n in enumerate(shape)
    }
    return whole | parts | {shape[::-1] for shape in whole | parts}


def test_nothing_but_one_layers_kernels_is_gathered(step):
    """No activations, and never the stacked parameters of several layers."""
    sizes, sent = step
    # The row's segment ids, whole on every device that shares the row: a number a token.
    ids = ((ROWS // (sizes[0] * sizes[1]), TOKENS),)
    gathered = [one for one in sent if one.in_layer and one.kind == "all-gather"]
    gathered = [one for one in gathered if one.shapes != ids]
    assert bool(gathered) == (sizes[1] * sizes[2] > 1)
    for one in gathered:
        for shape in one.shapes:
            assert squeezed(shape) in parts_of_kernels(sizes[3]), one
    # Elsewhere: the kernels at the ends of the network and of the text encoder, whole.
    parameters = whole_parameters(sizes[3])
    # Devices that share a row may split the text encoder's products among them, and gather its states.
    rows = ROWS // (sizes[0] * sizes[1])
    states = {(rows, TEXT, LETTER), (rows * TEXT, LETTER)} if sizes[2] > 1 else set()
    for one in sent:
        # Noise levels and modulation are a few vectors a row, not a value a token.
        conditioning = "/time/" in one.name or "modulation/" in one.name
        if one.kind == "all-gather" and not one.in_layer and not conditioning:
            for shape in one.shapes:
                assert squeezed(shape) in parameters | states or (shape,) == ids, one


def test_forward_pass_of_a_layer_is_the_design(step):
    (data, fsdp, context, tensor), sent = step
    forward = [one for one in sent if one.in_layer and one.forward]
    kinds = Counter(one.kind for one in forward)
    if context > 1:
        # Queries, keys and values there and the result back; heads that do not divide over all of
        # the context make a ring of the rest, whose turn sends keys and values.
        assert kinds["all-to-all"] == 4
        ring = context // math.gcd(context, HEADS // tensor)
        assert kinds["collective-permute"] == (2 if ring > 1 else 0)
    else:
        assert kinds["all-to-all"] == kinds["collective-permute"] == 0
    reduced = [one for one in forward if one.kind == "all-reduce"]
    rows, tokens = ROWS // (data * fsdp), TOKENS // context
    of_tokens = [one for one in reduced if one.shapes[0][-2:] == (tokens, WIDTH)]
    flat = [one for one in reduced if squeezed(one.shapes[0]) == (rows * tokens, WIDTH)]
    # Megatron: once after attention, after cross-attention and after the MLP.
    assert len({*of_tokens, *flat}) == (3 if tensor > 1 else 0)
    # What is left is the text's keys and values, where that is less than their kernel.
    for one in reduced:
        if one not in of_tokens and one not in flat:
            assert math.prod(one.shapes[0]) <= rows * TEXT * 2 * WIDTH, one


def test_gradients_are_reduced_once_and_activations_by_tensor_alone(step):
    (data, fsdp, context, tensor), sent = step
    rows, tokens = ROWS // (data * fsdp), TOKENS // context
    largest = max(math.prod(kernel) for kernel in KERNELS)
    of_kernels = Counter()
    for one in sent:
        if not one.in_layer or one.forward or one.kind not in ("all-reduce", "reduce-scatter"):
            continue
        for shape in one.shapes:
            if math.prod(shape) == rows * tokens * WIDTH and tensor > 1:
                continue  # partial sums over heads or the hidden layer
            assert math.prod(shape) <= max(largest, rows * TEXT * 2 * WIDTH), one
            if len(squeezed(shape)) == 2 and squeezed(shape) in parts_of_kernels(tensor):
                of_kernels[tuple(sorted(squeezed(shape)))] += 1
    if tensor == 1 and context == 1:
        assert of_kernels == Counter(tuple(sorted(kernel)) for kernel in KERNELS)


def test_heads_that_tensor_does_not_divide_are_refused():
    given = config(MeshConfig(1, 1, 1, 8))
    with pytest.raises(ValueError, match="mesh.tensor 8 does not divide .* 4 heads"):
        abstract_task(given, make_mesh(given.mesh))
