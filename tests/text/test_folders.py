"""Text encoders beside ``transformers``': the same numbers of the same folders, and refusals."""

import copy
import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from dit_jax import interop
from dit_jax.text import folders
from dit_jax.text.folders import load_text_encoder
from dit_jax.text.t5 import T5EncoderConfig
from tests.interop.published import relative, torch
from tests.text.text_folders import (
    CAPTIONS,
    T5_SIZES,
    needs_transformers,
    random_model,
    save,
    transformers,
)
from tests.text_files import needs_tokenizers, write_sentencepiece

pytestmark = [needs_transformers, needs_tokenizers]

TOLERANCE = 1e-4
"""Float32 in another order of summation."""
BF16 = 2**-8
"""What rounding to bfloat16 moves a number by, at most, relative to itself."""


def tokens_and_mask(vocabulary, lengths=(9, 40, 1), seed=0):
    rng = np.random.default_rng(seed)
    mask = np.arange(max(lengths)) < np.array(lengths)[:, None]
    return np.where(mask, rng.integers(3, vocabulary, mask.shape), 0), mask


def ours(encoder, tokens, mask):
    tokens, mask = jnp.asarray(tokens, jnp.int32), jnp.asarray(mask)
    return np.asarray(jax.jit(encoder.apply)(encoder.params, tokens, mask))


def theirs(model, tokens, mask, **given):
    with torch.no_grad():
        return model(torch.tensor(tokens), attention_mask=torch.tensor(mask).long(), **given)


@pytest.fixture(scope="module")
def t5(request, tmp_path_factory):
    """A folder as ``transformers`` writes it, and the model in it."""
    family = getattr(request, "param", "UMT5")
    folder = tmp_path_factory.mktemp("folders") / f"tiny-{family}"
    config = getattr(transformers, f"{family}Config")(**T5_SIZES, feed_forward_proj="gated-gelu")
    model = random_model(f"{family}EncoderModel", config)
    save(model, folder)
    write_sentencepiece(folder)
    return folder, model


@pytest.mark.parametrize("t5", ["T5", "UMT5"], indirect=True)
def test_t5_states_are_transformers(t5):
    folder, model = t5
    encoder = load_text_encoder(folder)
    tokens, mask = tokens_and_mask(160, (9, 200, 1))
    states = ours(encoder, tokens, mask)
    # Also where there is padding: those queries see the same keys.
    assert relative(states, theirs(model, tokens, mask).last_hidden_state) < TOLERANCE
    assert states.dtype == np.float32
    other = ours(encoder, np.where(mask, tokens, 7), mask)
    assert relative(other[mask], states[mask]) < 1e-6
    assert relative(ours(encoder, tokens, mask | True)[0, :9], states[0, :9]) > 0.01


def test_captions_come_back_trimmed_in_their_order(t5):
    folder, model = t5
    encoder = dataclasses.replace(load_text_encoder(folder), batch=4)
    tokenizer = transformers.T5Tokenizer.from_pretrained(folder)
    found = encoder.encode(CAPTIONS)
    for caption, states in zip(CAPTIONS, found, strict=True):
        ids = np.array([tokenizer(caption).input_ids])
        wanted = theirs(model, ids, ids > 0).last_hidden_state[0].numpy()
        assert states.dtype == ml_dtypes.bfloat16 and states.shape == wanted.shape
        assert relative(states, wanted) < BF16 + TOLERANCE
    assert (encoder.dim, encoder.max_tokens) == (24, 512)
    assert encoder.name == folder.name and len(encoder.hash) == 16
    assert encoder.encode([]) == []
    short = load_text_encoder(folder, max_tokens=5).encode(CAPTIONS)
    assert [len(s) for s in short] == [min(len(s), 5) for s in found]


def test_few_shapes_are_compiled(t5):
    shapes = []

    def apply(params, tokens, mask):
        shapes.append(tokens.shape)
        return jnp.zeros((*tokens.shape, 24))

    encoder = dataclasses.replace(load_text_encoder(t5[0]), batch=4, apply=apply)
    words = "a big red circle moves left ".split()
    states = encoder.encode([" ".join(words[:i] * 4) for i in range(6) for _ in range(3)])
    assert len({len(one) for one in states}) == 6
    assert len(shapes) < 5 and {*shapes} <= {(4, 16), (4, 32), (4, 64), (4, 128)}


