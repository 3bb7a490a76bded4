"""The feature networks beside their PyTorch counterparts, random weights carried over in files.

Inception-v3 is compared with torch-fidelity's; I3D with a statement of its own in PyTorch below. Both
are skipped where PyTorch is not installed.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax.evaluate import INCEPTION, VIDEO, NetworkFeatures, feature_statistics, frechet_distance
from dit_jax.evaluate.networks import Network, resize_bilinear

FEATURES = 1e-4
"""Relative to the largest: float32 sums in another order, through some fifty layers."""
DISTANCE = 1e-3
COUNT = 5


@pytest.fixture(scope="module")
def torch() -> Any:
    return pytest.importorskip("torch", reason="PyTorch, the other side, is not installed")


@pytest.fixture(scope="module")
def fidelity(torch: Any) -> Iterator[Any]:
    """torch-fidelity's Inception module, without its package, which imports torchvision."""
    spec = importlib.util.find_spec("torch_fidelity")
    if spec is None or spec.submodule_search_locations is None:
        pytest.skip("torch-fidelity, the other side, is not installed")
    name = "torch_fidelity"
    before = {key: sys.modules.pop(key) for key in list(sys.modules) if key.startswith(name)}
    package = types.ModuleType(name)
    package.__path__ = list(spec.submodule_search_locations)
    sys.modules[name] = package
    yield importlib.import_module(f"{name}.feature_extractor_inceptionv3")
    for key in list(sys.modules):
        if key.startswith(name):
            del sys.modules[key]
    sys.modules.update(before)


def pictures(seed: int, count: int, size: int = 32) -> np.ndarray:
    """Coarse coloured noise uint8 [n, size, size, 3], which networks tell apart better than fine."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (count, 8, 8, 3)).astype(np.uint8)
    return coarse.repeat(size // 8, 1).repeat(size // 8, 2)


def awaken(torch: Any, network: Any, *inputs: Any) -> None:
    """Random norms, and moments taken from data: else activations die out on the way."""
    torch.manual_seed(0)
    norms = (torch.nn.BatchNorm2d, torch.nn.BatchNorm3d)
    for module in network.modules():
        if isinstance(module, norms):
            torch.nn.init.normal_(module.weight, 1, 0.1)
            torch.nn.init.normal_(module.bias, 0, 0.2)
            module.momentum = None
    network.train()
    with torch.no_grad():
        network(*inputs)
    network.eval()


def assert_close(found: np.ndarray, expected: np.ndarray) -> None:
    assert found.shape == expected.shape
    assert expected.std(0).mean() > 1e-3  # the samples differ at all
    assert np.abs(found - expected).max() <= FEATURES * np.abs(expected).max()


@pytest.fixture(scope="module")
def inception(torch: Any, fidelity: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """torch-fidelity's network with random weights, and a file of them."""
    patch = pytest.MonkeyPatch()
    # Its constructor fetches the published weights; these tests are not about those.
    patch.setattr(fidelity, "load_state_dict_from_url", lambda *_, **__: {})
    patch.setattr(torch.nn.Module, "load_state_dict", lambda *_, **__: None)
    torch.manual_seed(0)
    network = fidelity.FeatureExtractorInceptionV3("x", ["2048", "logits_unbiased"])
    patch.undo()
    awaken(torch, network, torch.from_numpy(pictures(0, 4).transpose(0, 3, 1, 2)))
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(network.state_dict(), path)
    return network, path


