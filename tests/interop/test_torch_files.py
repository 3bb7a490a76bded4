"""PyTorch's files: read as PyTorch reads them, and nothing in them runs."""

import argparse
import collections
import os
import pickle
import struct
import tracemalloc
import zipfile

import numpy as np
import pytest

from dit_jax.interop import read_safetensors, read_torch
from tests.interop.published import needs, torch
from tests.scripts import load_script

needs_torch = needs("torch")


def as_numpy(tensor):
    """A tensor's elements, also of dtypes that NumPy lacks."""
    tensor = tensor.detach().contiguous()
    for name, bits in (("bfloat16", torch.int16), ("float8_e4m3fn", torch.uint8)):
        if tensor.dtype == getattr(torch, name):
            return tensor.view(bits).numpy().view(name)
    return tensor.numpy()


def same(found, wanted):
    assert found.dtype == wanted.dtype and found.shape == wanted.shape
    assert found.tobytes() == wanted.tobytes()


def tensors():
    torch.manual_seed(0)
    base = torch.randn(6, 5)
    kinds = ["float64", "float32", "float16", "bfloat16", "complex64", "float8_e4m3fn"]
    whole = ["int64", "int32", "int16", "int8", "uint8", "uint16", "bool"]
    made = {kind: torch.randn(3, 4).to(getattr(torch, kind)) for kind in kinds}
    made |= {kind: torch.randint(0, 9, (7,)).to(getattr(torch, kind)) for kind in whole}
    return made | {
        "base": base,
        "transposed": base.T,
        "part": base[2:5, 1:4],
        "every.other": base[::2],
        "repeated": base[:1].expand(4, 5),
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 4),
        "parameter": torch.nn.Parameter(torch.ones(2, 3)),
    }


@needs_torch
def test_every_dtype_stride_and_offset_is_read(tmp_path):
    wanted = tensors()
    torch.save(wanted, tmp_path / "a.pt")
    found = read_torch(tmp_path / "a.pt")
    assert list(found) == list(wanted)
    for name, tensor in wanted.items():
        same(found[name], as_numpy(tensor))


@needs_torch
def test_a_training_checkpoint_is_flattened_and_its_arguments_are_inert(tmp_path):
    layer = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    opt = torch.optim.AdamW(layer.parameters(), lr=1e-4)
    layer(torch.randn(5, 3)).sum().backward()
    opt.step()
    state = layer.state_dict()  # stands in two places
    saved = {
        "model": state,
        "ema": collections.OrderedDict(a=state),
        "opt": opt.state_dict(),
        "args": argparse.Namespace(model="DiT-XL/2", image_size=256),
        "step": 3,
    }
    path = tmp_path / "0003.pt"
    torch.save(saved, path)
    found = read_torch(path)
    for part in ("model", "ema.a"):
        for name, tensor in layer.state_dict().items():
            same(found[f"{part}.{name}"], as_numpy(tensor))
    same(found["opt.state.0.exp_avg"], as_numpy(opt.state_dict()["state"][0]["exp_avg"]))
    assert not any(name.startswith(("args", "step")) for name in found)


@needs_torch
def test_arrays_are_views_of_the_file(tmp_path):
    torch.save({"a": torch.zeros(1000, 1000)}, tmp_path / "a.pt")
    array = read_torch(tmp_path / "a.pt")["a"]
    assert not array.flags.writeable and not array.flags.owndata
    base = array
    while isinstance(base, np.ndarray):
        owner, base = base, base.base
    assert isinstance(owner, np.memmap) or not isinstance(base, bytes)


class Hostile:
    """Runs a command where it is unpickled."""

    def __init__(self, function, *arguments):
        self.made = function, arguments

    def __reduce__(self):
        return self.made


def archive(path, data, kind=zipfile.ZIP_STORED, **entries):
    with zipfile.ZipFile(path, "w", kind) as file:
        file.writestr("archive/data.pkl", data)
        for name, content in entries.items():
            file.writestr(f"archive/data/{name}", content)


