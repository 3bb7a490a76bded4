"""Published transformers: converted through files on disk they compute the same, and come back."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from einops import rearrange
from flax import linen as nn

from dit_jax import interop
from dit_jax.interop import dit as dit_files
from dit_jax.interop.dit import grid_table
from dit_jax.model import PRESETS, ModelConfig, TextToVideo, patchify, positions, unpatchify
from dit_jax.parallel import MeshConfig, make_mesh, parameter_shardings, xla_attention
from dit_jax.types import Runtime
from tests.denoiser import struct
from tests.interop.published import (
    as_published,
    authors_arrays,
    diffusers,
    needs_diffusers,
    random_dit,
    relative,
    seeds,
    torch,
)

TOLERANCE = 1e-4
"""Float32 in another order of summation."""

FAMILIES = {
    "S/2": {"width": 384, "heads": 6, "depth": 2, "patch": 2, "size": 8},
    "B/4": {"width": 768, "heads": 12, "depth": 2, "patch": 4, "size": 16},
    "XL/8": {"width": 1152, "heads": 16, "depth": 1, "patch": 8, "size": 32},
}
every_family = pytest.mark.parametrize(
    "name", ["S/2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("B/4", "XL/8"))]
)
SMALL = {"width": 48, "heads": 4, "depth": 3, "patch": 2, "size": 8}


def module_and_inputs(model: ModelConfig, tokens, places, t, labels):
    """Our model, and its inputs of one image a row."""
    b, l, _ = tokens.shape
    ones = np.ones((b, l), np.int32)
    given = struct(
        tokens=tokens,
        positions=np.broadcast_to(places, (b, l, 3)),
        segment_ids=ones,
        group_ids=0 * ones,
        group_t=np.asarray(t, np.float32)[:, None],
        text=ones[:, :1],
        text_segment_ids=ones[:, :1],
        segment_fields={"label": np.array(labels, np.int32)[:, None]},
    )
    return TextToVideo(model, Runtime(xla_attention)), given


def abstract(model: ModelConfig):
    """Shapes of the model's parameters, boxed with their logical axes."""
    tokens = np.zeros((1, 4, model.patch.dim), np.float32)
    module, given = module_and_inputs(model, tokens, np.zeros((4, 3), np.float32), [0.0], [0])
    return jax.eval_shape(module.init, jax.random.key(0), given)


def denoise(model: ModelConfig, params, latents, t, labels):
    """Our model on latents ``[b, c, h, w]``."""
    _, _, h, w = latents.shape
    clips = rearrange(latents, "b c h w -> b 1 h w c")
    tokens = np.stack([patchify(model.patch, clip) for clip in clips])
    places, _ = positions(model.patch, 1, h, w, 24.0)
    model = dataclasses.replace(model, dtype="float32")
    module, given = module_and_inputs(model, tokens, places, t, labels)
    out = jax.jit(module.apply)(params, given)
    halves = np.split(np.asarray(out), 1 + model.learned_variance, -1)
    images = [[unpatchify(model.patch, x, 1, h, w)[0] for x in half] for half in halves]
    return rearrange(np.array(images), "o b h w c -> b (o c) h w")


def theirs(model, *given):
    """Of latents, timesteps and labels."""
    with torch.no_grad():
        return model(*map(torch.tensor, given), return_dict=False)[0].numpy()


def read_folder(folder):
    config = json.loads((folder / "config.json").read_text())
    file = dit_files.from_diffusers(config, str(folder))
    arrays = interop.read_safetensors(folder / "diffusion_pytorch_model.safetensors")
    return file, arrays


def latents_of(size):
    return np.random.default_rng(1).normal(size=(2, 4, size, size)).astype(np.float32)


