"""VGG's sizes and LPIPS' equation, and both beside statements of them in PyTorch, through files."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from dit_jax import interop
from dit_jax.codec import vgg
from dit_jax.codec.vgg import VGG, PerceptualNetwork, VGGConfig, perceptual_distance
from tests.codecs import noise, normal_params
from tests.interop.published import needs, relative, torch

SMALL = VGGConfig(widths=(4, 6, 8), layers=(1, 2, 1))
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


KINDS = ("weight", "bias")
TAPS = (3, 8, 15, 22, 29)
"""relu1_2, 2_2, 3_3, 4_3 and 5_3 in ``statement``."""


def their_maps(features, frames):
    x = torch.tensor(frames).permute(0, 3, 1, 2) / 2 + 0.5
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    maps = [(x - mean[:, None, None]) / std[:, None, None]]
    for layer in features:
        maps.append(layer(maps[-1]))
    return [maps[1 + i] for i in TAPS]


def their_distance(features, lins, a, b):
    total = 0
    for x, y, lin in zip(their_maps(features, a), their_maps(features, b), lins, strict=True):
        x, y = (f / (f.square().sum(1, keepdim=True).sqrt() + 1e-10) for f in (x, y))
        total = total + torch.nn.functional.conv2d((x - y) ** 2, lin).mean((1, 2, 3))
    return total


@pytest.fixture(scope="module")
def params():
    return normal_params(VGG(SMALL), jnp.zeros((1, 8, 8, 3)))


def test_vgg_16_has_its_parameters_and_maps():
    boxed = jax.eval_shape(VGG().init, jax.random.key(0), jnp.zeros((1, 32, 48, 3)))
    leaves = jax.tree.leaves(boxed, is_leaf=lambda leaf: isinstance(leaf, nn.LogicallyPartitioned))
    assert all(isinstance(leaf, nn.LogicallyPartitioned) for leaf in leaves)
    # torchvision's 138,357,544 less the 123,642,856 of its classifier.
    assert sum(leaf.size for leaf in jax.tree.leaves(boxed)) == 14_714_688
    maps = jax.eval_shape(VGG().apply, nn.unbox(boxed), jnp.zeros((2, 35, 48, 3)))
    assert [leaf.shape for leaf in maps] == [
        (2, 35, 48, 64),
        (2, 17, 24, 128),
        (2, 8, 12, 256),
        (2, 4, 6, 512),
        (2, 2, 3, 512),
    ]


def test_the_distance_is_equation_1():
    rng = np.random.default_rng(0)
    shapes = [(2, 4, 5, 3), (2, 2, 2, 6)]
    a, b = ([jnp.asarray(rng.normal(size=shape), "f4") for shape in shapes] for _ in range(2))
    weights = [jnp.asarray(rng.uniform(size=shape[-1]), "f4") for shape in shapes]

    def stated(weights):
        total = np.zeros(2)
        for x, y, w in zip(a, b, weights, strict=True):
            x, y, w = (np.asarray(array) for array in (x, y, w))
            n, h, width, _ = x.shape
            for i, j, k in np.ndindex(n, h, width):
                u, v = x[i, j, k], y[i, j, k]
                difference = u / np.linalg.norm(u) - v / np.linalg.norm(v)
                total[i] += (w * difference**2).sum() / (h * width)
        return total

    ones = [jnp.ones_like(weight) for weight in weights]
    np.testing.assert_allclose(perceptual_distance(a, b, weights), stated(weights), rtol=1e-5)
    np.testing.assert_allclose(perceptual_distance(a, b), stated(ones), rtol=1e-5)
    doubled = [3 * x for x in a]
    np.testing.assert_allclose(perceptual_distance(doubled, a), 0, atol=1e-9)


@pytest.mark.slow
def test_gradients_are_finite_also_where_nothing_is_active(params):
    network = PerceptualNetwork(params, None, SMALL)
    a, b = (jnp.asarray(noise(2, 8, 8, 3, seed=i)) for i in range(2))
    gradient = jax.grad(lambda b: network(a, b).sum())(b)
    assert np.isfinite(gradient).all() and (np.abs(gradient).sum((1, 2, 3)) > 0).all()
    dead = jax.tree.map(lambda leaf: leaf - 1000 if leaf.ndim == 1 else leaf, params)
    gradient = jax.grad(lambda b: PerceptualNetwork(dead, None, SMALL)(a, b).sum())(b)
    np.testing.assert_array_equal(gradient, 0)


def test_bfloat16_is_near(params):
    a, b = noise(2, 8, 8, 3), noise(2, 8, 8, 3, seed=1)
    compare = jax.jit(lambda network: network(a, b))
    fine = compare(PerceptualNetwork(params, None, SMALL))
    coarse = compare(PerceptualNetwork(params, None, SMALL, jnp.bfloat16))
    assert coarse.dtype == jnp.float32
    np.testing.assert_allclose(coarse, fine, rtol=0.05)  # eight bits, through four layers


# Parity.


@pytest.fixture(scope="module")
def network():
    """Random features as torchvision saves them (with a classifier), and linear weights of LPIPS."""
    torch.manual_seed(0)
    features = statement()
    with torch.no_grad():
        for parameter in features.parameters():
            parameter.mul_(1.5).add_(0.02 * torch.randn_like(parameter))
    state = {f"features.{name}": value for name, value in features.state_dict().items()}
    state |= {f"classifier.{i}.{kind}": torch.zeros(2) for i in (0, 3, 6) for kind in KINDS}
    lins = {f"lin{i}.model.1.weight": torch.rand(1, w, 1, 1) for i, w in enumerate(WIDTHS)}
    return features, state, lins


@needs("torch")
def test_features_and_distance_are_those_of_pytorch(network, tmp_path):
    features, state, lins = network
    for name, tensors in (("vgg16", state), ("lpips", lins)):
        torch.save(tensors, tmp_path / f"{name}.pth")
        arrays = {key: tensor.detach().numpy() for key, tensor in tensors.items()}
        interop.write_safetensors(tmp_path / f"{name}.safetensors", arrays)
    paths = tmp_path / "vgg16.pth", tmp_path / "lpips.pth"
    ours = vgg.load_vgg(*paths, CONFIG)
    again = vgg.load_vgg(*(path.with_suffix(".safetensors") for path in paths), CONFIG)
    jax.tree.map(
        np.testing.assert_array_equal, (ours.params, ours.weights), (again.params, again.weights)
    )
    a, b = noise(2, 35, 32, 3), noise(2, 35, 32, 3, seed=1)
    with torch.no_grad():
        theirs = [x.permute(0, 2, 3, 1).numpy() for x in their_maps(features, a)]
        distance = their_distance(features, list(lins.values()), a, b).numpy()
        plain = their_distance(features, [torch.ones_like(w) for w in lins.values()], a, b).numpy()
    for found, wanted in zip(VGG(CONFIG).apply(ours.params, jnp.asarray(a)), theirs, strict=True):
        assert wanted.std() > 1e-3 and relative(found, wanted) < TOLERANCE
    pair = jnp.asarray(a), jnp.asarray(b)
    assert relative(ours(*pair), distance) < TOLERANCE
    # Of clips, frame by frame.
    assert relative(ours(*(x[:, None] for x in pair)), distance[:, None]) < TOLERANCE
    assert relative(vgg.load_vgg(paths[0], config=CONFIG)(*pair), plain) < TOLERANCE


def arrays_of(table):
    rng = np.random.default_rng(0)
    return {
        key: rng.uniform(0, 1, entry.layout.their_shape).astype(np.float32)
        for entry in table.entries
        for key in entry.keys
    }


def test_keys_are_torchvisions_and_shapes_vgg_16s():
    places = [0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28]
    shapes = {e.keys[0]: e.layout.their_shape for e in vgg.vgg_map(VGGConfig()).entries}
    assert list(shapes) == [f"features.{at}.{kind}" for at in places for kind in KINDS]
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
    other = r"features.0.weight: shape \(6, 3, 3, 3\), wanted \(64"
    refused(features, other, **alone, config=VGGConfig())
    nan = features | {"features.0.bias": np.full(6, np.nan, np.float32)}
    refused(nan, "NaN or infinite values in features.0.bias", **alone)
    refused(features, "is not the linear weights of LPIPS")
    refused(lins | {"lin2.model.1.weight": -lins["lin2.model.1.weight"]}, "negative .* in lin2")
    with pytest.raises(ValueError, match="nowhere"):
        vgg.load_vgg(tmp_path / "nowhere.pth")
