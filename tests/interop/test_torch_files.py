"""PyTorch's files: read as PyTorch reads them, and nothing in them runs."""

import argparse
import collections
import os
import pickle
import struct
import tracemalloc
import warnings
import zipfile

import ml_dtypes
import numpy as np
import pytest

from dit_jax.interop import read_torch, read_torch_tree, torch_files, write_torch
from dit_jax.interop.pickles import Record

try:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torch
except ImportError:
    torch = None

needs_torch = pytest.mark.skipif(torch is None, reason="PyTorch is not installed")
STREAM = pytest.param(False, id="stream")
ZIP = pytest.param(True, id="zip")


def as_numpy(tensor):
    """A tensor's elements, bfloat16 too."""
    tensor = tensor.detach().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def same(found, wanted):
    assert found.dtype == wanted.dtype and found.shape == wanted.shape
    assert found.tobytes() == wanted.tobytes()


def tensors():
    torch.manual_seed(0)
    base = torch.randn(6, 5)
    kinds = ["float64", "float32", "float16", "bfloat16", "complex64"]
    whole = ["int64", "int32", "int16", "int8", "uint8", "bool"]
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
@pytest.mark.parametrize("zipped", [STREAM, ZIP])
def test_every_dtype_stride_and_offset_is_read(tmp_path, zipped):
    wanted = tensors()
    path = tmp_path / "a.pt"
    torch.save(wanted, path, _use_new_zipfile_serialization=zipped)
    found = read_torch(path)
    assert list(found) == list(wanted)
    for name, tensor in wanted.items():
        same(found[name], as_numpy(tensor))


@needs_torch
@pytest.mark.parametrize("zipped", [STREAM, ZIP])
def test_a_training_checkpoint_is_flattened_and_its_arguments_are_inert(tmp_path, zipped):
    layer = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    opt = torch.optim.AdamW(layer.parameters(), lr=1e-4)
    layer(torch.randn(5, 3)).sum().backward()
    opt.step()
    saved = {
        "model": layer.state_dict(),
        "ema": collections.OrderedDict(layer.state_dict()),
        "opt": opt.state_dict(),
        "args": argparse.Namespace(model="DiT-XL/2", image_size=256),
        "step": 3,
    }
    path = tmp_path / "0003.pt"
    torch.save(saved, path, _use_new_zipfile_serialization=zipped)
    found = read_torch(path)
    for part in ("model", "ema"):
        for name, tensor in layer.state_dict().items():
            same(found[f"{part}.{name}"], as_numpy(tensor))
    same(found["opt.state.0.exp_avg"], as_numpy(opt.state_dict()["state"][0]["exp_avg"]))
    tree = read_torch_tree(path)
    assert type(tree["args"]).of == "argparse.Namespace" and tree["step"] == 3
    assert tree["args"].state == {"model": "DiT-XL/2", "image_size": 256}


@needs_torch
def test_arrays_are_views_of_the_file(tmp_path):
    torch.save({"a": torch.zeros(1000, 1000)}, tmp_path / "a.pt")
    array = read_torch(tmp_path / "a.pt")["a"]
    assert not array.flags.writeable and not array.flags.owndata
    base = array
    while isinstance(base, np.ndarray):
        owner, base = base, base.base
    assert isinstance(owner, np.memmap) or not isinstance(base, bytes)


@needs_torch
def test_newer_dtypes_are_read(tmp_path):
    wanted = torch.arange(6, dtype=torch.float32).to(torch.float8_e4m3fn)
    torch.save(
        {"a": wanted, "b": torch.tensor([0, 1, 2, 3], dtype=torch.uint16)}, tmp_path / "a.pt"
    )
    found = read_torch(tmp_path / "a.pt")
    assert found["a"].dtype == ml_dtypes.float8_e4m3fn
    np.testing.assert_array_equal(found["a"].astype(np.float32), np.arange(6))
    np.testing.assert_array_equal(found["b"], np.arange(4))


