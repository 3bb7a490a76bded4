"""Named topologies: shapes, the table of chips, and what is refused."""

import importlib.util

import pytest

from dit_jax.parallel import peak_flops
from dit_jax.plan.topologies import CHIPS, parse_topology, topology_devices

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed (dit-jax[tpu])"
)


def test_a_name_is_a_chip_and_a_shape():
    topology = parse_topology("v5p:4x4x8", slices=2)
    assert topology.chip.name == "v5p" and topology.shape == (4, 4, 8)
    assert topology.num_chips == topology.num_devices == 256 and topology.name == "v5p:4x4x8"
    topology = parse_topology("tpu7x:2x2x1")  # whose chips are two devices
    assert (topology.num_chips, topology.num_devices) == (4, 8)


@pytest.mark.parametrize(
    "name, wrap",
    [
        ("v5p:4x4x4", (True,) * 3),
        ("v5p:2x4x4", (False,) * 3),
        ("v4:4x4x4", (True,) * 3),
        ("v5e:16x16", (True, True)),
        ("v6e:8x16", (False, True)),
        ("v6e:8x8", (False, False)),
    ],
)
def test_which_slices_close_into_rings(name, wrap):
    assert parse_topology(name).wrap == wrap


@pytest.mark.parametrize(
    "name, message",
    [
        ("v9:2x2", "the chip 'v9' is not known. The form is CHIP:SHAPE, such as v4:2x2x1, v5e"),
        ("v5p", "a v5p slice has 3 sizes of at least 1, as in v5p:2x2x2"),
        ("v5p:4x4", "a v5p slice has 3 sizes"),
        ("v5e:2x4x1", "a v5e slice has 2 sizes"),
        ("v5e:0x4", "a v5e slice has 2 sizes"),
        ("v5e:2xa", "a v5e slice has 2 sizes"),
    ],
)
def test_what_is_no_topology_is_refused(name, message):
    with pytest.raises(ValueError, match=message):
        parse_topology(name)


@pytest.mark.parametrize(
    "kind, peak",
    [
        ("TPU v4", 275e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("TPU v5p", 459e12),
        ("TPU v6 lite", 918e12),
        ("TPU7x", 1153.5e12),  # Half a chip.
        ("TPU v3", 61.5e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("cpu", None),
    ],
)
def test_peaks_by_device_kind(kind, peak):
    assert peak_flops(kind) == peak


def test_every_chip_has_an_example():
    for name, chip in CHIPS.items():
        assert parse_topology(chip.example).chip is chip and chip.example.startswith(f"{name}:")


@needs_libtpu
@pytest.mark.parametrize("name", [chip.example for chip in CHIPS.values()])
def test_libtpu_knows_every_chip(name):
    topology = parse_topology(name)
    devices = topology_devices(topology)
    assert len(devices) == topology.num_devices
    assert devices[0].device_kind.startswith(topology.chip.kind)


@needs_libtpu
def test_slices_have_numbers_and_shapes_are_libtpus():
    devices = topology_devices(parse_topology("v5e:2x4", slices=2))
    assert [device.slice_index for device in devices] == [0] * 8 + [1] * 8
    with pytest.raises(ValueError, match="libtpu does not know the topology v5e:3x5"):
        topology_devices(parse_topology("v5e:3x5"))
