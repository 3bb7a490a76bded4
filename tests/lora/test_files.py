"""Files of adapters: against PEFT on Wan of Diffusers' class, through every layout, and refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from dit_jax import interop
from dit_jax.config import CodecConfig, VideoRun
from dit_jax.files import InputError
from dit_jax.lora import files
from dit_jax.lora.adapters import Adapter, merge
from dit_jax.parallel import MeshConfig, make_mesh
from dit_jax.wan import transformer as wan
from tests.interop.published import diffusers, needs, relative, torch
from tests.optional import optional
from tests.wan.published import denoise, random_file, random_inputs, random_wan, save, theirs

LAYOUT, TOLERANCE = "2.1 T2V", 1e-4
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"]
peft: Any = optional("peft")
needs_peft = needs("torch", "diffusers", "peft")
DEFAULT = ("self_attention/qkv", "self_attention/out", "cross_attention/q", "cross_attention/kv")
DEFAULT += ("cross_attention/out", "mlp/up", "mlp/down")


def wan_run() -> tuple[VideoRun, Any]:
    """A small Wan as a run, and random parameters."""
    file, params = random_file(LAYOUT)
    return file.run("runs/base", CodecConfig(t=4, h=8, w=8)), params


def random_adapter(params: Any, rank: int = 4, scale: float = 2.0) -> Adapter:
    """Of all that is adapted by default, one A for what is joined."""
    rng, blocks, layers = np.random.default_rng(3), params["params"]["dit"]["blocks"], {}
    for name in DEFAULT:
        part, layer = name.split("/")
        n, d, e = blocks[part][layer]["kernel"].shape
        a, b = rng.normal(size=(n, d, rank)), rng.normal(size=(n, rank, e))
        pair = 0.3 * a.astype(np.float32), 0.3 * b.astype(np.float32)
        layers[f"dit/blocks/{name}"] = pair
    return Adapter(layers, scale)


def merged(params: Any, adapter: Adapter) -> Any:
    return merge(jax.tree.map(jax.numpy.array, params), [adapter])


def assert_same(one: Any, other: Any, places: float = 1e-5) -> None:
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert relative(a, b) < places


def write(path: Path, arrays: Any, **about: Any) -> Path:
    interop.write_safetensors(path, arrays, {files.METADATA: json.dumps(about)} if about else {})
    return path


@needs_peft
def test_adapters_of_peft_compute_the_same_and_come_back(tmp_path: Path):
    model, inputs = random_wan(LAYOUT), random_inputs(LAYOUT)

    folder = save(model, tmp_path / "in")
    arrays, _ = interop.read_weights(folder)
    file, kind = wan.from_folder(interop.read_config(folder), "in", "", arrays)
    params = file.table(kind).read(arrays, "in")
    config = file.run("runs/base", CodecConfig(t=4, h=8, w=8))
    settings = peft.LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS)
    model.add_adapter(settings, adapter_name="default")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.3 * torch.randn_like(parameter))
    expected, plain = theirs(model, LAYOUT, inputs), denoise(file.model, params, LAYOUT, inputs)
    assert relative(plain, expected) > 0.05
    # With its metadata, as Diffusers writes it; without, alpha would be the rank.
    about = {f"{key}": value for key, value in settings.to_dict().items() if key != "task_type"}
    about = {key: sorted(x) if isinstance(x, set) else x for key, x in about.items()}
    diffusers.WanPipeline.save_lora_weights(
        tmp_path,
        transformer_lora_layers=peft.get_peft_model_state_dict(model, adapter_name="default"),
        transformer_lora_adapter_metadata=about,
    )
    saved = tmp_path / "pytorch_lora_weights.safetensors"
    adapter = files.read_adapter(saved, config)
    assert (
        adapter.scale == 1.5 and adapter.layers["dit/blocks/self_attention/qkv"][0].shape[-1] == 12
    )
    found = denoise(file.model, merged(params, adapter), LAYOUT, inputs)
    assert relative(found, expected) < TOLERANCE

    # Ours, read by Diffusers in both layouts.
    model.delete_adapters("default")
    for layout in ("diffusers", "comfyui"):
        path = tmp_path / f"{layout}.safetensors"
        files.write_adapter(path, adapter, config, layout)
        state = diffusers.WanPipeline.lora_state_dict(str(path))
        model.load_lora_adapter(dict(state), prefix="transformer", adapter_name=layout)
        assert relative(theirs(model, LAYOUT, inputs), expected) < TOLERANCE, layout
        model.delete_adapters(layout)
    # An A for each of three stays one: the file comes back as it was.
    again = interop.read_safetensors(tmp_path / "diffusers.safetensors")
    before = interop.read_safetensors(saved)
    assert again.keys() == before.keys()
    for key, array in before.items():
        scale = 1.5 if "lora_B" in key else 1
        np.testing.assert_allclose(again[key], scale * array, rtol=1e-6)


@pytest.mark.parametrize("layout", ["diffusers", "comfyui", "own"])
def test_layouts_come_back(tmp_path: Path, layout: Any):
    config, params = wan_run()
    adapter, path = random_adapter(params), tmp_path / "a.safetensors"
    files.write_adapter(path, adapter, config, layout)
    again = files.read_adapter(path, config)
    files.check_adapter(again, config, make_mesh(MeshConfig()), "it")
    assert {name: a.shape for name, (a, _) in again.layers.items()} == {
        name: a.shape for name, (a, _) in adapter.layers.items()
    }  # One A of ours, written to three, is one again.
    assert_same(merged(params, adapter), merged(params, again))


def kohya(path: Path, target: Path) -> Path:
    """The file with the names that kohya's and musubi's trainers give."""
    arrays = {}
    for key, array in interop.read_safetensors(path).items():
        end = next(one for one in files.ENDS if key.endswith(one))
        name = key.removeprefix("diffusion_model.").removesuffix(end).replace(".", "_")
        arrays[f"lora_unet_{name}{end}"] = array
    return write(target, arrays)


def test_other_names_are_read(tmp_path: Path):
    config, params = wan_run()
    adapter = random_adapter(params)
    expected = merged(params, adapter)
    comfy, plain = tmp_path / "c.safetensors", tmp_path / "d.safetensors"
    files.write_adapter(comfy, adapter, config, "comfyui")
    files.write_adapter(plain, adapter, config, "diffusers")
    assert_same(
        merged(params, files.read_adapter(kohya(comfy, tmp_path / "k.safetensors"), config)),
        expected,
    )
    arrays = interop.read_safetensors(plain)
    bare = {key.removeprefix("transformer."): array for key, array in arrays.items()}
    assert_same(
        merged(params, files.read_adapter(write(tmp_path / "b.safetensors", bare), config)),
        expected,
    )
    # PEFT's folder, with an alpha of its own for one module.
    folder = tmp_path / "peft"
    folder.mkdir()
    named = {f"base_model.model.{key}": array for key, array in bare.items()}
    write(folder / "adapter_model.safetensors", named)
    settings = {"r": 4, "lora_alpha": 4, "alpha_pattern": {"blocks.0.ffn.net.2": 8}}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    found = files.read_adapter(folder, config)
    a, b = adapter.layers["dit/blocks/mlp/down"]
    doubled = np.concatenate([2 * b[:1], b[1:]])
    layers = {**adapter.layers, "dit/blocks/mlp/down": (a, doubled)}
    assert_same(merged(params, found), merged(params, dataclasses.replace(adapter, layers=layers)))


def test_files_of_something_else_are_refused(tmp_path: Path):
    config, params = wan_run()
    path = tmp_path / "a.safetensors"
    files.write_adapter(path, random_adapter(params), config, "diffusers")
    arrays = dict(interop.read_safetensors(path))
    first = "transformer.blocks.0.attn1.to_q."

    def refused(match: str, **changes: Any) -> None:
        changed = {key.replace("__", "."): x for key, x in changes.items()}
        kept = {key: x for key, x in {**arrays, **changed}.items() if x is not None}
        with pytest.raises(InputError, match=match):
            files.read_adapter(write(tmp_path / "b.safetensors", kept), config)

    a, b = arrays[f"{first}lora_A.weight"], arrays[f"{first}lora_B.weight"]
    refused(r"blocks.0.attn1.to_q: no B", **{f"{first}lora_B.weight": None})
    refused(
        r"blocks.9.attn1.to_q: no such layer",
        **{
            "transformer.blocks.9.attn1.to_q.lora_A.weight": a,
            "transformer.blocks.9.attn1.to_q.lora_B.weight": b,
        },
    )
    refused(
        r"A \(4, 23\), B \(24, 4\) of a layer \[24, 24\]", **{f"{first}lora_A.weight": a[:, 1:]}
    )
    refused(r"norm.diff_b: unknown", **{"transformer.blocks.0.norm.diff_b": a[0]})
    refused(r"comfyui, diffusers", **{"diffusion_model.blocks.0.self_attn.q.lora_A.weight": a})
    with pytest.raises(InputError, match="use_dora"):
        files.read_adapter(
            write(tmp_path / "d.safetensors", arrays, **{"transformer.use_dora": True}), config
        )
    own = tmp_path / "own.safetensors"
    files.write_adapter(own, random_adapter(params), config, "own")
    other = dataclasses.replace(
        config,
        model=dataclasses.replace(
            config.model, dit=dataclasses.replace(config.model.dit, width=48)
        ),
    )
    with pytest.raises(InputError, match="is of another model"):
        files.check_adapter(files.read_adapter(own, other), other, make_mesh(MeshConfig()), "it")
