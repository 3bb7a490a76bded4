"""The mesh: its sizes, what lies next to what on TPU slices, and the rules of what lies where."""

import dataclasses
import itertools
import mmap
import os
import random
import subprocess
import sys
import types
from pathlib import Path
from platform import libc_ver

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from dit_jax.parallel import (
    MeshConfig,
    batch_sharding,
    batch_shards,
    make_constrain,
    make_mesh,
    parameter_shardings,
    state_shardings,
)
from dit_jax.parallel.mesh import (
    ACTIVATION_RULES,
    AXES,
    LARGE,
    PARAMETER_RULES,
    ROWS,
    device_grid,
    keep_programs,
)

EMBED = ("fsdp", "context")


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        (MeshConfig(), (8, 1, 1, 1)),
        (MeshConfig(1, -1, 1, 1), (1, 8, 1, 1)),
        (MeshConfig(2, 1, -1, 2), (2, 1, 2, 2)),
    ],
)
def test_mesh_uses_every_device_once(config, shape):
    mesh = make_mesh(config)
    assert config.shape(8) == shape == mesh.devices.shape
    assert mesh.axis_names == AXES == ("data", "fsdp", "context", "tensor")
    assert set(mesh.axis_types) == {AxisType.Auto}
    assert sorted(device.id for device in mesh.devices.flat) == list(range(8))
    assert batch_shards(mesh) == shape[0] * shape[1]
    # Of chosen devices, neighbours share the innermost axis, which talks most.
    devices = jax.devices()[2:6]
    few = make_mesh(MeshConfig(tensor=2), devices)
    np.testing.assert_array_equal(few.devices, np.array(devices).reshape(2, 1, 1, 2))


@pytest.mark.parametrize(
    ("sizes", "devices"),
    [
        *[((0, 1, 1, 1), 8), ((-1, 0, 1, 1), 8), ((-2, -4, 1, 1), 8), ((-1, 1, -1, 1), 8)],
        *[((-1, 3, 1, 1), 8), ((16, 1, 1, 1), 8), ((2, 2, 1, 1), 8), ((-1, 2, 1, 1), 1)],
    ],
)
def test_sizes_that_do_not_use_the_devices_are_refused(sizes, devices):
    message = f"data {sizes[0]} x fsdp {sizes[1]} .* {devices} device"
    with pytest.raises(ValueError, match=message):
        MeshConfig(*sizes).shape(devices)


@dataclasses.dataclass(frozen=True)
class Chip:
    """What JAX tells of a TPU device, and what the layout is made from."""

    id: int
    slice_index: int
    coords: tuple[int, int, int]
    process_index: int
    core_on_chip: int = 0
    platform: str = "tpu"
    device_kind: str = "TPU v5p"