@pytest.fixture(scope="module")
def both_features(torch: Any, inception: Any) -> tuple[dict[str, np.ndarray], ...]:
    """Features of two sets of images by this network and by the other."""
    network, path = inception
    images = np.concatenate([pictures(1, COUNT), pictures(2, COUNT) // 2 + 40])
    spatial = []
    hook = network.Mixed_6d.branch1x1.register_forward_hook(
        lambda _, __, out: spatial.append(out[:, :7].permute(0, 2, 3, 1).flatten(1))
    )
    with torch.no_grad():
        pool, logits = network(torch.from_numpy(images.transpose(0, 3, 1, 2)))
    hook.remove()
    other = {"pool": pool.numpy(), "spatial": spatial[0].numpy(), "logits": logits.numpy()}
    params = INCEPTION.read(path)
    function = NetworkFeatures(INCEPTION.model.apply, params, 2 * COUNT, jax.local_devices()[:1])
    return function(images), other


def test_inception_features_are_those_of_torch_fidelity(both_features: Any):
    found, other = both_features
    assert found["pool"].shape == (2 * COUNT, 2048)
    assert found["spatial"].shape == (2 * COUNT, 2023)
    for name, expected in other.items():
        assert_close(found[name], expected)


def test_fid_is_that_of_the_other_network(both_features: Any):
    found, other = both_features

    def distance(features: np.ndarray) -> float:
        parts = np.split(features, 2)
        return frechet_distance(*map(feature_statistics, parts))

    for kind in ("pool", "spatial"):
        expected = distance(other[kind])
        assert expected > 0
        np.testing.assert_allclose(distance(found[kind]), expected, rtol=DISTANCE)
    # And by torch-fidelity's own formula, which needs more samples than features.
    made, true = np.split(other["pool"][:, :3].astype(np.float64), 2)
    one, two = (np.cov(x, rowvar=False) for x in (made, true))
    root = np.sqrt(np.linalg.eigvals(one @ two).astype(complex)).real.sum()
    shift = np.square(made.mean(0) - true.mean(0)).sum()
    expected = shift + np.trace(one) + np.trace(two) - 2 * root
    np.testing.assert_allclose(distance(found["pool"][:, :3]), expected, rtol=DISTANCE)


@pytest.mark.parametrize("size", [(32, 48), (299, 299), (513, 301)])
def test_resize_is_tensorflow_1s(torch: Any, fidelity: Any, size: tuple[int, int]):
    images = np.random.default_rng(0).uniform(0, 255, (2, *size, 3)).astype(np.float32)
    module = sys.modules["torch_fidelity.interpolate_compat_tensorflow"]
    resize = module.interpolate_bilinear_2d_like_tensorflow1x
    given = torch.from_numpy(images.transpose(0, 3, 1, 2))
    expected = resize(given, size=(299, 299), align_corners=False).numpy()
    found = np.asarray(resize_bilinear(jnp.asarray(images), 299, 299))
    np.testing.assert_allclose(found.transpose(0, 3, 1, 2), expected, atol=1e-3)


def test_resize_by_hand():
    found = resize_bilinear(jnp.array([0.0, 10.0, 20.0])[None, :, None], 1, 6)[0, :, 0]
    np.testing.assert_allclose(found, [0, 5, 10, 15, 20, 20])  # the last has no neighbour


def make_i3d(torch: Any) -> Any:
    """I3D in PyTorch, from the paper's figure 3 and TensorFlow's rule for "SAME" padding."""
    nn, functional = torch.nn, torch.nn.functional

    def padded(x: Any, kernel: tuple[int, ...], stride: tuple[int, ...], value: float) -> Any:
        sides: list[int] = []
        for size, k, s in zip(x.shape[2:], kernel, stride, strict=True):
            missing = max((-(-size // s) - 1) * s + k - size, 0)
            sides = [missing // 2, missing - missing // 2, *sides]
        return functional.pad(x, sides, value=value)

    class Unit(nn.Module):
        def __init__(self, before: int, after: int, kernel: int, stride: int = 1) -> None:
            super().__init__()
            self.kernel, self.stride = (kernel,) * 3, (stride,) * 3
            self.conv3d = nn.Conv3d(before, after, kernel, stride, bias=False)
            self.bn = nn.BatchNorm3d(after, eps=1e-3)

        def forward(self, x: Any) -> Any:
            x = padded(x, self.kernel, self.stride, 0)
            return functional.relu(self.bn(self.conv3d(x)))

    def pool(x: Any, kernel: tuple[int, ...], stride: tuple[int, ...]) -> Any:
        return functional.max_pool3d(padded(x, kernel, stride, -1e9), kernel, stride)

    class Block(nn.Module):
        def __init__(self, before: int, w: tuple[int, ...]) -> None:
            super().__init__()
            self.b0 = Unit(before, w[0], 1)
            self.b1a, self.b1b = Unit(before, w[1], 1), Unit(w[1], w[2], 3)
            self.b2a, self.b2b = Unit(before, w[3], 1), Unit(w[3], w[4], 3)
            self.b3b = Unit(before, w[5], 1)

        def forward(self, x: Any) -> Any:
            b3 = self.b3b(pool(x, (3, 3, 3), (1, 1, 1)))
            return torch.cat([self.b0(x), self.b1b(self.b1a(x)), self.b2b(self.b2a(x)), b3], 1)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.Conv3d_1a_7x7, self.Conv3d_2b_1x1 = Unit(3, 64, 7, 2), Unit(64, 64, 1)
            self.Conv3d_2c_3x3 = Unit(64, 192, 3)
            for name, before, widths in (
                ("3b", 192, (64, 96, 128, 16, 32, 32)),
                ("3c", 256, (128, 128, 192, 32, 96, 64)),
                ("4b", 480, (192, 96, 208, 16, 48, 64)),
                ("4c", 512, (160, 112, 224, 24, 64, 64)),
                ("4d", 512, (128, 128, 256, 24, 64, 64)),
                ("4e", 512, (112, 144, 288, 32, 64, 64)),
                ("4f", 528, (256, 160, 320, 32, 128, 128)),
                ("5b", 832, (256, 160, 320, 32, 128, 128)),
                ("5c", 832, (384, 192, 384, 48, 128, 128)),
            ):
                self.add_module(f"Mixed_{name}", Block(before, widths))
            self.logits = nn.Module()
            self.logits.conv3d = nn.Conv3d(1024, 400, 1)

        def forward(self, x: Any) -> Any:
            x = pool(self.Conv3d_1a_7x7(x), (1, 3, 3), (1, 2, 2))
            x = pool(self.Conv3d_2c_3x3(self.Conv3d_2b_1x1(x)), (1, 3, 3), (1, 2, 2))
            x = pool(self.Mixed_3c(self.Mixed_3b(x)), (3, 3, 3), (2, 2, 2))
            x = self.Mixed_4d(self.Mixed_4c(self.Mixed_4b(x)))
            x = pool(self.Mixed_4f(self.Mixed_4e(x)), (2, 2, 2), (2, 2, 2))
            x = functional.avg_pool3d(self.Mixed_5c(self.Mixed_5b(x)), (2, 7, 7), 1)
            return self.logits.conv3d(x).mean((2, 3, 4))

    return Net()


@pytest.mark.parametrize(
    "frames", [9, *(pytest.param(n, marks=pytest.mark.slow) for n in (16, 25))]
)
def test_i3d_logits_are_those_of_pytorch(torch: Any, tmp_path: Path, frames: int):
    torch.manual_seed(0)
    network = make_i3d(torch)
    clips = pictures(3, 2 * frames, 56).reshape(2, frames, 56, 56, 3)
    # Times four, TF1's resize is even steps between neighbours, and none beyond the last.
    resized = resize_bilinear(jnp.asarray(clips, jnp.float32), 224, 224)
    scaled = torch.from_numpy(np.array(resized / 127.5 - 1).transpose(0, 4, 1, 2, 3))
    awaken(torch, network, scaled)
    torch.save(network.state_dict(), tmp_path / "i3d.pt")
    with torch.no_grad():
        expected = network(scaled).numpy()
    params = VIDEO.read(tmp_path / "i3d.pt")
    function = NetworkFeatures(VIDEO.model.apply, params, 2, jax.local_devices()[:1])
    assert_close(function(clips)["video"], expected)


def test_short_clips_are_refused():
    with pytest.raises(ValueError, match="8 frames"):
        jax.eval_shape(
            VIDEO.model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 8, 9, 9, 3), np.uint8)
        )


def test_published_keys_and_parameter_counts():
    """24 M and 12.7 M parameters, norms' moments among them; keys as in the published files."""
    inception, video = (sizes(network) for network in (INCEPTION, VIDEO))
    # torchvision's Inception-v3 without its head and the auxiliary one, and norms of 17,216 channels.
    assert sum(map(np.prod, inception.values())) == 21_785_568 + 2048 * 1008 + 2 * 17_216
    assert inception["Mixed_6b.branch7x7dbl_5.conv.weight"] == (1, 7, 128, 192)
    assert inception["Conv2d_1a_3x3.bn.running_var"] == (32,)
    assert inception["fc.weight"] == (2048, 1008) and "fc.bias" not in inception
    assert len(video) == 57 * 5 + 2
    assert sum(map(np.prod, video.values())) == 12_697_264 + 2 * 7_280
    assert video["Mixed_4e.b2b.conv3d.weight"] == (3, 3, 3, 32, 64)
    assert video["logits.conv3d.bias"] == (400,)


def sizes(network: Network) -> dict[str, tuple[int, ...]]:
    return {entry.keys[0]: entry.shape for entry in network.map().entries}


def test_a_broken_file_of_weights_is_refused(tmp_path: Path):
    (tmp_path / "broken.npz").write_bytes(b"PK")
    with pytest.raises(ValueError, match="broken.npz"):
        VIDEO.read(tmp_path / "broken.npz")


def test_batches_and_devices_change_nothing():
    images = pictures(4, 21, 16)

    def apply(params: Any, x: jax.Array) -> dict[str, jax.Array]:
        return {"mean": x.astype(jnp.float32).mean((1, 2)) * params, "corner": x[:, 0, 0]}

    whole = NetworkFeatures(apply, jnp.float32(2), 64, jax.local_devices()[:1])(images)
    np.testing.assert_array_equal(whole["corner"], images[:, 0, 0])
    spread = NetworkFeatures(apply, jnp.float32(2), 3)
    assert spread.batch == len(jax.local_devices())
    for name, found in spread(images).items():
        np.testing.assert_allclose(found, whole[name], rtol=1e-6)
    with pytest.raises(ValueError, match="dtype float32: give uint8"):
        spread(images.astype(np.float32))
