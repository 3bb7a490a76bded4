"""Wan's transformers through files on disk, against Diffusers' class, and back."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import linen as nn

from dit_jax import interop
from dit_jax.model import PatchConfig, TextToVideo, blank_inputs, no_attention
from dit_jax.sampling import Request
from dit_jax.sampling.request import Space
from dit_jax.types import Runtime
from dit_jax.wan import transformer as wan
from dit_jax.wan.conditioners import ImageLatents
from dit_jax.wan.published import PUBLISHED
from tests.interop.published import diffusers, needs, needs_diffusers, relative, torch
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
@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(name, marks=pytest.mark.slow if name == "2.1 FLF2V" else ())
        for name in LAYOUTS
        if name != "2.2 T2V"  # in test_converting.py: two of the sizes of 2.1's
    ],
)
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


@needs_diffusers
@needs("accelerate")  # Without it Diffusers does not read this class.
def test_shards_are_read_and_written(tmp_path):
    model = random_wan("2.1 I2V")
    whole, shards = save(model, tmp_path / "one"), tmp_path / "many"
    save(model, shards, max_shard_size="30KB")
    assert len(list(shards.glob("*.safetensors"))) > 2
    (file, params, _), (other, same, _) = read_folder(whole), read_folder(shards)
    jax.tree.map(np.testing.assert_array_equal, params, same)
    written = file.table("diffusers").export(params)
    interop.write_folder(tmp_path / "out", other.config_json(), written, limit=30_000)
    sizes = [path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors")]
    assert len(sizes) > 2 and max(sizes) < 40_000  # with their headers
    again = diffusers.WanTransformer3DModel.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(again[key], value) for key, value in model.state_dict().items())


BILLIONS = {"2.1-t2v-1.3b": 1.42, "2.1-i2v-14b": 16.4, "2.2-ti2v-5b": 5.0, "2.2-t2v-a14b": 14.3}


@needs_diffusers
@pytest.mark.parametrize("name", BILLIONS)
def test_published_sizes_have_our_shapes(name):
    settings = dataclasses.asdict(PUBLISHED[name])
    with torch.device("meta"):
        state = diffusers.WanTransformer3DModel(**settings).state_dict()
    arrays = {key: np.broadcast_to(np.float32(0), value.shape) for key, value in state.items()}
    file = wan.WanFile(wan.model_of(PUBLISHED[name]))
    table = file.table("diffusers")
    table.check(table.named(arrays), name)
    module = TextToVideo(file.model, Runtime(no_attention))
    table.check_params(
        nn.unbox(jax.eval_shape(module.init, jax.random.key(0), blank_inputs(file.model)))
    )
    count = sum(array.size for array in arrays.values())
    assert abs(count / 1e9 - BILLIONS[name]) < 0.05


def test_a_clip_of_images_has_their_mask_and_latents():
    """As the published pipeline: ones and grey elsewhere, the first latent frame's mask four times."""

    class Codec:
        strides, channels, hash = (4, 2, 2), 16, "codec"

        def encode(self, video: np.ndarray) -> np.ndarray:
            first = video[:1, ::2, ::2, :1]
            rest = video[1:, ::2, ::2, :1].reshape(-1, 4, *first.shape[1:]).mean(1)
            return np.repeat(np.concatenate([first, rest]), 16, -1)

    space = Space(Codec(), PatchConfig(1, 2, 2, 16))
    white = np.full((8, 12, 3), 255, np.uint8)
    request = ImageLatents().with_images(
        "it", Request("", 3, 4, 6, 4.0, 0), space, {0: white, 8: white}
    )
    field = request.pixel_fields["it"]
    assert field.shape == (3, 4, 6, 20)
    np.testing.assert_array_equal(field[:, 1, 2, :4], [[1, 1, 1, 1], [0, 0, 0, 0], [0, 0, 0, 1]])
    np.testing.assert_allclose(field[:, 3, 5, 4:], [[1] * 16, [0] * 16, [0.25] * 16])