@needs_torch
@pytest.mark.filterwarnings("ignore")
def test_torchscript_gives_its_parameters_by_attribute_path(tmp_path):
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
            self.last = torch.nn.Linear(4, 2)

        def forward(self, x):
            return self.last(self.first(x).mean((2, 3))) + torch.ones(2)

    net = Net().eval()
    traced = torch.jit.trace(net, torch.zeros(1, 3, 8, 8))
    traced.save(str(tmp_path / "net.pt"))
    found = read_torch(tmp_path / "net.pt")
    for name, tensor in net.state_dict().items():
        same(found[name], as_numpy(tensor))


@needs_torch
def test_what_is_written_is_read_by_torch_and_here(tmp_path):
    rng = np.random.default_rng(0)
    wanted = {
        "a.weight": rng.normal(size=(5, 3)).astype(np.float32),
        "turned": rng.normal(size=(5, 3)).T,
        "half": rng.normal(size=7).astype(np.float16),
        "brain": rng.normal(size=(2, 2)).astype(ml_dtypes.bfloat16),
        "count": np.array(12, np.int64),
        "none": np.zeros((0, 3), np.float32),
        "mask": np.array([True, False]),
    }
    path = tmp_path / "a.pt"
    write_torch(path, wanted)
    for mapped in (False, True):
        theirs = torch.load(path, weights_only=True, mmap=mapped)
        assert type(theirs) is collections.OrderedDict and list(theirs) == list(wanted)
        for name, array in wanted.items():
            same(as_numpy(theirs[name]), np.ascontiguousarray(array).reshape(array.shape))
    for name, array in read_torch(path).items():
        np.testing.assert_array_equal(array, wanted[name])
    write_torch(tmp_path / "b.pt", read_torch(path))
    assert (tmp_path / "b.pt").read_bytes() == path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None


def test_a_dtype_that_pt_files_lack_is_refused_before_writing(tmp_path):
    with pytest.raises(ValueError, match="'b' is of uint32"):
        write_torch(tmp_path / "a.pt", {"a": np.zeros(2), "b": np.zeros(2, np.uint32)})
    assert not (tmp_path / "a.pt").exists()


class Hostile:
    """Runs a command where it is unpickled."""

    def __init__(self, function, *arguments):
        self.made = function, arguments

    def __reduce__(self):
        return self.made


def archive(path, data, **entries):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", data)
        for name, content in entries.items():
            file.writestr(f"archive/data/{name}", content)


def stream(path, data):
    head = [pickle.dumps(x, 2) for x in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})]
    path.write_bytes(b"".join(head) + data)


@pytest.mark.parametrize("write", [archive, stream])
@pytest.mark.parametrize(
    "function, said",
    [
        (os.system, "(posix|nt).system"),
        (eval, "__builtin__.eval"),
        (getattr, "__builtin__.getattr"),
    ],
)
def test_a_hostile_pickle_does_not_run(tmp_path, write, function, said):
    path, mark = tmp_path / "a.pt", tmp_path / "ran"
    arguments = {
        os.system: (f"touch {mark}",),
        eval: (f"__import__('os').mkdir({str(mark)!r})",),
        getattr: ("", "join"),
    }
    bad = Hostile(function, *arguments[function])
    write(path, pickle.dumps({"weight": [1], "x": bad}, 2))
    with pytest.raises(ValueError, match=f"names {said}, .*nothing of it was run"):
        read_torch(path)
    assert not mark.exists()
    if function is not getattr:
        pickle.loads(pickle.dumps(bad))  # the pickle does run where pickles are run
        assert mark.exists()


def test_a_hostile_pickle_at_the_head_of_a_stream_does_not_run(tmp_path):
    mark = tmp_path / "ran"
    (tmp_path / "a.pt").write_bytes(pickle.dumps(Hostile(os.system, f"touch {mark}"), 2))
    with pytest.raises(ValueError, match="system, which no file of weights needs"):
        read_torch(tmp_path / "a.pt")
    assert not mark.exists()


