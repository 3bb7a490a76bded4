"""Folders of Wan pipelines as Diffusers writes them: their structure, tiny sizes, random weights."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from tests.interop.published import diffusers, torch
from tests.text.text_folders import T5_SIZES, random_model, transformers
from tests.text_files import write_sentencepiece

KINDS = ("2.1-t2v", "2.1-i2v", "2.2-ti2v", "2.2-t2v-a14b", "2.2-i2v-a14b")
HEADS, HEAD_DIM, LAYERS = 2, 24, 2
TEXT_DIM = T5_SIZES["d_model"]
IMAGE_DIM = 16


def latent_channels(kind: str) -> int:
    """Of the codec: only TI2V-5B has Wan 2.2's own."""
    return 48 if kind == "2.2-ti2v" else 16


def transformer(kind: str, seed: int) -> Any:
    """A ``WanTransformer3DModel`` in the layout of a kind."""
    torch.manual_seed(seed)
    image, channels = kind == "2.1-i2v", latent_channels(kind)
    model = diffusers.WanTransformer3DModel(
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        # Beside the noise: four channels of a mask, and the latents of the given frames.
        in_channels=2 * channels + 4 if "-i2v" in kind else channels,
        out_channels=channels,
        text_dim=TEXT_DIM,
        ffn_dim=80,
        num_layers=LAYERS,
        image_dim=IMAGE_DIM if image else None,
        added_kv_proj_dim=HEADS * HEAD_DIM if image else None,
    ).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Larger than at initialisation, so that every branch is seen in the output.
            scale = 0.3 if "table" in name else 1.5
            parameter.mul_(scale).add_(0.02 * torch.randn_like(parameter))
    return model


def autoencoder(kind: str) -> Any:
    """An ``AutoencoderKLWan``: 4 x 8 x 8 of Wan 2.1, or 4 x 16 x 16 of Wan 2.2's TI2V-5B."""
    torch.manual_seed(1)
    channels = latent_channels(kind)
    sizes: dict[str, Any] = dict(base_dim=8, z_dim=channels, num_res_blocks=1)
    sizes |= dict(dim_mult=[1, 2, 2, 2], latents_mean=[0.1 * (i % 5 - 2) for i in range(channels)])
    sizes |= dict(latents_std=[1.0 + 0.1 * (i % 3) for i in range(channels)])
    if kind == "2.2-ti2v":
        sizes |= dict(is_residual=True, patch_size=2, in_channels=12, out_channels=12)
        sizes |= dict(temperal_downsample=[False, True, True], scale_factor_spatial=16)
    model = diffusers.AutoencoderKLWan(**sizes).eval()
    for name, value in model.named_parameters():
        if name.endswith("gamma"):
            torch.nn.init.uniform_(value, 0.5, 1.5)
    return model


def write_pipeline(folder: Path, kind: str = "2.1-t2v") -> Path:
    """Builds the pipeline of a kind and saves it as Diffusers does."""
    write_sentencepiece(folder / "pieces")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tokenizer = transformers.T5Tokenizer.from_pretrained(folder / "pieces")
    sizes = T5_SIZES | {"vocab_size": 256}
    umt5 = transformers.UMT5Config(feed_forward_proj="gated-gelu", **sizes)
    parts: dict[str, Any] = dict(
        tokenizer=tokenizer,
        text_encoder=random_model("UMT5EncoderModel", umt5),
        vae=autoencoder(kind),
        transformer=transformer(kind, 0),
        scheduler=diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
    )
    if kind == "2.2-ti2v":
        parts |= {"expand_timesteps": True}
    if kind.endswith("a14b"):
        parts |= {
            "transformer_2": transformer(kind, 2),
            "boundary_ratio": 0.9 if "-i2v" in kind else 0.875,
        }
    if kind == "2.1-i2v":
        vision = transformers.CLIPVisionConfig(
            hidden_size=IMAGE_DIM,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=28,
            patch_size=14,
        )
        parts["image_encoder"] = random_model("CLIPVisionModel", vision)
        size = {"shortest_edge": 28}
        parts["image_processor"] = transformers.CLIPImageProcessor(size=size, crop_size=28)
    elif "-i2v" in kind:
        parts |= {"image_encoder": None, "image_processor": None}
    name = "WanImageToVideoPipeline" if "image_encoder" in parts else "WanPipeline"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        getattr(diffusers, name)(**parts).save_pretrained(folder)
    for file in (folder / "pieces").iterdir():
        file.unlink()
    (folder / "pieces").rmdir()
    return folder
