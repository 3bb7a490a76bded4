"""The folder of Diffusers' ``DiTTransformer2DModel``: its keys, and its ``config.json``.

Queries, keys and values have weights apart, and each block has its own copy of the embeddings of time
and class; the copies must be equal, as they are in published files.

Diffusers' own class departs from the published transformer in two places that the weights do not
tell, and we do not follow: the rates of its sinusoids of time are ``1e4 ** (-i / 127)`` where DiT's
are ``1e4 ** (-i / 128)``, and its second norm adds 1e-5 to the variance (``norm_eps``) for 1e-6.
"""

from __future__ import annotations

from typing import Any

from dit_jax.interop.dit import (
    DIT_KEYS,
    DiTFile,
    axis_sizes,
    check_published,
    grid_table,
    made_file,
)
from dit_jax.interop.folders import check_sizes
from dit_jax.interop.layouts import Layout
from dit_jax.interop.maps import Entry, Fixed, Map

CLASS = "DiTTransformer2DModel"
CLASSES = (CLASS, "Transformer2DModel")
"""The second is what Diffusers called it before 0.28, and published folders do; its ``norm_type`` says
which of several models it is."""
EMBEDDERS = "transformer_blocks.{}.norm1.emb."
"""What every block has a copy of."""

KEYS: dict[str, str] = {
    "dit/patch_embedding/kernel": "pos_embed.proj.weight",
    "dit/patch_embedding/bias": "pos_embed.proj.bias",
    "dit/time/up/kernel": EMBEDDERS + "timestep_embedder.linear_1.weight",
    "dit/time/up/bias": EMBEDDERS + "timestep_embedder.linear_1.bias",
    "dit/time/out/kernel": EMBEDDERS + "timestep_embedder.linear_2.weight",
    "dit/time/out/bias": EMBEDDERS + "timestep_embedder.linear_2.bias",
    "conditioners_label/embedding": EMBEDDERS + "class_embedder.embedding_table.weight",
    "dit/blocks/self_attention/out/kernel": "transformer_blocks.{}.attn1.to_out.0.weight",
    "dit/blocks/self_attention/out/bias": "transformer_blocks.{}.attn1.to_out.0.bias",
    "dit/blocks/mlp/up/kernel": "transformer_blocks.{}.ff.net.0.proj.weight",
    "dit/blocks/mlp/up/bias": "transformer_blocks.{}.ff.net.0.proj.bias",
    "dit/blocks/mlp/down/kernel": "transformer_blocks.{}.ff.net.2.weight",
    "dit/blocks/mlp/down/bias": "transformer_blocks.{}.ff.net.2.bias",
    "dit/blocks/modulation/linear/kernel": "transformer_blocks.{}.norm1.linear.weight",
    "dit/blocks/modulation/linear/bias": "transformer_blocks.{}.norm1.linear.bias",
    "dit/final/kernel": "proj_out_2.weight",
    "dit/final/bias": "proj_out_2.bias",
    "dit/final_modulation/linear/kernel": "proj_out_1.weight",
    "dit/final_modulation/linear/bias": "proj_out_1.bias",
}
"""Our parameter and its key here; the layouts are those of ``DIT_KEYS``."""
APART: dict[str, tuple[str, ...]] = {
    "dit/blocks/self_attention/qkv/kernel": tuple(
        f"transformer_blocks.{{}}.attn1.to_{x}.weight" for x in "qkv"
    ),
    "dit/blocks/self_attention/qkv/bias": tuple(
        f"transformer_blocks.{{}}.attn1.to_{x}.bias" for x in "qkv"
    ),
}
"""Our parameter and the keys that it is joined from."""

WANTED = {
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "norm_type": "ada_norm_zero",
    "norm_elementwise_affine": False,
}
"""Settings of ``config.json`` without which the model would be another."""
SIZES = (
    "num_attention_heads",
    "attention_head_dim",
    "in_channels",
    "num_layers",
    "sample_size",
    "patch_size",
    "num_embeds_ada_norm",
)
"""Settings that are whole numbers of at least 1 (and ``out_channels``, where it is one)."""
DIVISORS = (128, 127)
"""``DiTConfig.time_divisor`` of models that folders hold: the authors', or Diffusers' own."""
NORM_EPS = (1e-5, 1e-6)
"""Values of ``norm_eps`` in use; both are read, and neither followed (see above)."""


