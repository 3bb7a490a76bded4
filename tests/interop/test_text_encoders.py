"""Text encoders beside ``transformers``': the same numbers of the same folders, and refusals."""

import copy
import json
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from dit_jax import interop
from dit_jax.interop.text_encoders import load_text_encoder
from dit_jax.text.t5 import T5EncoderConfig
from tests.interop.published import relative, torch
from tests.interop.text_folders import (
    CAPTIONS,
    CLIP_SIZES,
    T5_SIZES,
    needs_transformers,
    random_model,
    save,
    transformers,
)
from tests.text_files import needs_tokenizers, write_pairs, write_sentencepiece

pytestmark = [needs_transformers, needs_tokenizers]

TOLERANCE = 1e-4
"""Float32 in another order of summation; the issue's bound."""
BF16 = 2**-8
"""What rounding to bfloat16 moves a number by, at most, relative to itself."""


def tokens_and_mask(vocabulary, lengths=(9, 40, 1), seed=0):
    rng = np.random.default_rng(seed)
    mask = np.arange(max(lengths)) < np.array(lengths)[:, None]
    return np.where(mask, rng.integers(3, vocabulary, mask.shape), 0), mask


def ours(encoder, tokens, mask):
    states, pooled = jax.jit(encoder.apply)(
        encoder.params, jnp.asarray(tokens, jnp.int32), jnp.asarray(mask)
    )
    return np.asarray(states), None if pooled is None else np.asarray(pooled)


def theirs(model, tokens, mask, **given):
    with torch.no_grad():
        return model(torch.tensor(tokens), attention_mask=torch.tensor(mask).long(), **given)


@pytest.fixture(scope="module", params=["T5", "UMT5"])
def t5(request, tmp_path_factory):
    """A folder as ``transformers`` writes it, and the model in it."""
    folder = tmp_path_factory.mktemp("folders") / f"tiny-{request.param}"
    config = getattr(transformers, f"{request.param}Config")(
        **T5_SIZES, feed_forward_proj="gated-gelu"
    )
    model = random_model(f"{request.param}EncoderModel", config)
    save(model, folder)
    write_sentencepiece(folder)
    return folder, model


def test_t5_states_are_transformers(t5):
    folder, model = t5
    encoder = load_text_encoder(folder)
    tokens, mask = tokens_and_mask(160, (9, 200, 1))
    states, pooled = ours(encoder, tokens, mask)
    # Also where there is padding: those queries see the same keys.
    assert relative(states, theirs(model, tokens, mask).last_hidden_state) < TOLERANCE
    assert pooled is None and states.dtype == np.float32
    other, _ = ours(encoder, np.where(mask, tokens, 7), mask)
    assert relative(other[mask], states[mask]) < 1e-6
    assert relative(ours(encoder, tokens, mask | True)[0][0, :9], states[0, :9]) > 0.01


def test_captions_come_back_trimmed_in_their_order(t5):
    folder, model = t5
    encoder = load_text_encoder(folder, batch=4)
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
    with pytest.raises(ValueError, match="states of tokens and no vector of the whole"):
        encoder.pooled(CAPTIONS)
    short = load_text_encoder(folder, max_tokens=5).encode(CAPTIONS)
    assert [len(s) for s in short] == [min(len(s), 5) for s in found]


def test_few_shapes_are_compiled(t5):
    encoder = load_text_encoder(t5[0], batch=4)
    words = "a big red circle moves left ".split()
    encoder.encode([" ".join(words[:i] * 4) for i in range(6) for _ in range(3)])
    lengths = {16, 32, 64, 128}
    assert encoder._run._cache_size() <= len(lengths)


def test_bfloat16_is_close_and_kept_in_half(t5):
    folder, model = t5
    encoder = load_text_encoder(folder, dtype="bfloat16")
    kinds = jax.tree.map(lambda leaf: leaf.dtype, encoder.params["params"])
    assert kinds["blocks"]["q"]["kernel"] == kinds["tokens"]["embedding"] == jnp.bfloat16
    assert kinds["norm"]["scale"] == kinds["blocks"]["mlp_norm"]["scale"] == jnp.float32
    tokens, mask = tokens_and_mask(160)
    wanted = theirs(model, tokens, mask).last_hidden_state.numpy()
    half = copy.deepcopy(model).to(torch.bfloat16)
    both = ours(encoder, tokens, mask)[0], theirs(half, tokens, mask).last_hidden_state.float()
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
    refused("feed_forward_proj is 'relu'.*The first T5 has ReLUs", feed_forward_proj="relu")
    refused("d_model is 0", d_model=0)
    refused("no tokenizer in .*: none of tokenizer.json, spiece.model")
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
    with pytest.raises(ValueError, match="'penultimate' of .* before the last layer"):
        load_text_encoder(folder, layer="penultimate")
    with pytest.raises(ValueError, match="max_tokens is 1: .* takes at least 2"):
        load_text_encoder(folder, max_tokens=1)
    with pytest.raises(ValueError, match="batch is 0"):
        load_text_encoder(folder, batch=0)


def test_a_config_says_the_family():
    config = {"model_type": "umt5", "feed_forward_proj": "gated-gelu", "vocab_size": 256384}
    config |= {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}
    found = interop.t5_from_transformers(config, "in")
    assert found == T5EncoderConfig(vocabulary=256384, bias="layers")
    found = interop.t5_from_transformers(config | {"model_type": "t5", "vocab_size": 32128}, "in")
    assert found == T5EncoderConfig()


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    return folder, write_pairs(folder)