@needs_diffusers
@every_family
def test_published_files_compute_the_same_and_come_back(tmp_path, name):
    """A folder of Diffusers', and a file of the authors'."""
    made, latents = random_dit(**FAMILIES[name]), latents_of(FAMILIES[name]["size"])
    made.save_pretrained(tmp_path / "in")
    file, arrays = read_folder(tmp_path / "in")
    params = dit_files.diffusers_map(file).read(arrays, "in")
    wanted = theirs(made, latents, [999, 0], (3, 10))
    found = denoise(file.model, params, latents, [1.0, 0.001], (3, 10))
    assert relative(found, wanted) < TOLERANCE

    written = dit_files.diffusers_map(file).export(params)
    interop.write_folder(tmp_path / "out", dit_files.to_diffusers(file), written)
    weights = [tmp_path / name / "diffusion_pytorch_model.safetensors" for name in ("in", "out")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    before, after = (json.loads((path.parent / "config.json").read_text()) for path in weights)
    ours = dict.fromkeys(("norm_eps", "_diffusers_version"))
    assert before | ours == after | ours
    again = diffusers.DiTTransformer2DModel.from_config(after).state_dict()
    assert {k: v.shape for k, v in again.items()} == {k: v.shape for k, v in arrays.items()}

    state = as_published(made)
    torch.save(state, tmp_path / "in.pt")
    arrays = dit_files.pick_weights(interop.read_torch(tmp_path / "in.pt"))
    read = dit_files.infer_dit(arrays, heads=FAMILIES[name]["heads"])
    assert (read.size, read.model) == (file.size, file.model) and read.model.learned_variance
    of_file = dit_files.dit_map(read).read(arrays, "in.pt")
    jax.tree.map(np.testing.assert_array_equal, of_file, params)
    interop.write_safetensors(tmp_path / "out.safetensors", dit_files.dit_map(read).export(params))
    back = interop.read_safetensors(tmp_path / "out.safetensors")
    assert back.keys() == state.keys()
    for key, tensor in state.items():
        assert back[key].tobytes() == tensor.numpy().tobytes(), key


@needs_diffusers
def test_sits_velocity_has_our_sign_and_comes_back(tmp_path):
    made, latents = random_dit(**SMALL), latents_of(8)
    state = as_published(made)
    torch.save({"ema": state, "model": {}, "opt": {}}, tmp_path / "in.pt")
    arrays = dit_files.pick_weights(interop.read_torch(tmp_path / "in.pt"))
    file = dit_files.infer_dit(arrays, "sit", heads=4)
    params = dit_files.dit_map(file).read(arrays, "in.pt")
    wanted = -theirs(made, latents, [0.25, 0.9], (3, 9))
    found = denoise(file.model, params, latents, [0.75, 0.1], (3, 9))
    assert relative(found, wanted) < TOLERANCE
    back = dit_files.dit_map(file).export(params)
    for key, tensor in state.items():
        assert np.asarray(back[key]).tobytes() == tensor.numpy().tobytes(), key


@needs_diffusers
def test_diffusers_own_class_as_it_is(tmp_path):
    made = random_dit(**SMALL)
    made.save_pretrained(tmp_path)
    file, arrays = read_folder(tmp_path)
    params = dit_files.diffusers_map(file).read(arrays, "in")
    latents, given = latents_of(8), ([1.0, 0.313], (3, 9))
    for block in made.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 1
        block.norm3.eps = 1e-5
    wanted = theirs(made, latents, [999, 312], (3, 9))
    assert relative(denoise(file.model, params, latents, *given), wanted) > 1e-2
    dit = dataclasses.replace(file.model.dit, time_divisor=127)
    model = dataclasses.replace(file.model, dit=dit)
    assert relative(denoise(model, params, latents, *given), wanted) < TOLERANCE


PUBLISHED = {"S": 33, "B": 130, "L": 458, "XL": 675}


@needs_diffusers
@pytest.mark.parametrize(("size", "patch"), [("S", 2), ("B", 4), ("L", 8), ("XL", 2)])
def test_every_preset_has_the_published_shapes(size, patch):
    preset = PRESETS[size]
    with torch.device("meta"):
        made = diffusers.DiTTransformer2DModel(
            num_attention_heads=preset.heads,
            attention_head_dim=preset.width // preset.heads,
            out_channels=8,
            num_layers=preset.depth,
            patch_size=patch,
        )
    arrays = {k: np.broadcast_to(np.float32(0), v.shape) for k, v in made.state_dict().items()}
    file = dit_files.from_diffusers(dict(made.config) | {"_class_name": type(made).__name__}, "in")
    table = dit_files.diffusers_map(file)
    for entry in table.entries:  # what check does, without reading 28 equal tables of zeros
        for key in entry.keys:
            assert entry.fits(arrays.pop(key).shape), key
    assert not arrays
    shapes = nn.unbox(abstract(file.model))
    table.check_params(shapes)
    dit_files.dit_map(file).check_params(shapes)
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    # The table of the paper counts without the last digits; patches of 8 have a few more.
    assert abs(count / 1e6 - PUBLISHED[size]) < 2


def test_every_mismatch_is_named_at_once():
    _, table, arrays = authors_arrays()
    del arrays["blocks.1.attn.proj.bias"]
    arrays["blocks.1.attn.q_norm.weight"] = np.zeros(12)
    arrays["final_layer.linear.bias"] = np.zeros(16)
    arrays["pos_embed"] = arrays["pos_embed"] + 0.1
    with pytest.raises(ValueError) as caught:
        table.read(arrays, "'a.pt'")
    for said in (
        "'a.pt' is not a DIT of width 48, depth 2 and patch 2:\n",
        "blocks.1.attn.proj.bias: absent",
        "blocks.1.attn.q_norm.weight: (12,), which",
        "final_layer.linear.bias: shape (16,), wanted (32,)",
        "pos_embed: differs by 0.1",
    ):
        assert said in str(caught.value)


def test_embedders_that_differ_between_blocks_are_named():
    file, table, arrays = authors_arrays()
    apart = dit_files.diffusers_map(file)
    published = {k: np.asarray(v) for k, v in apart.export(table.read(arrays, "a")).items()}
    apart.read(published, "a")
    key = "transformer_blocks.1.norm1.emb.timestep_embedder.linear_1.bias"
    published[key] = published[key] + 1
    with pytest.raises(ValueError, match=f"{key}: not equal to transformer_blocks.0"):
        apart.read(published, "a")


def test_shards_of_both_layouts_are_the_slices_of_the_whole():
    file, table, arrays = authors_arrays()
    whole = table.read(arrays, "a")
    boxed = abstract(file.model)
    made = make_mesh(MeshConfig(data=1, fsdp=2, context=2, tensor=2))
    shardings = parameter_shardings(made, boxed)
    apart = dit_files.diffusers_map(file)
    published = {k: np.asarray(v) for k, v in apart.export(whole).items()}
    for each, source in ((table, arrays), (apart, published)):
        params = each.load(source, "a", nn.unbox(boxed), shardings)
        jax.tree.map(np.testing.assert_array_equal, whole, params)
        assert jax.tree.map(lambda x: x.sharding, params) == shardings
    kernel = params["params"]["dit"]["blocks"]["mlp"]["up"]["kernel"]
    assert kernel.addressable_shards[0].data.size < kernel.size
    back = table.export(params)
    for key, array in arrays.items():
        assert np.asarray(back[key]).tobytes() == array.tobytes(), key


def test_half_precision_goes_to_float32_and_back_exactly():
    _, table, arrays = authors_arrays()
    half = {k: a.astype(np.float16) for k, a in arrays.items()}
    back = table.export(table.read(half, "a"), np.float16)
    for key, array in half.items():
        assert np.asarray(back[key]).tobytes() == array.tobytes(), key


@needs_diffusers
def test_the_positions_are_diffusers_bit_for_bit():
    for width, side in ((384, 16), (1152, 16), (1152, 32)):
        embed = diffusers.models.embeddings.PatchEmbed(
            height=2 * side, width=2 * side, patch_size=2, in_channels=4, embed_dim=width
        )
        assert grid_table(width, side).tobytes() == embed.pos_embed.numpy().tobytes()


def test_a_model_that_the_layouts_cannot_hold_is_refused():
    file, _, _ = authors_arrays()
    dit = dataclasses.replace(file.model.dit, qk_norm=True, absolute_positions="thw")
    other = dataclasses.replace(file.model, dit=dit)
    with pytest.raises(ValueError, match="dit.qk_norm is True, not False; dit.absolute_positions"):
        dit_files.dit_map(dataclasses.replace(file, model=other))


@pytest.mark.parametrize(
    ("changed", "heads", "said"),
    [
        ({}, None, "say their number with --heads"),
        ({"pos_embed": None}, 4, "'pos_embed' is absent"),
        ({"final_layer.linear.weight": np.zeros((48, 48))}, 4, "3 numbers for each of the 4"),
    ],
)
def test_what_the_shapes_do_not_tell_is_asked_for(changed, heads, said):
    arrays = {key: array for key, array in (seeds() | changed).items() if array is not None}
    with pytest.raises(ValueError, match=said):
        dit_files.infer_dit(arrays, heads=heads)


def test_a_file_of_other_weights_is_refused():
    with pytest.raises(ValueError, match="its keys begin with conv_in, mid"):
        dit_files.pick_weights({"conv_in.weight": np.zeros(1), "mid.x": np.zeros(1)})


OLDER = {"_class_name": "Transformer2DModel", "num_vector_embeds": None}


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (OLDER | {"norm_type": "layer_norm"}, "norm_type is 'layer_norm'"),
        ({"_class_name": "UNet2DModel"}, "in is of 'UNet2DModel'"),
        ({"activation_fn": "geglu"}, "activation_fn is 'geglu'"),
        ({"norm_eps": 0.1}, "norm_eps is 0.1"),
        ({"num_attention_heads": None}, "num_attention_heads is None"),
        ({"sample_size": None}, "sample_size is None"),
        ({"in_channels": 0}, "in_channels is 0"),
        ({"out_channels": "8"}, "out_channels is '8'"),
        ({"patch_size": [2, 2]}, r"patch_size is \(2, 2\)"),
        ({"num_layers": True}, "num_layers is True"),
    ],
)
def test_a_config_of_another_model_is_refused(changed, said):
    file, _, _ = authors_arrays()
    config = dit_files.to_diffusers(file)
    assert dit_files.from_diffusers(config, "in") == file
    assert dit_files.from_diffusers(config | OLDER, "in") == file
    with pytest.raises(ValueError, match=said):
        dit_files.from_diffusers(config | changed, "in")
