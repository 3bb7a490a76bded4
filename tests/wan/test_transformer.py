"""Wan's transformers through files on disk, against Diffusers' class, and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from dit_jax import interop
from dit_jax.wan import transformer as wan
from tests.interop.published import needs_diffusers, relative, torch
from tests.optional import optional
from tests.wan.published import LAYOUTS, denoise, random_inputs, random_wan, save, theirs

TOLERANCE = 1e-4
"""Float32 in another order of summation."""
WEIGHTS = "diffusion_pytorch_model.safetensors"
single_file: Any = optional("diffusers.loaders.single_file_utils")


def read_folder(folder: Path) -> tuple[wan.WanFile, Any, str]:
    arrays, _ = interop.read_weights(folder)
    file, kind = wan.from_folder(interop.read_config(folder), str(folder), "", arrays)
    return file, file.table(kind).read(arrays, "in"), kind


@needs_diffusers
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "2.2 T2V"])
def test_published_files_compute_the_same_and_come_back(tmp_path, layout):
    """A folder of Diffusers', and a file of the authors'."""
    model, inputs = random_wan(layout), random_inputs(layout)
    save(model, tmp_path / "in")
    file, params, _ = read_folder(tmp_path / "in")
    found = denoise(file.model, params, layout, inputs)
    assert relative(found, theirs(model, layout, inputs)) < TOLERANCE

    interop.write_folder(
        tmp_path / "out", file.config_json(), file.table("diffusers").export(params)
    )
    before, after = (tmp_path / name for name in ("in", "out"))
    assert (before / WEIGHTS).read_bytes() == (after / WEIGHTS).read_bytes()
    own = {"_diffusers_version": None}
    assert interop.read_config(before) | own == interop.read_config(after) | own

    interop.write_safetensors(tmp_path / "a.safetensors", file.table("safetensors").export(params))
    arrays = interop.read_safetensors(tmp_path / "a.safetensors")
    again, picked = wan.from_arrays(arrays, heads=2)
    assert again == file
    of_file = again.table("safetensors").read(picked, "a")
    jax.tree.map(np.testing.assert_array_equal, of_file, params)
    # Diffusers reads the authors' keys, and finds the weights that we began with.
    named = {key: torch.tensor(np.array(array)) for key, array in arrays.items()}
    positions = named.pop(wan.EMB_POS, None)  # which it leaves as they are
    state = dict(model.state_dict())
    if positions is not None:
        of_pair = state.pop("condition_embedder.image_embedder.pos_embed")
        assert torch.equal(positions, of_pair)
    converted = single_file.convert_wan_transformer_to_diffusers(named)
    assert converted.keys() == state.keys()
    assert all(torch.equal(converted[key], state[key]) for key in state)