def slices(shape=(4, 4, 4), count=2):
    """Chips of so many slices, four to a host, in no particular order."""
    chips = []
    for index in range(count):
        for coords in itertools.product(*map(range, shape)):
            chips.append(Chip(len(chips), index, coords, len(chips) // 4))
    random.Random(0).shuffle(chips)
    return chips


@pytest.mark.parametrize(
    ("config", "shape", "count"),
    [
        (MeshConfig(2, -1, 2, 4), (2, 8, 2, 4), 2),
        (MeshConfig(-1, 8, 2, 2), (4, 8, 2, 2), 2),
        (MeshConfig(2, 1, 64, 1), (2, 1, 64, 1), 2),
        # Sizes that are no product of the torus's 4 x 4 x 4: physical axes are split.
        (MeshConfig(2, 2, 2, 16), (2, 2, 2, 16), 2),
        (MeshConfig(2, -1, 2, 4, slices_over="fsdp"), (2, 16, 2, 4), 4),
    ],
)
def test_only_one_axis_crosses_slices(config, shape, count):
    grid = device_grid(config, slices(count=count))
    assert grid.shape == shape
    assert sorted(chip.id for chip in grid.flat) == list(range(64 * count))
    of_slice = np.vectorize(lambda chip: chip.slice_index)(grid)
    crossed = [axis for i, axis in enumerate(AXES) if np.diff(of_slice, axis=i).any()]
    assert crossed == [config.slices_over]
    # Each slice has a run of the axis: the gradients cross once, and not for every replica.
    line = np.moveaxis(of_slice, AXES.index(crossed[0]), 0)[:, 0, 0, 0]
    assert np.count_nonzero(np.diff(line)) == count - 1


def test_one_slice_is_a_torus():
    """Whole axes go to neighbours: along each, a step is one link (or the wrap of the torus)."""
    grid = device_grid(MeshConfig(1, 4, 4, 4), slices(count=1))
    for axis in (1, 2, 3):
        line = [chip.coords for chip in np.moveaxis(grid, axis, 0)[:, 0, 0, 0]]
        for a, b in zip(line, line[1:] + line[:1], strict=True):
            assert sum(min((x - y) % 4, (y - x) % 4) for x, y in zip(a, b, strict=True)) == 1


def test_slices_that_do_not_divide_or_differ_are_refused():
    for over in ("data", "fsdp"):
        sizes = {"data": 3, "fsdp": 3} | {over: 1}
        config = MeshConfig(**sizes, context=-1, slices_over=over)
        with pytest.raises(ValueError, match=f"mesh.{over} is 1 .* multiple of 2"):
            device_grid(config, slices((3, 2, 2), 2))
    chips = [chip for chip in slices((2, 2, 1), 2) if chip.id != 7]
    with pytest.raises(ValueError, match=r"TPU slices of \[3, 4\] devices"):
        device_grid(MeshConfig(), chips)


def test_gpus_lie_host_by_host():
    """Whatever order they are found in, inner axes stay within a host of four."""
    gpus = [Chip(i, 0, (0, 0, 0), i // 4, platform="gpu", device_kind="H100") for i in range(16)]
    random.Random(0).shuffle(gpus)
    grid = device_grid(MeshConfig(2, 2, 2, 2), gpus)
    hosts = np.vectorize(lambda gpu: gpu.process_index)(grid).reshape(4, 4)
    np.testing.assert_array_equal(hosts, np.arange(4)[:, None].repeat(4, 1))


# --- Rules ---


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig(1, 2, 2, 2))


def boxed(shape, *names):
    return nn.LogicallyPartitioned(jax.ShapeDtypeStruct(shape, jnp.float32), names)


def spec(mesh, shape, *names):
    return parameter_shardings(mesh, {"w": boxed(shape, *names)})["w"].spec


@pytest.mark.parametrize(
    ("shape", "names", "expected"),
    [
        ((8, 16), ("embed", "mlp"), P(EMBED, "tensor")),
        ((4, 8, 24), ("layers", "embed", "heads"), P(None, EMBED, "tensor")),
        ((258, 8), ("vocab", "embed"), P(None, EMBED)),
        ((8, 6), ("embed", "patch"), P(EMBED, None)),
        ((6,), (None,), P(None)),
        # What an axis does not divide stays whole, dimension by dimension.
        ((7, 16), ("embed", "mlp"), P(None, "tensor")),
        ((8, 15), ("embed", "mlp"), P(EMBED, None)),
        ((6, 16), ("embed", "mlp"), P("fsdp", "tensor")),
    ],
)
def test_parameters_lie_by_their_logical_axes(mesh, shape, names, expected):
    assert spec(mesh, shape, *names) == expected
    # Those of sampling are whole along context.
    found = parameter_shardings(mesh, boxed(shape, *names), over_context=False).spec
    assert found == P(*("fsdp" if one == EMBED else one for one in expected))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("heads", "mlp"), "use a mesh axis of .*tensor.* twice"),
        (("embed", "embed"), "use a mesh axis of .*fsdp.* twice"),
        (("embedd", "mlp"), "'embedd' is in no rule"),
        (("embed",), r"'embed',\) do not name the dimensions of \(8, 8\)"),
    ],
)
def test_axes_that_lay_nothing_out_are_refused(mesh, names, message):
    with pytest.raises(AssertionError, match=message):
        spec(mesh, (8, 8), *names)


def test_activations_axes_are_checked_and_rules_name_axes_of_the_mesh_only(mesh):
    constrain = make_constrain(mesh)
    with pytest.raises(AssertionError, match="'token' is in no rule"):
        constrain(jnp.ones((2, 2)), "batch", "token")
    with pytest.raises(AssertionError, match="do not name the dimensions"):
        constrain(jnp.ones((2, 2)), "batch")
    for names in (*PARAMETER_RULES.values(), *ACTIVATION_RULES.values()):
        assert set(names) <= set(mesh.axis_names)


@pytest.mark.parametrize(
    ("sizes", "shape", "names", "parts"),
    [
        # 30 layers of 4096 x 1536.
        ((1, 7, 1, 1), (30, 4096, 1536), ("layers", "embed", "embed_out"), "embed fsdp 7"),
        # Split over fsdp, and what is left is large still.
        ((1, 2, 1, 3), (2**13, 2**10), ("embed", "mlp"), "mlp tensor 3 4,194,304"),
        # Over fsdp it would divide, and over both it does not.
        ((1, 2, 4, 1), (1022, 2**13), ("embed", "mlp"), "embed fsdp context 8 4,186,112"),
        # Small once another axis has split it.
        ((1, 2, 1, 3), (2**11, 2**10), ("embed", "mlp"), P(EMBED, None)),
        # Whole by its rule, and not for a size: the table means it so.
        ((1, 2, 1, 3), (2**12, 2**10), ("vocab", "patch"), P(None, None)),
        # An axis of one device divides everything.
        ((7, 1, 1, 1), (30, 4096, 1536), ("layers", "embed", "mlp"), P(None, EMBED, "tensor")),
    ],
)
def test_large_parameter_that_stays_whole_is_refused(sizes, shape, names, parts):
    few = make_mesh(MeshConfig(*sizes), jax.devices()[: np.prod(sizes)])
    if isinstance(parts, P):  # It is not.
        assert spec(few, shape, *names) == parts
        return
    with pytest.raises(ValueError) as error:
        parameter_shardings(few, {"mlp": {"kernel": boxed(shape, *names)}})
    text = str(error.value)
    assert text.startswith(f"parameter ['mlp']['kernel'] {list(shape)}")
    assert all(part in text for part in parts.split())


