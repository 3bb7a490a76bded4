"""AutoencoderKL beside Diffusers': the same numbers from the same files, and the files back."""

import json
import shutil

import jax
import numpy as np
import pytest
from einops import rearrange

from dit_jax import interop
from dit_jax.codec import folders
from dit_jax.codec.codec import TileConfig
from dit_jax.codec.folders import OLD_ATTENTION
from tests.codecs import diffusers_config, image_config
from tests.interop.published import diffusers, needs_diffusers, relative, torch

TOLERANCE = 1e-4
"""Float32 in another order of summation; the issue's bound."""

WEIGHTS = "diffusion_pytorch_model.safetensors"


def random_autoencoder(**changed):
    torch.manual_seed(0)
    widths = changed.pop("block_out_channels", (8, 8, 16, 24))
    model = diffusers.AutoencoderKL(
        block_out_channels=widths,
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        norm_num_groups=8,
        layers_per_block=1,
        **changed,
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.3).add_(0.02 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder as Diffusers writes it, and the model in it."""
    folder = tmp_path_factory.mktemp("vae") / "sd-vae"
    model = random_autoencoder()
    model.save_pretrained(folder)
    return folder, model


def pixels(frames=2, height=32, width=48):
    clip = np.random.default_rng(0).uniform(-1, 1, (frames, height, width, 3))
    return clip.astype(np.float32)


def channels_first(clip):
    return torch.tensor(rearrange(clip, "t h w c -> t c h w"))


def channels_last(tensor):
    return rearrange(tensor.detach().numpy(), "t c h w -> t h w c")


@needs_diffusers
def test_encode_and_decode_are_diffusers(saved):
    folder, model = saved
    codec = folders.load_codec(folder)
    clip = pixels()
    with torch.no_grad():
        drawn_from = model.encode(channels_first(clip)).latent_dist
        latents = channels_last(drawn_from.mean) * 0.18215
        back = channels_last(model.decode(drawn_from.mean).sample)
    found = codec.encode(clip)
    assert found.shape == (2, 4, 6, 4) and found.dtype == np.float32
    assert relative(found, latents) < TOLERANCE
    assert relative(codec.decode(latents), back) < TOLERANCE
    std = np.exp(0.5 * channels_last(drawn_from.logvar)) * 0.18215
    noise = jax.random.normal(jax.random.key(1), latents.shape)
    assert relative(codec.encode(clip, jax.random.key(1)), latents + std * noise) < TOLERANCE


VARIANTS = {
    "flux": {"use_quant_conv": False, "use_post_quant_conv": False, "latent_channels": 16},
    "no attention": {"mid_block_add_attention": False},
    "shifted": {"shift_factor": 0.1159, "scaling_factor": 0.3611},
    "one level": {"block_out_channels": (16,)},
}


@needs_diffusers
@pytest.mark.parametrize(
    "variant",
    [
        "flux",
        "shifted",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("no attention", "one level")),
    ],
)
def test_variants_are_diffusers_too(tmp_path, variant):
    model = random_autoencoder(**VARIANTS[variant])
    model.save_pretrained(tmp_path)
    codec = folders.load_codec(tmp_path)
    clip = pixels(1, 16, 16)
    with torch.no_grad():
        mean = model.encode(channels_first(clip)).latent_dist.mean
        back = channels_last(model.decode(mean).sample)
    latents = (channels_last(mean) - codec.shift) * codec.scale
    np.testing.assert_allclose(codec.shift, model.config.shift_factor or 0.0, rtol=1e-6)
    np.testing.assert_allclose(codec.scale, model.config.scaling_factor, rtol=1e-6)
    assert relative(codec.encode(clip), latents) < TOLERANCE
    assert relative(codec.decode(latents), back) < TOLERANCE


@needs_diffusers
def test_the_folder_comes_back_byte_for_byte(saved, tmp_path):
    folder, _ = saved
    codec = folders.load_codec(folder)
    config = diffusers_config(codec.config, 32)
    table = folders.autoencoder_map(codec.config)
    interop.write_folder(tmp_path / "out", config, table.export(codec.params))
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (folder / WEIGHTS).read_bytes()
    model = diffusers.AutoencoderKL.from_pretrained(tmp_path / "out")
    before = json.loads((folder / "config.json").read_text())
    for name in set(before) - {"_diffusers_version"}:
        value = model.config[name]
        assert (list(value) if isinstance(value, tuple) else value) == before[name], name


def old_names(state):
    """As files from before Diffusers 0.16 have them: other names, 1x1 convolutions."""
    renamed = {}
    for key, tensor in state.items():
        for new, old in OLD_ATTENTION.items():
            if f"attentions.0.{new}." in key:
                key = key.replace(f"attentions.0.{new}.", f"attentions.0.{old}.")
                tensor = tensor[..., None, None] if key.endswith("weight") else tensor
        renamed[key] = tensor.clone()
    return renamed


@needs_diffusers
@pytest.mark.parametrize("kind", ["bin", "safetensors"])
def test_old_names_of_attention_are_read_and_written(saved, tmp_path, kind):
    folder, model = saved
    state = old_names(model.state_dict())
    shutil.copy(folder / "config.json", tmp_path)
    if kind == "bin":
        torch.save(state, tmp_path / "diffusion_pytorch_model.bin")
    else:
        arrays = {key: tensor.numpy() for key, tensor in state.items()}
        interop.write_safetensors(tmp_path / WEIGHTS, arrays)
    codec = folders.load_codec(tmp_path)
    new = folders.load_codec(folder)
    jax.tree.map(np.testing.assert_array_equal, codec.params, new.params)
    assert codec.hash == new.hash and len(codec.hash) == 16
    written = folders.autoencoder_map(codec.config, old_names=True).export(codec.params)
    assert set(written) == set(state)


def seam(image, columns):
    """The mean step at some columns, in units of the mean step elsewhere."""
    steps = np.abs(np.diff(image, axis=2)).mean((0, 1, 3))
    at = np.zeros(len(steps), bool)
    at[[column - 1 for column in columns]] = True
    return float(steps[at].mean() / steps[~at].mean())


@needs_diffusers
def test_tiles_show_no_seams(saved):
    folder, _ = saved
    whole = folders.load_codec(folder)
    # Smooth, as the latents of images are: on noise there would be no seam to see.
    coarse = np.random.default_rng(0).normal(size=(1, 2, 3, 4)).astype(np.float32)
    latents = np.asarray(jax.image.resize(coarse, (1, 8, 20, 4), "cubic"))
    cut = folders.load_codec(folder, TileConfig(size=8, overlap=0)).decode(latents)
    blended = folders.load_codec(folder, TileConfig(size=8, overlap=4)).decode(latents)
    hard, soft = seam(cut, [64, 96]), seam(blended, range(32, 128))
    off = relative(blended, whole.decode(latents))
    print(f"steps at seams: {hard:.2f} cut, {soft:.2f} blended; {off:.3f} off the whole at most")
    # Group norms and attention see a tile where they saw the image, so that neighbours disagree.
    assert hard > 1.3 and soft < 1.1


def test_a_folder_that_is_none_is_said_to_be(tmp_path):
    with pytest.raises(ValueError, match="config.json' is not there"):
        folders.load_codec(tmp_path)
    config = diffusers_config(image_config())
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="has no weights: none of"):
        folders.load_codec(tmp_path)
    interop.write_safetensors(tmp_path / WEIGHTS, {"a": np.zeros(2)})
    with pytest.raises(
        ValueError, match="is not an AutoencoderKL .*:\n  decoder.conv_in.bias: abs"
    ):
        folders.load_codec(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"_class_name": "VQModel"}))
    with pytest.raises(ValueError, match="is of 'VQModel'"):
        folders.load_codec(tmp_path)
    other = config | {"act_fn": "relu", "latents_mean": [0.0]}
    (tmp_path / "config.json").write_text(json.dumps(other))
    with pytest.raises(ValueError, match="act_fn is 'relu'"):
        folders.load_codec(tmp_path)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("block_out_channels", 64, "block_out_channels is 64"),
        ("block_out_channels", [8, None], r"block_out_channels\[1\] is None"),
        ("block_out_channels", [], r"widths is \(\)"),
        ("in_channels", 0, "in_channels is 0"),
        ("layers_per_block", None, "layers_per_block is None"),
        ("norm_num_groups", 1.5, "norm_num_groups is 1.5"),
        ("scaling_factor", None, "scaling_factor is None"),
        ("shift_factor", "0", "shift_factor is '0'"),
        ("use_quant_conv", None, "use_quant_conv is None"),
    ],
)
def test_a_config_with_odd_values_is_refused(name, value, said):
    config = diffusers_config(image_config())
    with pytest.raises(ValueError, match=said):
        folders.autoencoder_from_diffusers(config | {name: value})
