"""The mesh: sizes that fill, and sizes that are refused."""

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from dit_jax.parallel import AXES, MeshConfig, batch_shards, make_mesh


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


@pytest.mark.parametrize("sizes", [(0, 1, 1, 1), (1, -2, 1, 1), (-1, 1, -1, 1)])
def test_impossible_sizes_are_refused(sizes):
    with pytest.raises(ValueError, match=r"mesh \{.*\}: each axis is at least 1, and one of them"):
        MeshConfig(*sizes)


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