def test_bfloat16_is_close_and_kept_in_half(t5):
    folder, model = t5
    encoder = load_text_encoder(folder, dtype="bfloat16")
    kinds = jax.tree.map(lambda leaf: leaf.dtype, encoder.params["params"])
    assert kinds["blocks"]["q"]["kernel"] == kinds["tokens"]["embedding"] == jnp.bfloat16
    assert kinds["norm"]["scale"] == kinds["blocks"]["mlp_norm"]["scale"] == jnp.float32
    tokens, mask = tokens_and_mask(160)
    wanted = theirs(model, tokens, mask).last_hidden_state.numpy()
    half = copy.deepcopy(model).to(torch.bfloat16)
    both = ours(encoder, tokens, mask), theirs(half, tokens, mask).last_hidden_state.float()
    off, off_of_theirs = (np.sqrt(np.mean((x - wanted)[mask] ** 2)) for x in map(np.asarray, both))
    # Our residual stream and softmax stay float32, so that less is lost than in theirs.
    assert 1e-4 < off < off_of_theirs < 0.2


def test_full_checkpoints_and_other_files_hold_the_same_encoder(t5, tmp_path):
    folder, model = t5
    first = load_text_encoder(folder)
    family = type(model).__name__.removesuffix("EncoderModel")
    config = transformers.AutoConfig.from_pretrained(folder)
    config.is_encoder_decoder = True
    full = random_model(f"{family}ForConditionalGeneration", config)
    full.load_state_dict(model.state_dict(), strict=False)
    state = full.state_dict() | {
        "encoder.embed_tokens.weight": full.shared.weight,
        "decoder.embed_tokens.weight": full.shared.weight,
        "lm_head.weight": full.lm_head.weight,
    }
    for place in ("sharded", "bin", "bins"):
        (tmp_path / place).mkdir()
        shutil.copy(folder / "spiece.model", tmp_path / place)
        shutil.copy(folder / "config.json", tmp_path / place)
    full.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("model-*.safetensors"))) > 2
    torch.save(state, tmp_path / "bin" / "pytorch_model.bin")
    placed = {key: f"part-{i % 2}.bin" for i, key in enumerate(state)}
    for part in ("part-0.bin", "part-1.bin"):
        of_part = {key: state[key] for key in state if placed[key] == part}
        torch.save(of_part, tmp_path / "bins" / part)
    index = tmp_path / "bins" / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": placed}))
    for place in ("sharded", "bin", "bins"):
        again = load_text_encoder(tmp_path / place)
        jax.tree.map(np.testing.assert_array_equal, again.params, first.params)
        assert again.hash == first.hash
    with torch.no_grad():
        state["encoder.embed_tokens.weight"] = state["encoder.embed_tokens.weight"] + 1
    torch.save(state, tmp_path / "bin" / "pytorch_model.bin")
    with pytest.raises(ValueError, match="embed_tokens.weight that is not equal to shared.weight"):
        load_text_encoder(tmp_path / "bin")
    index.write_text(json.dumps({"weight_map": placed | {"x": "part-0.bin"}}))
    with pytest.raises(ValueError, match="names 'x', which no shard has"):
        load_text_encoder(tmp_path / "bins")


def test_what_is_no_such_encoder_is_said_to_be(t5, tmp_path):
    folder, model = t5
    with pytest.raises(ValueError, match="config.json' is not there"):
        load_text_encoder(tmp_path)
    values = json.loads((folder / "config.json").read_text())

    def refused(message, **changed):
        (tmp_path / "config.json").write_text(json.dumps(values | changed))
        with pytest.raises(ValueError, match=message):
            load_text_encoder(tmp_path)

    refused("no encoder of T5 v1.1 or UMT5: model_type is 'bert'", model_type="bert")
    refused("feed_forward_proj is 'relu'", feed_forward_proj="relu")
    refused("d_model is 0", d_model=0)
    refused("no tokenizer in ")
    shutil.copy(folder / "spiece.model", tmp_path)
    refused("has no weights: none of model.safetensors, model.safetensors.index.json")
    state = {key: tensor.numpy() for key, tensor in model.state_dict().items()}
    state.pop("encoder.embed_tokens.weight", None)
    state.pop("encoder.final_layer_norm.weight")
    state["encoder.block.0.adapter.weight"] = np.zeros((2, 2), np.float32)
    interop.write_safetensors(tmp_path / "model.safetensors", state)
    refused(
        r"(?s)is not an encoder of .*:\n  encoder.final_layer_norm.weight: absent\n"
        r"  encoder.block.0.adapter.weight: \(2, 2\), which an encoder of .* does not have"
    )
    refused("wi_0.weight: shape \\(40, 24\\), wanted \\(48, 24\\)", d_ff=48)
    with pytest.raises(ValueError, match="max_tokens is 1"):
        load_text_encoder(folder, max_tokens=1)


def test_a_config_says_the_family():
    config = {"model_type": "umt5", "feed_forward_proj": "gated-gelu", "vocab_size": 256384}
    config |= {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}
    found = folders.t5_from_transformers(config, "in")
    assert found == T5EncoderConfig(vocabulary=256384, bias="layers")
    found = folders.t5_from_transformers(config | {"model_type": "t5", "vocab_size": 32128}, "in")
    assert found == T5EncoderConfig()
