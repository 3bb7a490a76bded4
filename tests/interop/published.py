"""Models of Diffusers' own classes with random weights, and what the tests need of PyTorch."""

import copy
import importlib.util
from typing import Any

import numpy as np
import pytest

from dit_jax.interop import dit as dit_files
from dit_jax.interop.dit import grid_table
from tests.optional import optional


class Lazy:
    """A module that is imported when it is first used: not by who only collects the tests."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> Any:
        return getattr(optional(self._name), name)


def needs(*names: str) -> pytest.MarkDecorator:
    """Skips a test where one of these modules is not installed."""
    absent = [name for name in names if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(absent), reason=f"not installed: {', '.join(absent)}")


torch: Any = Lazy("torch")
diffusers: Any = Lazy("diffusers")
needs_diffusers = needs("torch", "diffusers")


def random_dit(
    width: int, heads: int, depth: int, patch: int, size: int, classes: int = 10, outputs: int = 2
) -> Any:
    """A transformer of Diffusers' class; the blocks' embedders are equal, as in published files.

    What Diffusers' class does otherwise than DiT is set as DiT has it (see ``diffusers_dit``).
    """
    torch.manual_seed(0)
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=heads,
        attention_head_dim=width // heads,
        in_channels=4,
        out_channels=4 * outputs,
        num_layers=depth,
        sample_size=size,
        patch_size=patch,
        num_embeds_ada_norm=classes,
        norm_eps=1e-6,
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # Larger than at initialisation, so that every branch is seen in the output.
            parameter.mul_(1.5).add_(0.01 * torch.randn_like(parameter))
    first = model.transformer_blocks[0].norm1.emb
    first.time_proj.downscale_freq_shift = 0
    for block in model.transformer_blocks:
        block.norm1.emb = copy.deepcopy(first)
    return model


def as_published(model: Any) -> dict[str, Any]:
    """The same weights by the names that facebookresearch's files have."""
    state = dict(model.state_dict())
    emb = "transformer_blocks.0.norm1.emb."
    pairs = {
        "x_embedder.proj": "pos_embed.proj",
        "t_embedder.mlp.0": emb + "timestep_embedder.linear_1",
        "t_embedder.mlp.2": emb + "timestep_embedder.linear_2",
        "final_layer.linear": "proj_out_2",
        "final_layer.adaLN_modulation.1": "proj_out_1",
    }
    named = {
        "pos_embed": model.pos_embed.pos_embed,
        "y_embedder.embedding_table.weight": state[emb + "class_embedder.embedding_table.weight"],
    }
    for i in range(len(model.transformer_blocks)):
        theirs, ours = f"transformer_blocks.{i}.", f"blocks.{i}."
        pairs |= {
            ours + "attn.proj": theirs + "attn1.to_out.0",
            ours + "mlp.fc1": theirs + "ff.net.0.proj",
            ours + "mlp.fc2": theirs + "ff.net.2",
            ours + "adaLN_modulation.1": theirs + "norm1.linear",
        }
        for kind in ("weight", "bias"):
            parts = [state[f"{theirs}attn1.to_{x}.{kind}"] for x in "qkv"]
            named[f"{ours}attn.qkv.{kind}"] = torch.cat(parts)
    for ours, theirs in pairs.items():
        for kind in ("weight", "bias"):
            named[f"{ours}.{kind}"] = state[f"{theirs}.{kind}"]
    return {name: tensor.detach().clone().contiguous() for name, tensor in named.items()}


def relative(found: Any, wanted: Any) -> float:
    """The largest difference, in units of the largest value."""
    found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
    assert found.shape == wanted.shape
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


def authors_arrays(family: Any = "dit", **changed: Any) -> Any:
    """A small file's arrays in the authors' layout, without PyTorch."""
    rng = np.random.default_rng(0)
    file = dit_files.infer_dit(seeds(), family, heads=4)
    table = dit_files.dit_map(file)
    arrays = {"pos_embed": grid_table(48, 4)}
    for entry in table.entries:
        for key in entry.keys:
            arrays[key] = 0.1 * rng.normal(size=entry.layout.their_shape).astype(np.float32)
    return file, table, {**arrays, **changed}


def seeds() -> dict[str, np.ndarray]:
    """What the config of a small file is read from."""
    shapes = {
        "x_embedder.proj.weight": (48, 4, 2, 2),
        "y_embedder.embedding_table.weight": (11, 48),
        "final_layer.linear.weight": (32, 48),
        "blocks.0.mlp.fc1.weight": (192, 48),
        "blocks.1.mlp.fc1.weight": (192, 48),
        "pos_embed": (1, 16, 48),
    }
    return {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