@pytest.mark.parametrize("function", [os.system, eval, getattr])
def test_a_hostile_pickle_does_not_run(tmp_path, function):
    path, mark = tmp_path / "a.pt", tmp_path / "ran"
    said, *arguments = {
        os.system: ("(posix|nt).system", f"touch {mark}"),
        eval: ("__builtin__.eval", f"__import__('os').mkdir({str(mark)!r})"),
        getattr: ("__builtin__.getattr", "", "join"),
    }[function]
    bad = Hostile(function, *arguments)
    archive(path, pickle.dumps({"weight": [1], "x": bad}, 2))
    with pytest.raises(ValueError, match=f"names {said}, .*nothing of it was run"):
        read_torch(path)
    assert not mark.exists()
    if function is not getattr:
        pickle.loads(pickle.dumps(bad))  # the pickle does run where pickles are run
        assert mark.exists()


@pytest.mark.parametrize(
    "name",
    ["torch.load", "torch.hub.load", "torch._utils._import_dotted_name", "numpy.load", "io.open"],
)
def test_functions_of_known_packages_are_refused_too(tmp_path, name):
    named = "\n".join(name.rsplit(".", 1)).encode()
    archive(tmp_path / "a.pt", b"\x80\x02c" + named + b"\n(X\x01\x00\x00\x00atR.")
    with pytest.raises(ValueError, match=f"names {name}, "):
        read_torch(tmp_path / "a.pt")


STATE = b"}X\x04\x00\x00\x00callK\x01s"
SLOTS = b"N" + STATE + b"\x86"


@pytest.mark.parametrize("state", [STATE, SLOTS, b"(K\x01K\x02l"], ids=["dict", "slots", "list"])
@pytest.mark.parametrize(
    "made",
    [
        b"ccollections\nOrderedDict\n",
        b"ctorch\nFloatStorage\n",
        b"cargparse\nNamespace\n",
        b"ctorch._utils\n_rebuild_tensor_v2\n",
    ],
    ids=["class", "storage", "record", "function"],
)
def test_a_pickle_cannot_change_what_it_names(tmp_path, made, state):
    archive(tmp_path / "a.pt", b"\x80\x02" + made + state + b"b.")
    with pytest.raises(ValueError, match="damaged or truncated"):
        read_torch(tmp_path / "a.pt")


def tensor_pickle(shape=(2,), strides=(1,), offset=0, count=2):
    def ints(values):
        return b"(" + b"".join(b"J" + struct.pack("<i", v) for v in values) + b"t"

    return (
        b"\x80\x02}X\x01\x00\x00\x00actorch._utils\n_rebuild_tensor_v2\n("
        b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu"
        + (b"J" + struct.pack("<i", count) + b"tQ")
        + (b"J" + struct.pack("<i", offset) + ints(shape) + ints(strides))
        + b"\x89NtRs."
    )


@pytest.mark.parametrize(
    "changed",
    [
        *({"shape": (3,)}, {"shape": (2, 2)}, {"strides": (2,)}, {"strides": (-1,)}),
        *({"offset": 1}, {"offset": -1}, {"count": 3}, {"count": -1}),
    ],
    ids=str,
)
def test_a_tensor_beyond_its_storage_is_refused(tmp_path, changed):
    path, weights = tmp_path / "a.pt", {"0": np.arange(2, dtype=np.float32).tobytes()}
    archive(path, tensor_pickle(), **weights)
    np.testing.assert_array_equal(read_torch(path)["a"], [0, 1])
    archive(path, tensor_pickle(**changed), **weights)
    with pytest.raises(ValueError, match="damaged or truncated"):
        read_torch(path)


@needs_torch
def test_a_truncated_file_is_said_to_be(tmp_path):
    path = tmp_path / "a.pt"
    torch.save({"a": torch.zeros(100), "b": torch.zeros(100)}, path)
    whole = path.read_bytes()
    for part in (0.2, 0.5, 0.99):
        path.write_bytes(whole[: int(part * len(whole))])
        with pytest.raises(ValueError, match="truncated|damaged"):
            read_torch(path)