def diffusers_map(file: DiTFile) -> Map:
    """The keys of the folder's safetensors."""
    check_published(file.model, DIVISORS)
    sizes, depth = axis_sizes(file.model), file.model.dit.depth
    entries = []
    for path, (_, pattern) in DIT_KEYS.items():
        templates = APART.get(path) or (KEYS[path],)
        per_block = "{}" in templates[0]
        blocks = range(depth if per_block else 1)
        tied = templates[0].startswith(EMBEDDERS)
        entries.append(
            Entry(
                path=tuple(path.split("/")),
                keys=tuple(key.format(i) for i in blocks for key in templates),
                layout=Layout(pattern, sizes, joined="x" if path in APART else None),
                stacked=per_block and not tied,
                tied=tied,
                negative=file.family == "sit" and path.startswith("dit/final/"),
            )
        )
    table = grid_table(file.model.dit.width, file.size // file.model.patch.h)
    fixed = Fixed("pos_embed.pos_embed", table, optional=True)
    return Map(f"Diffusers' {CLASS} of its config.json", tuple(entries), (fixed,))


def from_diffusers(config: dict[str, Any], where: str) -> DiTFile:
    """The model of a ``config.json``.

    Raises:
        ValueError: where it is another class, or set to what the published transformer is not.
    """
    if config.get("_class_name") not in CLASSES:
        raise ValueError(f"{where} is of {config.get('_class_name')!r}, not {CLASS!r}.")
    given = DEFAULTS | config
    sizes = SIZES if given["out_channels"] is None else (*SIZES, "out_channels")
    check_sizes({name: given[name] for name in sizes}, where)
    other = [f"{name} is {given[name]!r}" for name, v in WANTED.items() if given[name] != v]
    if given["norm_eps"] not in NORM_EPS:
        other.append(f"norm_eps is {given['norm_eps']!r}")
    if other:
        raise ValueError(f"{where} is not the published transformer: {'; '.join(other)}.")
    width = given["num_attention_heads"] * given["attention_head_dim"]
    channels, out = given["in_channels"], given["out_channels"]
    return made_file(
        "dit",
        width=width,
        depth=given["num_layers"],
        heads=given["num_attention_heads"],
        hidden=4 * width,
        channels=channels,
        patch=given["patch_size"],
        outputs=1 if out is None else out / channels,
        classes=given["num_embeds_ada_norm"],
        size=given["sample_size"],
    )


DEFAULTS: dict[str, Any] = {
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "in_channels": 4,
    "out_channels": None,
    "num_layers": 28,
    "sample_size": 32,
    "patch_size": 2,
    "num_embeds_ada_norm": 1000,
    "norm_eps": 1e-5,
    "dropout": 0.0,
    "norm_num_groups": 32,
    "upcast_attention": False,
    **WANTED,
}
"""What a ``config.json`` means by leaving a setting out."""


def to_diffusers(file: DiTFile) -> dict[str, Any]:
    """The ``config.json`` of a model.

    Raises:
        ValueError: where the class cannot hold it.
    """
    check_published(file.model, DIVISORS)
    dit, patch = file.model.dit, file.model.patch
    if dit.hidden != 4 * dit.width:
        raise ValueError(
            f"Diffusers' {CLASS} has an MLP of 4 x {dit.width}, and this model's is {dit.hidden}: "
            "write the authors' layout instead."
        )
    return {
        "_class_name": CLASS,
        "_diffusers_version": "0.12.0",
        **DEFAULTS,
        "num_attention_heads": dit.heads,
        "attention_head_dim": dit.width // dit.heads,
        "in_channels": patch.channels,
        "out_channels": patch.channels * (1 + file.model.learned_variance),
        "num_layers": dit.depth,
        "sample_size": file.size,
        "patch_size": patch.h,
        "num_embeds_ada_norm": axis_sizes(file.model)["y"] - 1,
    }