@pytest.mark.parametrize(
    "name",
    [
        "torch\nload",
        "torch.hub\nload",
        "torch._utils\n_import_dotted_name",
        "numpy\nload",
        "io\nopen",
    ],
)
def test_functions_of_known_packages_are_refused_too(tmp_path, name):
    archive(tmp_path / "a.pt", b"\x80\x02c" + name.encode() + b"\n(X\x01\x00\x00\x00atR.")
    with pytest.raises(ValueError, match=f"names {name.replace(chr(10), '.')}, "):
        read_torch(tmp_path / "a.pt")


STATE = b"}X\x04\x00\x00\x00callK\x01s"
SLOTS = b"N" + STATE + b"\x86"


@pytest.mark.parametrize("state", [STATE, SLOTS, b"(K\x01K\x02l"], ids=["dict", "slots", "list"])
@pytest.mark.parametrize(
    "made",
    [
        b"ccollections\nOrderedDict\n",
        b"ctorch\nFloatStorage\n",
        b"c__torch__.a\nNet\n",
        b"ctorch._utils\n_rebuild_tensor_v2\n",
    ],
    ids=["class", "storage", "record", "function"],
)
def test_a_pickle_cannot_change_what_it_names(tmp_path, made, state):
    archive(tmp_path / "a.pt", b"\x80\x02" + made + state + b"b.")
    with pytest.raises(ValueError, match="damaged or truncated"):
        read_torch(tmp_path / "a.pt")


def test_a_record_keeps_its_state_as_data(tmp_path):
    data = b"\x80\x02cargparse\nNamespace\n)\x81}X\x01\x00\x00\x00aK\x07sb."
    archive(tmp_path / "a.pt", data)
    record = read_torch_tree(tmp_path / "a.pt")
    assert isinstance(record, Record) and record.state == {"a": 7}


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
        {"shape": (3,)},
        {"strides": (2,)},
        {"offset": 1},
        {"offset": -1},
        {"strides": (-1,)},
        {"shape": (2, 2)},
        {"count": 3},
        {"count": -1},
    ],
    ids=str,
)
def test_a_tensor_beyond_its_storage_is_refused(tmp_path, changed):
    path = tmp_path / "a.pt"
    archive(path, tensor_pickle(), **{"0": np.arange(2, dtype=np.float32).tobytes()})
    np.testing.assert_array_equal(read_torch(path)["a"], [0, 1])
    archive(path, tensor_pickle(**changed), **{"0": np.arange(2, dtype=np.float32).tobytes()})
    with pytest.raises(ValueError, match="damaged or truncated"):
        read_torch(path)


@needs_torch
@pytest.mark.parametrize("zipped", [STREAM, ZIP])
def test_a_truncated_file_is_said_to_be(tmp_path, zipped):
    path = tmp_path / "a.pt"
    torch.save(
        {"a": torch.zeros(100), "b": torch.zeros(100)}, path, _use_new_zipfile_serialization=zipped
    )
    whole = path.read_bytes()
    for part in (0.2, 0.5, 0.99):
        path.write_bytes(whole[: int(part * len(whole))])
        with pytest.raises(ValueError, match="truncated|damaged"):
            read_torch(path)


@needs_torch
@pytest.mark.parametrize("zipped", [STREAM, ZIP])
def test_whatever_is_wrong_is_a_value_error(tmp_path, zipped):
    """Bytes changed at random: what is read is arrays, or the error says that it is damaged."""
    path = tmp_path / "a.pt"
    saved = {"ema": {"a": torch.zeros(4, 3)}, "args": argparse.Namespace(x=1)}
    torch.save(saved, path, _use_new_zipfile_serialization=zipped)
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
    for content in (b"<!DOCTYPE html>", b"", b"\x93NUMPY"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="no file of PyTorch's"):
            read_torch(path)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a.txt", "a")
    with pytest.raises(ValueError, match="has no data.pkl"):
        read_torch(path)
    path.write_bytes(pickle.dumps({"a": 1}, 2))
    with pytest.raises(ValueError, match="a pickle but no file of PyTorch's"):
        read_torch(path)
    with pytest.raises(ValueError, match="No such file"):
        read_torch(tmp_path / "none.pt")
    with pytest.raises(ValueError, match="cannot be read"):
        read_torch(tmp_path)