@needs_torch
def test_whatever_is_wrong_is_a_value_error(tmp_path):
    """Bytes changed at random: what is read is arrays, or the error says that it is damaged."""
    path = tmp_path / "a.pt"
    saved = {"ema": {"a": torch.zeros(4, 3)}, "args": argparse.Namespace(x=1)}
    torch.save(saved, path)
    whole, rng = np.frombuffer(path.read_bytes(), np.uint8), np.random.default_rng(0)
    refused = 0
    for _ in range(300):
        changed = whole.copy()
        changed[rng.integers(0, len(whole), 2)] = rng.integers(0, 256, 2)
        path.write_bytes(changed.tobytes())
        try:
            assert all(type(array) is np.ndarray for array in read_torch(path).values())
        except ValueError:
            refused += 1
    assert refused > 50


def test_what_is_no_file_of_pytorchs_is_said_to_be_none(tmp_path):
    path = tmp_path / "a.pt"
    not_one = "no zip archive of PyTorch"
    for content, said in (
        (b"<!DOCTYPE html>", not_one),
        (b"", not_one),
        (b"\x93NUMPY", not_one),
        (pickle.dumps({"a": 1}, 2), "pt_to_safetensors"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=said):
            read_torch(path)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a.txt", "a")
    for where, said in (
        (path, "has no data.pkl"),
        (tmp_path / "none.pt", "No such file"),
        (tmp_path, "cannot be read"),
    ):
        with pytest.raises(ValueError, match=said):
            read_torch(where)


def test_a_tree_that_holds_itself_is_refused(tmp_path):
    archive(tmp_path / "a.pt", b"\x80\x02}q\x00X\x01\x00\x00\x00ah\x00s.")
    with pytest.raises(ValueError, match="nests more than 100 deep"):
        read_torch(tmp_path / "a.pt")


@needs_torch
@pytest.mark.filterwarnings("ignore")
def test_other_containers_are_refused_and_converted_by_the_script(tmp_path, monkeypatch):
    net = torch.nn.Linear(4, 2)
    torch.jit.trace(net, torch.zeros(1, 4)).save(str(tmp_path / "net.pt"))
    torch.save(net.state_dict(), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    script = load_script("scripts", "pt_to_safetensors")
    for name in ("net", "old"):
        with pytest.raises(ValueError, match="pt_to_safetensors"):
            read_torch(tmp_path / f"{name}.pt")
        target = tmp_path / f"{name}.safetensors"
        monkeypatch.setattr("sys.argv", ["script", str(tmp_path / f"{name}.pt"), str(target)])
        script.main()
        found = read_safetensors(target)
        assert found.keys() == net.state_dict().keys()
        for key, tensor in net.state_dict().items():
            same(found[key], as_numpy(tensor))


def test_compressed_weights_are_refused(tmp_path):
    weights = {"0": np.zeros(2, np.float32).tobytes()}
    archive(tmp_path / "a.pt", tensor_pickle(), zipfile.ZIP_DEFLATED, **weights)
    with pytest.raises(ValueError, match="storage 0 is compressed"):
        read_torch(tmp_path / "a.pt")


def test_a_pickle_that_inflates_is_refused(tmp_path):
    pickled = b"\x80\x02" + b"N0" * (33 * 2**20) + b"N."
    archive(tmp_path / "a.pt", pickled, zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match="has 69206020 bytes in 'data.pkl'"):
        read_torch(tmp_path / "a.pt")


def test_a_pickle_that_notes_something_at_a_far_place_takes_no_memory(tmp_path):
    archive(tmp_path / "a.pt", b"\x80\x02}r\xff\xff\xff\x01.")
    tracemalloc.start()
    try:
        assert read_torch(tmp_path / "a.pt") == {}
        assert tracemalloc.get_traced_memory()[1] < 2**20  # And not 0.5 GB.
    finally:
        tracemalloc.stop()
