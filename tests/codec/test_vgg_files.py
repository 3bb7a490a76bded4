"""VGG-16 and LPIPS beside statements of them in PyTorch: the same numbers from the same files."""

import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax import interop
from dit_jax.codec import vgg
from dit_jax.codec.vgg import VGG, VGGConfig
from tests.interop.published import optional, relative

torch = optional("torch")
needs_torch = pytest.mark.skipif(torch is None, reason="PyTorch, the other side, is not installed")

WIDTHS = (6, 8, 10, 12, 14)
CONFIG = VGGConfig(widths=WIDTHS)
TOLERANCE = 1e-5
"""Float32 in another order of summation."""


def statement(widths=WIDTHS):
    """torchvision's ``vgg16().features``, layer by layer."""
    layers, before = [], 3
    for width, count in zip(widths, (2, 2, 3, 3, 3), strict=True):
        for _ in range(count):
            layers += [torch.nn.Conv2d(before, width, 3, padding=1), torch.nn.ReLU()]
            before = width
        layers.append(torch.nn.MaxPool2d(2, 2))
    return torch.nn.Sequential(*layers)


TAPS = (3, 8, 15, 22, 29)
"""relu1_2, 2_2, 3_3, 4_3 and 5_3 in ``statement``."""


def their_maps(features, frames):
    x = torch.tensor(frames).permute(0, 3, 1, 2) / 2 + 0.5
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    x = (x - mean[:, None, None]) / std[:, None, None]
    maps = []
    for i, layer in enumerate(features):
        x = layer(x)
        if i in TAPS:
            maps.append(x)
    return maps


def their_distance(features, lins, a, b):
    total = 0
    for x, y, lin in zip(their_maps(features, a), their_maps(features, b), lins, strict=True):
        x, y = (f / (f.square().sum(1, keepdim=True).sqrt() + 1e-10) for f in (x, y))
        total = total + torch.nn.functional.conv2d((x - y) ** 2, lin).mean((1, 2, 3))
    return total


def frames(seed):
    return np.random.default_rng(seed).uniform(-1, 1, (2, 35, 32, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def network():
    """Random features as torchvision saves them (with a classifier), and linear weights of LPIPS."""
    torch.manual_seed(0)
    features = statement()
    with torch.no_grad():
        for parameter in features.parameters():
            parameter.mul_(1.5).add_(0.02 * torch.randn_like(parameter))
    state = {f"features.{name}": value for name, value in features.state_dict().items()}
    for i in (0, 3, 6):
        state |= {
            f"classifier.{i}.weight": torch.zeros(2, 2),
            f"classifier.{i}.bias": torch.zeros(2),
        }
    lins = {f"lin{i}.model.1.weight": torch.rand(1, w, 1, 1) for i, w in enumerate(WIDTHS)}
    return features, state, lins


@needs_torch
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_features_and_distance_are_those_of_pytorch(network, tmp_path, suffix):
    features, state, lins = network
    paths = tmp_path / f"vgg16{suffix}", tmp_path / f"lpips{suffix}"
    for path, tensors in zip(paths, (state, lins), strict=True):
        if suffix == ".pth":
            torch.save(tensors, path)
        else:
            arrays = {name: tensor.detach().numpy() for name, tensor in tensors.items()}
            interop.write_safetensors(path, arrays)
    ours = vgg.load_vgg(*paths, CONFIG)
    a, b = frames(0), frames(1)
    with torch.no_grad():
        theirs = [x.permute(0, 2, 3, 1).numpy() for x in their_maps(features, a)]
        distance = their_distance(features, list(lins.values()), a, b).numpy()
        plain = their_distance(features, [torch.ones_like(w) for w in lins.values()], a, b).numpy()
    for found, wanted in zip(VGG(CONFIG).apply(ours.params, jnp.asarray(a)), theirs, strict=True):
        assert wanted.std() > 1e-3 and relative(found, wanted) < TOLERANCE
    pair = jnp.asarray(a), jnp.asarray(b)
    assert relative(ours(*pair), distance) < TOLERANCE
    assert relative(vgg.load_vgg(paths[0], config=CONFIG)(*pair), plain) < TOLERANCE


def arrays_of(table):
    rng = np.random.default_rng(0)
    return {
        key: rng.uniform(0, 1, entry.layout.their_shape).astype(np.float32)
        for entry in table.entries
        for key in entry.keys
    }


def test_keys_are_torchvisions_and_shapes_vgg_16s():
    shapes = {e.keys[0]: e.layout.their_shape for e in vgg.vgg_map(VGGConfig()).entries}
    places = [0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28]
    kinds = ("weight", "bias")
    assert list(shapes) == [f"features.{at}.{kind}" for at in places for kind in kinds]
    assert shapes["features.5.weight"] == (128, 64, 3, 3)
    assert shapes["features.28.weight"] == (512, 512, 3, 3)
    lins = {e.keys[0]: e.layout.their_shape for e in vgg.lpips_map(VGGConfig()).entries}
    assert lins["lin0.model.1.weight"] == (1, 64, 1, 1) and len(lins) == 5


def test_files_that_do_not_hold_it_are_refused(tmp_path):
    features, lins = arrays_of(vgg.vgg_map(CONFIG)), arrays_of(vgg.lpips_map(CONFIG))
    good, bad = tmp_path / "good.safetensors", tmp_path / "bad.safetensors"
    interop.write_safetensors(good, features)

    def refused(arrays, said, **given):
        interop.write_safetensors(bad, arrays)
        with pytest.raises(ValueError, match=said):
            vgg.load_vgg(**{"path": good, "lpips": bad, "config": CONFIG, **given})

    fewer = {key: array for key, array in features.items() if key != "features.5.bias"}
    alone = {"path": bad, "lpips": None}
    refused(fewer, r"is not torchvision's VGG-16:\n  features.5.bias: absent", **alone)
    refused(features | {"classifier.1.weight": np.zeros(2)}, "classifier.1.weight", **alone)
    refused(
        features,
        r"features.0.weight: shape \(6, 3, 3, 3\), wanted \(64",
        **alone,
        config=VGGConfig(),
    )
    nan = features | {"features.0.bias": np.full(6, np.nan, np.float32)}
    refused(nan, "NaN or infinite values in features.0.bias", **alone)
    refused(features, "is not the linear weights of LPIPS")
    refused(lins | {"lin2.model.1.weight": -lins["lin2.model.1.weight"]}, "negative .* in lin2")
    with pytest.raises(ValueError, match="nowhere"):
        vgg.load_vgg(tmp_path / "nowhere.pth")