def test_a_tree_that_holds_itself_is_refused(tmp_path):
    archive(tmp_path / "a.pt", b"\x80\x02}q\x00X\x01\x00\x00\x00ah\x00s.")
    with pytest.raises(ValueError, match="holds itself"):
        read_torch(tmp_path / "a.pt")


def nested(depth, innermost=b"X\x01\x00\x00\x00a"):
    """A pickle of tuples of which each is twice in the next."""
    return b"\x80\x02" + innermost + depth * b"2\x86" + b"."


def test_a_tree_that_repeats_itself_beyond_measure_is_refused(tmp_path):
    archive(tmp_path / "a.pt", nested(60))
    with pytest.raises(ValueError, match="the same containers over and over"):
        read_torch(tmp_path / "a.pt")
    # What is wrong with such a value is said without spelling it out.
    archive(tmp_path / "b.pt", nested(60)[:-1] + b"Q.")
    with pytest.raises(ValueError, match="a persistent id that is no storage"):
        read_torch(tmp_path / "b.pt")


@needs_torch
@pytest.mark.parametrize("zipped", [STREAM, ZIP])
def test_weights_that_stand_in_two_places_are_read_in_both(tmp_path, zipped):
    shared = {"a": torch.arange(3.0)}
    both = {"ema": shared, "model": shared}
    torch.save(both, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    assert list(read_torch(tmp_path / "a.pt")) == ["ema.a", "model.a"]


def packed(path, kind, **members):
    with zipfile.ZipFile(path, "w", kind) as archive:
        for name, data in members.items():
            archive.writestr(f"archive/{name}", data)


def test_an_archive_that_inflates_beyond_its_size_is_refused(tmp_path, monkeypatch):
    array = np.zeros((10, 1000), np.float32)
    write_torch(tmp_path / "a.pt", {"x": array})
    with zipfile.ZipFile(tmp_path / "a.pt") as archive:
        pickled = archive.read("archive/data.pkl")
    members = {"data.pkl": pickled, "data/0": array.tobytes()}
    packed(tmp_path / "small.pt", zipfile.ZIP_DEFLATED, **members)
    same(read_torch(tmp_path / "small.pt")["x"], array)
    monkeypatch.setattr(torch_files, "INFLATED_LIMIT", 20_000)
    with pytest.raises(ValueError, match="has 40000 bytes in 'data/0'"):
        read_torch(tmp_path / "small.pt")
    monkeypatch.setattr(torch_files, "INFLATED_LIMIT", 50_000)
    # The limit is for all of them together.
    write_torch(tmp_path / "b.pt", {"x": array, "y": array})
    with zipfile.ZipFile(tmp_path / "b.pt") as archive:
        both = {"data.pkl": archive.read("archive/data.pkl")}
    packed(
        tmp_path / "b.pt",
        zipfile.ZIP_DEFLATED,
        **both,
        **{f"data/{i}": array.tobytes() for i in "01"},
    )
    with pytest.raises(ValueError, match="has 40000 bytes in 'data/1'"):
        read_torch(tmp_path / "b.pt")


def test_a_pickle_that_inflates_is_refused(tmp_path):
    pickled = b"\x80\x02" + b"N0" * (33 * 2**20) + b"N."
    packed(tmp_path / "a.pt", zipfile.ZIP_DEFLATED, **{"data.pkl": pickled})
    assert (tmp_path / "a.pt").stat().st_size < 200_000
    with pytest.raises(ValueError, match="has 69206020 bytes in 'data.pkl'"):
        read_torch(tmp_path / "a.pt")


def test_a_pickle_that_notes_something_at_a_far_place_takes_no_memory(tmp_path):
    packed(tmp_path / "a.pt", zipfile.ZIP_STORED, **{"data.pkl": b"\x80\x02}r\xff\xff\xff\x01."})
    tracemalloc.start()
    try:
        assert read_torch(tmp_path / "a.pt") == {}
        assert tracemalloc.get_traced_memory()[1] < 2**20  # And not 0.5 GB.
    finally:
        tracemalloc.stop()
