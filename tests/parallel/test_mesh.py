"""The mesh: sizes that fill, sizes that are refused, and what lies next to what on TPU slices."""

import dataclasses
import itertools
import random

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from dit_jax.parallel import AXES, MeshConfig, batch_shards, make_mesh
from dit_jax.parallel.mesh import device_grid


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        (MeshConfig(), (8, 1, 1, 1)),
        (MeshConfig(1, -1, 1, 1), (1, 8, 1, 1)),
        (MeshConfig(2, 1, -1, 2), (2, 1, 2, 2)),
        (MeshConfig(1, 1, 1, -1), (1, 1, 1, 8)),
        (MeshConfig(-1, 2, 2, 2), (1, 2, 2, 2)),
        (MeshConfig(2, 2, 2, 1), (2, 2, 2, 1)),
    ],
)
def test_mesh_uses_every_device_once(config, shape):
    mesh = make_mesh(config)
    assert config.shape(8) == shape == mesh.devices.shape
    assert mesh.axis_names == AXES == ("data", "fsdp", "context", "tensor")
    assert set(mesh.axis_types) == {AxisType.Auto}
    assert sorted(device.id for device in mesh.devices.flat) == list(range(8))
    assert batch_shards(mesh) == shape[0] * shape[1]


def test_chosen_devices():
    devices = jax.devices()[2:6]
    mesh = make_mesh(MeshConfig(tensor=2), devices)
    assert dict(mesh.shape) == {"data": 2, "fsdp": 1, "context": 1, "tensor": 2}
    # Neighbours share the innermost axis, which talks most.
    np.testing.assert_array_equal(mesh.devices.reshape(2, 2), np.array(devices).reshape(2, 2))


@pytest.mark.parametrize(
    "sizes", [(0, 1, 1, 1), (-1, 0, 1, 1), (1, -2, 1, 1), (-2, -4, 1, 1), (-1, 1, -1, 1)]
)
def test_impossible_sizes_are_refused(sizes):
    with pytest.raises(ValueError, match=f"data {sizes[0]} x fsdp {sizes[1]} .*at least 1"):
        MeshConfig(*sizes).shape(8)


@pytest.mark.parametrize("sizes", [(3, 1, 1, 1), (-1, 3, 1, 1), (16, 1, 1, 1), (2, 2, 1, 1)])
def test_sizes_that_do_not_use_the_devices_are_refused(sizes):
    with pytest.raises(ValueError) as error:
        MeshConfig(*sizes).shape(8)
    text = str(error.value)
    assert f"data {sizes[0]} x fsdp {sizes[1]}" in text
    assert "does not divide 8 device(s)" in text and "Change mesh.*" in text


def test_more_fixed_than_there_is_is_refused():
    with pytest.raises(ValueError, match="does not divide 1 device"):
        MeshConfig(-1, 2, 1, 1).shape(1)


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


def crossings(grid):
    """Axes along which the slice changes."""
    index = np.vectorize(lambda chip: chip.slice_index)(grid)
    return {axis for i, axis in enumerate(AXES) if np.diff(index, axis=i).any()}


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        (MeshConfig(2, -1, 2, 4), (2, 8, 2, 4)),
        (MeshConfig(-1, 8, 2, 2), (4, 8, 2, 2)),
        (MeshConfig(2, 64, 1, 1), (2, 64, 1, 1)),
        (MeshConfig(2, 1, 64, 1), (2, 1, 64, 1)),
        # Sizes that are no product of the torus's 4 x 4 x 4: physical axes are split.
        (MeshConfig(2, 2, 2, 16), (2, 2, 2, 16)),
        (MeshConfig(8, 8, 1, 2), (8, 8, 1, 2)),
    ],
)
def test_only_the_replicas_cross_slices(config, shape):
    grid = device_grid(config, slices())
    assert grid.shape == shape
    assert sorted(chip.id for chip in grid.flat) == list(range(128))
    assert crossings(grid) == {"data"}
    # A half of the replicas to each slice: the gradients cross once, and not for every replica.
    assert np.count_nonzero(np.diff([chip.slice_index for chip in grid[:, 0, 0, 0]])) == 1


@pytest.mark.parametrize("count", [2, 4])
def test_fsdp_crosses_slices_where_told(count):
    config = MeshConfig(2, -1, 2, 4, slices_over="fsdp")
    grid = device_grid(config, slices(count=count))
    assert grid.shape == (2, 4 * count, 2, 4)
    assert crossings(grid) == {"fsdp"}


def test_one_slice_is_a_torus():
    """Whole axes go to neighbours: along each, a step is one link (or the wrap of the torus)."""
    grid = device_grid(MeshConfig(1, 4, 4, 4), slices(count=1))
    for axis in (1, 2, 3):
        line = [chip.coords for chip in np.moveaxis(grid, axis, 0)[:, 0, 0, 0]]
        for a, b in zip(line, line[1:] + line[:1], strict=True):
            assert sum(min((x - y) % 4, (y - x) % 4) for x, y in zip(a, b, strict=True)) == 1


def test_physical_axes_are_split():
    """2 x 32 of 4 x 4 x 4, and 16 of 4 x 4: no axis of the mesh is one of the torus."""
    for config, shape, count in [
        (MeshConfig(1, 2, 1, 32), (4, 4, 4), 64),
        (MeshConfig(2, 2, 2, 2), (4, 4, 1), 16),
    ]:
        grid = device_grid(config, slices(shape, 1))
        assert grid.shape == config.shape(count)
        assert len({chip.id for chip in grid.flat}) == count


@pytest.mark.parametrize("over", ["data", "fsdp"])
def test_axis_that_does_not_divide_over_slices_is_refused(over):
    sizes = {"data": 3, "fsdp": 3} | {over: 1}
    config = MeshConfig(**sizes, context=-1, slices_over=over)
    chips = slices((3, 2, 2), 2)
    with pytest.raises(ValueError) as error:
        device_grid(config, chips)
    text = str(error.value)
    assert f"mesh.{over} is 1 over 2 TPU slices" in text
    assert f"make mesh.{over} a multiple of 2, or set mesh.slices_over" in text


def test_unequal_slices_are_refused():
    chips = [chip for chip in slices((2, 2, 1), 2) if chip.id != 7]
    with pytest.raises(ValueError, match=r"2 TPU slices of 3, 4 devices"):
        device_grid(MeshConfig(), chips)


def test_gpus_lie_host_by_host():
    """Whatever order they are found in, inner axes stay within a host of four."""
    gpus = [
        Chip(i, 0, (0, 0, 0), i // 4, platform="gpu", device_kind="NVIDIA H100") for i in range(16)
    ]
    random.Random(0).shuffle(gpus)
    grid = device_grid(MeshConfig(2, 2, 2, 2), gpus)
    hosts = np.vectorize(lambda gpu: gpu.process_index)(grid).reshape(4, 4)
    np.testing.assert_array_equal(hosts, np.arange(4)[:, None].repeat(4, 1))