CLIPS = {
    "CLIP-L as published": ("CLIPTextModel", {"eos_token_id": 2}),
    "CLIP-L": ("CLIPTextModel", {}),
    "OpenCLIP": ("CLIPTextModelWithProjection", {"hidden_act": "gelu"}),
}


def clip_folder(folder, pairs, name, **changed):
    place, numbers = pairs
    folder.mkdir()
    for file in ("vocab.json", "merges.txt"):
        shutil.copy(place / file, folder)
    ends = {"bos_token_id": len(numbers) - 2, "eos_token_id": len(numbers) - 1}
    sizes = CLIP_SIZES | {"vocab_size": len(numbers)} | ends | changed
    model = random_model(name, transformers.CLIPTextConfig(**sizes))
    save(model, folder)
    return model, len(numbers)


@pytest.mark.parametrize("variant", CLIPS)
def test_clip_is_transformers(tmp_path, pairs, variant):
    name, changed = CLIPS[variant]
    model, count = clip_folder(tmp_path / "clip", pairs, name, **changed)
    encoder = load_text_encoder(tmp_path / "clip")
    before = load_text_encoder(tmp_path / "clip", layer="penultimate")
    assert before.hash == f"{encoder.hash}-penultimate"
    tokens, mask = tokens_and_mask(count - 2, (9, 77, 2))
    tokens[np.arange(3), [8, 76, 1]] = count - 1
    wanted = theirs(model, tokens, mask, output_hidden_states=True)
    vector = wanted.text_embeds if name.endswith("Projection") else wanted.pooler_output
    states, pooled = ours(encoder, tokens, mask)
    assert relative(states[mask], wanted.last_hidden_state[torch.tensor(mask)]) < TOLERANCE
    assert relative(pooled, vector) < TOLERANCE
    states, again = ours(before, tokens, mask)
    assert relative(states[mask], wanted.hidden_states[-2][torch.tensor(mask)]) < TOLERANCE
    np.testing.assert_array_equal(again, pooled)

    tokenizer = transformers.CLIPTokenizer.from_pretrained(tmp_path / "clip")
    found, vectors = encoder.encode(CAPTIONS), encoder.pooled(CAPTIONS)
    assert vectors.shape == (len(CAPTIONS), pooled.shape[1]) and vectors.dtype == np.float32
    for caption, states, one in zip(CAPTIONS, found, vectors, strict=True):
        ids = np.array([tokenizer(caption, truncation=True, max_length=77).input_ids])
        wanted = theirs(model, ids, ids >= 0)
        vector = wanted.text_embeds if name.endswith("Projection") else wanted.pooler_output
        assert relative(states, wanted.last_hidden_state[0]) < BF16 + TOLERANCE
        assert relative(one, vector[0]) < TOLERANCE
    with pytest.raises(ValueError, match="max_tokens is 78: .* at least 2 and at most 77"):
        load_text_encoder(tmp_path / "clip", max_tokens=78)


def test_both_halves_and_older_names_hold_the_same_text_transformer(tmp_path, pairs):
    model, _ = clip_folder(tmp_path / "one", pairs, "CLIPTextModelWithProjection")
    one = load_text_encoder(tmp_path / "one")
    sizes = {name: CLIP_SIZES[name] for name in CLIP_SIZES if name not in ("vocab_size",)}
    config = transformers.CLIPConfig(
        text_config=model.config.to_dict(),
        vision_config=sizes | {"image_size": 8, "patch_size": 4},
        projection_dim=16,
    )
    both = random_model("CLIPModel", config)
    both.load_state_dict(model.state_dict(), strict=False)
    shutil.copytree(tmp_path / "one", tmp_path / "both", ignore=shutil.ignore_patterns("model*"))
    save(both, tmp_path / "both")
    again = load_text_encoder(tmp_path / "both")
    jax.tree.map(np.testing.assert_array_equal, again.params, one.params)
    assert again.hash == one.hash

    # Of before transformers 4.31: places' numbers among the weights, and names with their prefix.
    plain, _ = clip_folder(tmp_path / "plain", pairs, "CLIPTextModel")
    found = load_text_encoder(tmp_path / "plain")
    state = {f"text_model.{key}": tensor.numpy() for key, tensor in plain.state_dict().items()}
    state["text_model.embeddings.position_ids"] = np.arange(77)[None]
    interop.write_safetensors(tmp_path / "plain" / "model.safetensors", state)
    older = load_text_encoder(tmp_path / "plain")
    jax.tree.map(np.testing.assert_array_equal, older.params, found.params)


def test_odd_configs_of_clip_are_refused():
    config = {"model_type": "clip_text_model", "architectures": ["CLIPTextModel"]}
    assert interop.clip_from_transformers(config, "in").width == 512
    with pytest.raises(ValueError, match="in is no text transformer of CLIP: model_type is 'blip'"):
        interop.clip_from_transformers(config | {"model_type": "blip"}, "in")
    with pytest.raises(ValueError, match="hidden_act 'relu', layer_norm_eps 1e-05"):
        interop.clip_from_transformers(config | {"hidden_act": "relu"}, "in")
    with pytest.raises(ValueError, match="hidden_size is 1.5"):
        interop.clip_from_transformers(config | {"hidden_size": 1.5}, "in")