def test_parameters_without_axes_are_whole_and_small(mesh):
    small, large = (jax.ShapeDtypeStruct((size,), jnp.float32) for size in (64, LARGE + 1))
    assert parameter_shardings(mesh, {"w": small})["w"] == NamedSharding(mesh, P())
    with pytest.raises(AssertionError, match=r"\['w'\] carries no logical axes"):
        parameter_shardings(mesh, {"w": large})
    # Nothing would be split anyway.
    assert parameter_shardings(make_mesh(MeshConfig()), {"w": large})["w"].is_fully_replicated


def test_constrain_lays_activations_out(mesh):
    constrain = make_constrain(mesh)
    x = np.arange(4 * 6 * 4 * 3, dtype=np.float32).reshape(4, 6, 4, 3)
    y = jax.jit(lambda x: constrain(x, "batch", "tokens", "heads", None))(x)
    assert y.sharding.is_equivalent_to(NamedSharding(mesh, P(ROWS, "context", "tensor")), 4)
    np.testing.assert_array_equal(y, x)
    # Five tokens do not divide over two devices: they stay whole, the rest is laid out.
    z = jax.jit(lambda x: constrain(x, "batch", "tokens", "width"))(x[:, :5, 0])
    assert z.sharding.shard_shape(z.shape) == (2, 5, 3)


def test_what_is_smaller_than_its_parameter_is_whole(mesh):
    """Factored moments (as Adafactor's) have the path of a parameter, and not its dimensions."""
    shardings = {"kernel": NamedSharding(mesh, P(EMBED, "tensor"))}
    vector = jax.ShapeDtypeStruct((16,), jnp.float32)
    found = state_shardings(mesh, {"v_row": {"kernel": vector}}, shardings)
    assert found["v_row"]["kernel"] == NamedSharding(mesh, P())


@pytest.mark.parametrize(
    ("ndim", "tokens", "axes"),
    [(1, True, ()), (2, True, ("context",)), (3, True, ("context",)), (3, False, ())],
)
def test_batches_lie_over_rows_and_tokens(mesh, ndim, tokens, axes):
    assert batch_sharding(mesh, ndim, tokens) == NamedSharding(mesh, P(ROWS, *axes))


STEPS = """
import dataclasses, resource, sys
import jax, numpy as np
from dit_jax.parallel import MeshConfig, global_batch, make_mesh, tune_cpu

@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Field:
    values: np.ndarray

if sys.argv[1] == "tuned":
    tune_cpu()
mesh, rows = make_mesh(MeshConfig()), 4096
# The product in between is 64 MiB of temporary memory.
step = jax.jit(lambda x, y: (x @ y.T) @ x)
x = jax.block_until_ready(jax.numpy.ones((rows, 32)))
# What is not aligned is copied by another thread.
field = Field(np.ones(rows * 32 + 1, np.float32)[1:].reshape(rows, 32))
faults = []
for _ in range(16):
    # As in training, nothing waits for a step but the next one.
    x = step(x, global_batch(mesh, field, tuple(range(rows)), rows).values)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
x.block_until_ready()
# The heap may grow in the first steps, whose blocks lie as they come.
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults[7]) // 8)
"""


@pytest.mark.skipif(libc_ver()[0] != "glibc", reason="glibc keeps what is freed")
def test_a_tuned_step_on_a_cpu_takes_no_new_memory():
    faults = {}
    for name in ("tuned", "plain"):
        command = [sys.executable, "-c", STEPS, name]
        out = subprocess.run(command, capture_output=True, text=True, check=True)
        faults[name] = int(out.stdout)
    pages = 64 * 2**20 // mmap.PAGESIZE
    assert faults["tuned"] < 0.25 * pages and faults["plain"] > 0.5 * pages


def test_programs_are_kept_by_kind_of_machine(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def kept(flags, cores=2, **settings):
        names = ("jax_compilation_cache_dir", "jax_enable_compilation_cache", "jax_logging_level")
        values = dict(zip(names, (None, True, "NOTSET"), strict=True)) | settings
        config = types.SimpleNamespace(**values)
        config.update = lambda name, value: setattr(config, name, value)
        with monkeypatch.context() as patch:
            patch.setattr(jax, "config", config)
            patch.setattr(os, "cpu_count", lambda: cores)
            patch.setattr(Path, "read_text", lambda _: f"processor: 0\nflags\t: {flags}\n")
            keep_programs()
        return config.jax_compilation_cache_dir

    place = Path(kept("avx avx2"))
    assert place.is_relative_to(tmp_path) and place.stat().st_mode & 0o777 == 0o700
    assert len({str(place), kept("avx avx2"), kept("avx"), kept("avx avx2", cores=4)}) == 3
    assert kept("avx", jax_compilation_cache_dir="gs://bucket/programs") == "gs://bucket/programs"
    assert kept("avx", jax_enable_compilation_cache=False) is None
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert kept("avx") is None
