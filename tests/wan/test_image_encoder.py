"""The vision tower and its preprocessing beside ``transformers``': the same numbers, and refusals."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax.interop.safetensors_files import read_safetensors, write_safetensors
from dit_jax.parallel import MeshConfig, make_mesh
from dit_jax.wan.image_encoder import load_image_encoder, resize
from tests.interop.published import Lazy, needs, relative, torch
from tests.text.text_folders import needs_transformers, random_model, save, transformers

Image = Lazy("PIL.Image")
needs_pillow = needs("PIL")

SIZES = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=2,
    image_size=28,
    patch_size=7,
)
CLIP = {
    "do_center_crop": True,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "resample": 3,
    "rescale_factor": 0.00392156862745098,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "size": {"shortest_edge": 28},
    "crop_size": {"height": 28, "width": 28},
    "image_processor_type": "CLIPImageProcessor",
}


def picture(height, width, count=1, seed=0):
    """Smooth colours, hard edges and noise, which ring and clip when they are resized."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    waves = [128 + 127 * np.sin(x / (3 + i) + y / (5 + seed)) for i in range(3)]
    out = np.stack([np.stack(waves, -1)] * count)
    out[:, height // 4 : height // 2, width // 3 :] = rng.choice([0, 255], (count, 1, 1, 3))
    out[:, height // 2 :] += rng.normal(0, 40, out[:, height // 2 :].shape)
    return np.clip(out, 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def tower(request, tmp_path_factory):
    """A folder as ``transformers`` writes it, in a pipeline's folder, and the model in it."""
    act = getattr(request, "param", "gelu")
    pipeline = tmp_path_factory.mktemp("pipeline")
    config = transformers.CLIPVisionConfig(**SIZES, hidden_act=act)
    model = random_model("CLIPVisionModel", config)
    save(model, pipeline / "image_encoder")
    (pipeline / "image_processor").mkdir()
    (pipeline / "image_processor" / "preprocessor_config.json").write_text(json.dumps(CLIP))
    return pipeline / "image_encoder", model


def theirs(model, pixels):
    """Their states before the last layer, of preprocessed pictures."""
    with torch.no_grad():
        out = model(torch.tensor(np.moveaxis(pixels, -1, 1)), output_hidden_states=True)
    return out.hidden_states[-2].numpy()


@needs_transformers
@pytest.mark.parametrize("tower", ["gelu", "quick_gelu"], indirect=True)
def test_states_are_those_of_transformers(tower):
    folder, model = tower
    encoder = load_image_encoder(folder)
    states = encoder(picture(40, 64, 3))
    assert states.shape == (3, 17, 32) and states.dtype == np.float32
    wanted = theirs(model, encoder.preprocess(picture(40, 64, 3)))
    assert relative(states, wanted) < 1e-4
    # Not those of another layer.
    other = model(torch.zeros(1, 3, 28, 28), output_hidden_states=True).hidden_states
    assert len(other) == SIZES["num_hidden_layers"] + 1


@needs_transformers
@needs_pillow
@pytest.mark.parametrize("size", [(40, 64), (60, 30), (28, 28), (29, 400)])
def test_pictures_are_prepared_as_by_transformers(tower, size):
    processor = getattr(transformers, "CLIPImageProcessorPil", transformers.CLIPImageProcessor)
    images = picture(*size, 2)
    given = [Image.fromarray(image) for image in images]
    wanted = processor(**CLIP)(given, return_tensors="np")["pixel_values"]
    ours = load_image_encoder(tower[0]).preprocess(images)
    level = 1 / 255 / min(CLIP["image_std"])
    off = np.abs(ours - np.moveaxis(np.asarray(wanted), 1, -1))
    assert ours.dtype == np.float32 and off.max() < 1.01 * level
    assert np.mean(off > 1e-5) < 1e-3


@needs_pillow
def test_resizing_is_pillows():
    """Its weights are rounded to 22 bits, so that a number beside a half may differ by one. From Pillow
    13 on columns may be resized first, and so both axes are asked for one after the other."""
    counts = np.zeros(3, int)
    for size in ((480, 832), (100, 150), (333, 227)):
        image = picture(*size)
        short = min(size)
        height, width = (224 * side // short for side in size)
        rows = Image.fromarray(image[0]).resize((width, image.shape[1]), 3)
        theirs = np.asarray(rows.resize((width, height), 3))
        off = np.abs(resize(image, height, width)[0].astype(int) - theirs)
        counts += np.bincount(off.ravel(), minlength=3)[:3]
    assert counts[2] == 0 and counts[1] / counts.sum() < 1e-4


@needs_transformers
def test_a_mesh_and_half_precision_give_the_same_states(tower):
    folder, images = tower[0], picture(40, 64, 3)
    states = load_image_encoder(folder)(images)
    spread = load_image_encoder(folder, mesh=make_mesh(MeshConfig(2, 2, 1, 2)))
    kernel = spread.params["params"]["blocks"]["up"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape) == (3, 16, 24)
    assert relative(spread(images), states) < 1e-5
    half = load_image_encoder(folder, dtype="bfloat16")
    kinds = jax.tree.map(lambda leaf: leaf.dtype, half.params["params"]["blocks"]["q"])
    assert kinds == {"kernel": jnp.bfloat16, "bias": jnp.float32}
    assert 1e-5 < relative(half(images), states) < 0.05


@needs_transformers
def test_keys_are_known_by_both_names_and_no_others(tower, tmp_path):
    folder = tmp_path / "whole" / "encoder"
    shutil.copytree(tower[0], folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(CLIP | {"size": 28}))
    file = folder / "model.safetensors"
    arrays = {k: np.array(v) for k, v in read_safetensors(file).items()}
    bare = {key.removeprefix("vision_model."): value for key, value in arrays.items()}
    bare["embeddings.position_ids"] = np.arange(17)[None]
    images, states = picture(40, 64), load_image_encoder(tower[0])(picture(40, 64))

    def loaded(values):
        write_safetensors(file, values)
        return load_image_encoder(folder)(images)

    for prefix in ("", "vision_model."):
        named = {prefix + key: value for key, value in bare.items()}
        np.testing.assert_array_equal(loaded(named), states)
    # Of the last layer nothing is read, nor of what follows.
    short = {k: v for k, v in bare.items() if "layers.3." not in k and "post_" not in k}
    np.testing.assert_array_equal(loaded(short | {"visual_projection.weight": images[0]}), states)
    with pytest.raises(ValueError, match=r"encoder\.layers\.2\.mlp\.fc1\.bias: absent"):
        loaded({k: v for k, v in bare.items() if k != "encoder.layers.2.mlp.fc1.bias"})
    with pytest.raises(ValueError, match=r"encoder\.layers\.4\.mlp\.fc1\.bias"):
        loaded(bare | {"encoder.layers.4.mlp.fc1.bias": bare["encoder.layers.0.mlp.fc1.bias"]})


@needs_transformers
@pytest.mark.parametrize(
    ("file", "changes", "value"),
    [
        ("config.json", {"hidden_act": "relu"}, "relu"),
        ("config.json", {"model_type": "siglip_vision_model"}, "siglip"),
        ("config.json", {"patch_size": 5}, "patch_size=5"),
        ("config.json", {"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ("preprocessor_config.json", {"do_center_crop": False}, "do_center_crop is False"),
        ("preprocessor_config.json", {"resample": 2}, "resample is 2"),
        ("preprocessor_config.json", {"size": {"height": 28, "width": 28}}, "'height': 28"),
        ("preprocessor_config.json", {"crop_size": 32}, "crop_size is 32"),
        ("preprocessor_config.json", {"image_mean": [0.5]}, "image_mean is [0.5]"),
        ("preprocessor_config.json", None, "image_processor"),
    ],
)
def test_other_settings_are_refused(tower, tmp_path, file, changes, value):
    folder = tmp_path / "encoder"
    shutil.copytree(tower[0], folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(CLIP))
    values = json.loads((folder / file).read_text())
    (folder / file).unlink()
    if changes is not None:
        (folder / file).write_text(json.dumps(values | changes))
    with pytest.raises(ValueError) as caught:
        load_image_encoder(folder)
    assert value in str(caught.value)
