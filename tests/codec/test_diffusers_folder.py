"""AutoencoderKL beside Diffusers': the same numbers from the same files, and the files back."""

import json
import shutil

import jax
import numpy as np
import pytest
from einops import rearrange

from dit_jax import interop
from dit_jax.codec import folders
from dit_jax.codec.folders import OLD_ATTENTION
from tests.codecs import diffusers_config, image_config, noise
from tests.interop.published import diffusers, needs_diffusers, relative, torch

TOLERANCE = 1e-4
"""Float32 in another order of summation."""

WEIGHTS = "diffusion_pytorch_model.safetensors"


def random_autoencoder(**changed):
    torch.manual_seed(0)
    widths = changed.pop("block_out_channels", (8, 16))
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


def channels_first(clip):
    return torch.tensor(rearrange(clip, "t h w c -> t c h w"))


def channels_last(tensor):
    return rearrange(tensor.detach().numpy(), "t c h w -> t h w c")


@needs_diffusers
def test_encode_and_decode_are_diffusers(saved):
    folder, model = saved
    codec = folders.load_codec(folder)
    clip = noise(2, 8, 12, 3)
    with torch.no_grad():
        drawn_from = model.encode(channels_first(clip)).latent_dist
        latents = channels_last(drawn_from.mean) * 0.18215
        back = channels_last(model.decode(drawn_from.mean).sample)
    found = codec.encode(clip)
    assert found.shape == (2, 4, 6, 4) and found.dtype == np.float32
    assert relative(found, latents) < TOLERANCE
    assert relative(codec.decode(latents), back) < TOLERANCE
    std = np.exp(0.5 * channels_last(drawn_from.logvar)) * 0.18215
    normal = jax.random.normal(jax.random.key(1), latents.shape)
    assert relative(codec.encode(clip, jax.random.key(1)), latents + std * normal) < TOLERANCE


FLUX = {"use_quant_conv": False, "use_post_quant_conv": False, "latent_channels": 16}
FLUX |= {"shift_factor": 0.1159, "scaling_factor": 0.3611}
VARIANTS = {
    "flux": FLUX,
    "no attention": {"mid_block_add_attention": False},
    "one level": {"block_out_channels": (16,)},
    "four levels": {"block_out_channels": (8, 8, 16, 24)},
}
RARE = [pytest.param(name, marks=pytest.mark.slow) for name in VARIANTS if name != "flux"]


@needs_diffusers
@pytest.mark.parametrize("variant", ["flux", *RARE])
def test_variants_are_diffusers_too(tmp_path, variant):
    model = random_autoencoder(**VARIANTS[variant])
    model.save_pretrained(tmp_path)
    codec = folders.load_codec(tmp_path)
    clip = noise(1, 16, 16, 3)
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
    config = diffusers_config(codec.config)
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
def test_old_names_of_attention_are_read_and_written(saved, tmp_path):
    folder, model = saved
    state = old_names(model.state_dict())
    shutil.copy(folder / "config.json", tmp_path)
    torch.save(state, tmp_path / "diffusion_pytorch_model.bin")
    codec, new = folders.load_codec(tmp_path), folders.load_codec(folder)
    jax.tree.map(np.testing.assert_array_equal, codec.params, new.params)
    assert codec.hash == new.hash and len(codec.hash) == 16
    written = folders.autoencoder_map(codec.config, old_names=True).export(codec.params)
    assert set(written) == set(state)


def test_a_folder_that_is_none_is_said_to_be(tmp_path):
    with pytest.raises(ValueError, match="config.json' is not there"):
        folders.load_codec(tmp_path)
    config = diffusers_config(image_config())
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="has no weights: none of"):
        folders.load_codec(tmp_path)
    interop.write_safetensors(tmp_path / WEIGHTS, {"a": np.zeros(2)})
    with pytest.raises(ValueError, match="is not an AutoencoderKL .*:\n  decoder.conv_in.bias: a"):
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
        ("block_out_channels", [], r"widths is \(\)"),
        ("in_channels", 0, "in_channels is 0"),
        ("norm_num_groups", 1.5, "norm_num_groups is 1.5"),
        ("shift_factor", "0", "shift_factor is '0'"),
    ],
)
def test_a_config_with_odd_values_is_refused(name, value, said):
    config = diffusers_config(image_config())
    with pytest.raises(ValueError, match=said):
        folders.autoencoder_from_diffusers(config | {name: value})
