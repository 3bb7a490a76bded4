"""Models that read an encoder's states: from records, from captions, and from prompts at sampling."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds
from flax import linen as nn

from dit_jax import sample
from dit_jax.config import VideoRun, from_dict, to_dict
from dit_jax.data import (
    MixedSetConfig,
    MixtureConfig,
    PackingConfig,
    RecordsConfig,
    RecordsSource,
)
from dit_jax.evaluate import __main__ as evaluate
from dit_jax.model import TextStatesConfig
from dit_jax.parallel import MeshConfig, make_mesh
from dit_jax.prepare.chat import ChatClient, ChatConfig
from dit_jax.prepare.upsample import upsample
from dit_jax.prepare.writing import StatesOf, write_records
from dit_jax.sampling import Request
from dit_jax.sampling.media import read_video
from dit_jax.sampling.pipeline import load_run
from dit_jax.text.config import TextEncoderConfig
from dit_jax.text.encoder import StatesEncoder
from dit_jax.text.folders import load_text_encoder, text_encoder_identity
from dit_jax.text.t5 import T5EncoderConfig
from dit_jax.train import FIXED, MAY_CHANGE, check_same
from dit_jax.training import CheckpointConfig, Checkpointer
from dit_jax.training.video_task import (
    eval_requests,
    init_params,
    make_model,
    prompt_length,
    with_states,
)
from tests import tiny_config
from tests.prepare.chat_server import Response, serving
from tests.scripts import load_script
from tests.text_files import TINY, needs_tokenizers, write_t5

pytestmark = needs_tokenizers

ROOMY = PackingConfig(row_text=10_000)
PROMPTS = ["a big red circle moves left", "a small green cross moves up", ""]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_t5(tmp_path_factory.mktemp("encoders") / "tiny-umt5")


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """The same sizes and other weights."""
    return write_t5(tmp_path_factory.mktemp("others") / "tiny-umt5", seed=1)


@pytest.fixture(scope="module")
def encoder(folder) -> StatesEncoder:
    return load_text_encoder(folder)


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig(1, 1, 1, 1), jax.devices()[:1])


@pytest.fixture(scope="module")
def captioned(folder) -> VideoRun:
    """Moving shapes, whose captions are encoded as they are read."""
    tiny = tiny_config.get_config()
    text = TextStatesConfig(encoder="tiny-umt5", dim=TINY.width, max_tokens=24)
    return dataclasses.replace(
        tiny,
        model=dataclasses.replace(tiny.model, text=text),
        text_encoder=TextEncoderConfig(str(folder)),
        evaluators=(),  # which measure moving shapes
    )


def clips(encoder: StatesEncoder):
    rng = np.random.default_rng(0)
    for caption, states in zip(PROMPTS, encoder.encode(PROMPTS), strict=True):
        video = rng.integers(0, 256, (3, 24, 24, 3), np.uint8)
        yield {"video": video, "caption": caption, "fps": 8.0, "text_states": states}


@pytest.fixture(scope="module")
def states(tmp_path_factory, encoder):
    """The directory of records with states."""
    of = StatesOf(encoder.dim, encoder.hash, encoder.name)
    root = tmp_path_factory.mktemp("states")
    splits = {"train": clips(encoder)}
    return str(write_records(root, "clips", splits, description="d", text_states=of))


@pytest.fixture(scope="module")
def recorded(captioned, states) -> VideoRun:
    """The config of a run on records with states."""
    source = RecordsConfig(states, text_states_key="text_states")
    data = dataclasses.replace(captioned.data, source=source)
    return dataclasses.replace(
        captioned, data=data, text_encoder=TextEncoderConfig(), evaluators=()
    )


def test_states_are_stored_in_half_and_say_their_encoder(states, encoder):
    builder = tfds.builder_from_directory(states)
    assert builder.info.features["text_states"].shape == (None, 8)
    assert builder.info.features["text_states"].np_dtype == "bfloat16"
    assert builder.info.metadata == {"text_encoder": encoder.hash, "text_encoder_name": "tiny-umt5"}
    source = RecordsSource(RecordsConfig(states, text_states_key="text_states"))
    assert (source.text_encoder, source.text_encoder_name) == (encoder.hash, "tiny-umt5")
    for i, wanted in enumerate(encoder.encode(PROMPTS)):
        found = source[i]["text_states"]
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, wanted.astype(np.float32))


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (None, r"is object \[\]: those of 'x' are float \[s, 8\]"),
        (np.zeros((2, 7), np.float32), r"is float32 \[2, 7\]"),
        (np.full((1, 8), np.inf, np.float32), "not finite"),
    ],
)
def test_states_that_do_not_fit_are_refused(tmp_path, encoder, value, said):
    bad = {**next(clips(encoder)), "text_states": value}
    given = {"description": "d", "text_states": StatesOf(8, "h", "x")}
    with pytest.raises(ValueError, match=f"text_states of sample 0 of split 'train' .*{said}"):
        write_records(tmp_path, "clips", {"train": [bad]}, **given)


def test_a_run_records_whose_states_it_reads(recorded, captioned, encoder, folder, other):
    assert text_encoder_identity(folder) == ("tiny-umt5", encoder.hash)
    for config in (recorded, captioned):
        known = config.with_hashes()
        assert known.text_encoder.hash == encoder.hash
        assert known.with_hashes() == known
        assert from_dict(VideoRun, json.loads(json.dumps(to_dict(known)))) == known
    assert tiny_config.get_config().with_hashes() == tiny_config.get_config()

    def refused(config, message, **changed):
        given = dataclasses.replace(config.text_encoder, **changed)
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(config, text_encoder=given).with_hashes()

    made = r"the states of .* were made by the encoder 'tiny-umt5' \(\w{16}\), and the model reads"
    refused(recorded, rf"{made} states of 'tiny-umt5' \(other\): give the one", hash="other")
    refused(recorded, "text_encoder.path .* is the encoder 'tiny-umt5'", path=str(other))
    refused(captioned, "config.json' is not there", path=str(folder.parent))
    text = dataclasses.replace(recorded.model.text, encoder="umt5-xxl")
    named = dataclasses.replace(recorded, model=dataclasses.replace(recorded.model, text=text))
    refused(named, rf"{made} states of 'umt5-xxl' \(no hash\)")


def test_a_resumed_run_keeps_its_encoder(captioned):
    known = captioned.with_hashes()
    again = dataclasses.replace(known.text_encoder, path="elsewhere")
    rules = (known, FIXED, MAY_CHANGE, "a run", "give another")
    check_same(dataclasses.replace(known, text_encoder=again), *rules)
    changed = dataclasses.replace(known.text_encoder, hash="other")
    with pytest.raises(ValueError, match="text_encoder.hash = "):
        check_same(dataclasses.replace(known, text_encoder=changed), *rules)


def test_a_path_without_a_model_that_reads_states_is_refused(folder):
    with pytest.raises(ValueError, match="text_encoder.path is .* the model reads no states"):
        dataclasses.replace(VideoRun(), text_encoder=TextEncoderConfig(str(folder)))


def first_batch(config, mesh):
    task = config.build(mesh)
    loader = task.loader(tuple(range(task.rows)))
    batch = next(loader)
    loader.close()
    return batch


def test_batches_hold_the_states_of_captions(captioned, recorded, encoder, mesh):
    batch = first_batch(captioned, mesh)
    source = captioned.data.source
    captions = {source[i]["caption"] for i in range(len(source))}
    known = [s.astype(np.float32) for s in encoder.encode(sorted(captions))]
    assert matches(batch, known) > 8
    batch = first_batch(recorded, mesh)
    *known, _ = [s.astype(np.float32) for s in encoder.encode(PROMPTS)]
    # An empty caption is one that was dropped, and not what the encoder makes of no text.
    assert matches(batch, [*known, np.zeros((0, 8), np.float32)]) > 2


def test_sets_with_and_without_states_are_mixed_where_an_encoder_is_given(
    recorded, captioned, states, encoder, mesh
):
    with_them, without = {"text_states_key": "text_states"}, {"captioned": False}
    sets = [MixedSetConfig(states, **given) for given in (with_them, {}, without)]
    sets.append(MixedSetConfig(states, **without, weight=1e4))

    def of(config, *chosen):
        source = MixtureConfig(tuple(sets[i] for i in chosen))
        data = dataclasses.replace(config.data, source=source)
        return dataclasses.replace(config, data=data, evaluators=())

    *known, _ = [s.astype(np.float32) for s in encoder.encode(PROMPTS)]
    none = np.zeros((0, 8), np.float32)
    batch = first_batch(of(captioned, 0, 1, 2), mesh)
    assert matches(batch, [*known, none]) > 4
    # What is encoded is still mixed by weight.
    assert matches(first_batch(of(captioned, 1, 3), mesh), [none]) > 4
    assert of(captioned, 1, 0).with_hashes().text_encoder.hash == encoder.hash
    with pytest.raises(ValueError, match="has none: name a feature"):
        of(recorded, 0, 1).build(mesh)
    bare = first_batch(of(recorded, 2), mesh)
    assert matches(bare, [none]) > 2
    mixed = of(recorded, 2, 0)
    assert mixed.with_hashes().text_encoder.hash == encoder.hash
    assert [one.prompt for one in eval_requests(mixed, None, 8)[0]] == PROMPTS
    other = dataclasses.replace(mixed, text_encoder=TextEncoderConfig(hash="other"))
    with pytest.raises(ValueError, match="were made by the encoder"):
        other.with_hashes()


def test_prompts_are_counted_in_the_tokens_that_the_encoder_reads(captioned, recorded, encoder):
    counted = prompt_length(captioned)
    assert counted is not None
    length, limit = counted
    text = " ".join(["a big red circle moves left."] * 30)
    assert limit == captioned.model.text.max_tokens - 1 == 23
    assert length(PROMPTS[0]) == len(encoder.tokenize(PROMPTS[0])) and length("") == 1
    assert length(text) > len(encoder.tokenize(text)) - 1  # Not cut there.
    wide = dataclasses.replace(captioned.model.text, max_tokens=10_000)
    model = dataclasses.replace(captioned.model, text=wide)
    whole = dataclasses.replace(
        captioned, model=model, data=dataclasses.replace(captioned.data, packing=ROOMY)
    )
    assert prompt_length(whole)[1] == encoder.max_tokens == 512
    assert prompt_length(recorded) is None
    counted = prompt_length(tiny_config.get_config())
    assert counted is not None and counted[0]("\u00e9a") == 3 and counted[1] == 47
    sentences = "A big red circle moves left. A small green cross moves up. A blue square moves."
    with serving(lambda body, turn: Response(sentences)) as server:
        client = ChatClient(ChatConfig(server.url, "seer"))
        kept = sentences[: sentences.rindex(" A ")]
        assert length(kept) < length(sentences)
        given = {"limit": length(kept), "length": length, "of_word": 2}
        (found,) = upsample(["a circle"], client, **given)
        asked = server.bodies[0]["messages"][0]["content"]
    assert found.text == kept and f"at most {max(length(kept) // 2, 3)} words" in asked


def matches(batch, known) -> int:
    """How many segments there are, all of which have one of the known states after a beginning."""
    found = 0
    for row, slot in np.ndindex(batch.num_tokens.shape):
        if batch.num_tokens[row, slot]:
            text = batch.text[row][batch.text_segment_ids[row] == slot + 1]
            assert not text[0].any()
            # Encoded in other company, a state is another sum, and may round to its neighbour.
            close = [
                len(s[:23]) == len(text) - 1
                and np.allclose(s[:23], text[1:], rtol=2**-7, atol=2**-7)
                for s in known
            ]
            assert any(close)
            found += 1
    return found


def test_states_of_another_width_or_encoder_are_refused(captioned, recorded, mesh):
    text = dataclasses.replace(captioned.model.text, dim=7)
    wide = dataclasses.replace(captioned, model=dataclasses.replace(captioned.model, text=text))
    with pytest.raises(ValueError, match="makes states of 8 numbers, and the model reads 7"):
        wide.build(mesh)
    given = TextEncoderConfig(hash="other")
    with pytest.raises(ValueError, match="were made by the encoder 'tiny-umt5'"):
        dataclasses.replace(recorded, text_encoder=given).with_hashes()


@pytest.mark.parametrize(
    ("axes", "bias"),
    [((2, 1, 2, 2), "layers"), pytest.param((1, 4, 2, 1), "shared", marks=pytest.mark.slow)],
)
def test_spread_over_eight_devices_is_one_device(tmp_path, axes, bias):
    config = T5EncoderConfig(
        vocabulary=64, width=16, depth=2, heads=2, head_dim=4, hidden=16, bias=bias
    )
    folder = write_t5(tmp_path / "t5", config)
    spread = load_text_encoder(folder, mesh=make_mesh(MeshConfig(*axes), jax.devices()))
    kernel = spread.params["params"]["blocks"]["gate"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape) == (
        2,
        16 // (axes[1] * axes[2]),
        16 // axes[3],
    )
    alone = load_text_encoder(folder)
    assert spread.hash == alone.hash
    for one, many in zip(alone.encode(PROMPTS), spread.encode(PROMPTS), strict=True):
        # Float32 in another order, and then rounded: to a neighbour at most.
        np.testing.assert_allclose(
            one.astype(np.float32), many.astype(np.float32), rtol=2**-7, atol=1e-5
        )


def test_requests_get_states_once_and_keep_those_they_have(encoder):
    given = np.ones((2, 8), np.float32)
    requests = [Request(prompt, 1, 8, 8, 8.0, 0) for prompt in [*PROMPTS, PROMPTS[0]]]
    requests.append(Request("kept", 1, 8, 8, 8.0, 0, given))
    found = with_states(requests, encoder)
    for request, wanted in zip(found, encoder.encode([*PROMPTS, PROMPTS[0]]), strict=False):
        np.testing.assert_array_equal(request.text_states, wanted)
    assert found[-1].text_states is given
    assert with_states(requests, None) == requests


@pytest.fixture(scope="module")
def run(tmp_path_factory, captioned, mesh):
    """A run's directory, with fresh weights."""
    directory = tmp_path_factory.mktemp("runs") / "run"
    config = captioned.with_hashes()
    model = make_model(config.model, mesh)
    params = nn.unbox(jax.jit(lambda key: init_params(model, key))(jax.random.key(0)))
    # Fresh, the model would say zero whatever it reads.
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: x + 0.1 * rng.normal(size=x.shape).astype(np.float32), params)
    checkpointer = Checkpointer(directory, CheckpointConfig())
    checkpointer.save_weights(params, to_dict(config))
    checkpointer.wait()
    checkpointer.close()
    (directory / "config.json").write_text(json.dumps(to_dict(config)))
    return directory


def made(run, output, *arguments) -> int:
    given = ["--checkpoint", run, "--output", output, "--steps", 2, *arguments]
    return sample.main([str(one) for one in given])


def test_prompts_become_clips(run, folder, tmp_path):
    images = []
    for i, prompt in enumerate(PROMPTS[:2]):
        output = tmp_path / f"{i}.png"
        assert made(run, output, "--prompt", prompt) == 0
        images.append(read_video(output)[0].astype(int))
    assert images[0].shape == (1, 24, 5 * 24, 3)
    assert np.abs(images[0] - images[1]).max() > 4


def test_prompts_become_samples_to_measure(run, encoder, tmp_path):
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS[:2]))
    arguments = ["--checkpoint", run, "--prompts-file", tmp_path / "prompts.txt", "--num", 3]
    arguments += ["--output", tmp_path, "--sampling.frames", 1, "--sampling.steps", 1]
    assert evaluate.main([str(one) for one in arguments]) == 0
    with np.load(tmp_path / "samples.npz") as samples:
        assert samples["arr_0"].shape == (3, 24, 24, 3)
    (plan,) = [p for p in tmp_path.rglob("*.json") if encoder.hash in p.read_text()]
    assert json.loads(plan.read_text())["text_encoder"] == encoder.hash


def test_other_encoders_are_refused_at_sampling(run, folder, other, tmp_path, capsys, captioned):
    output = tmp_path / "clip.png"
    arguments = ["--prompt", PROMPTS[0], "--text-encoder"]
    assert made(run, output, *arguments, other) == 2
    said = capsys.readouterr().err
    assert f"text_encoder.path {str(other)!r} is the encoder 'tiny-umt5'" in said
    assert "give the one that it is trained on" in said
    assert made(run, output, *arguments, tmp_path) == 2
    assert "config.json' is not there" in capsys.readouterr().err
    assert not output.exists()
    config = dataclasses.replace(captioned, text_encoder=TextEncoderConfig())
    checkpointer = Checkpointer(tmp_path / "bare", CheckpointConfig())
    checkpointer.save_weights({"x": np.zeros(1)}, to_dict(config))
    checkpointer.wait()
    checkpointer.close()
    with pytest.raises(ValueError, match="reads prompts as states of 'tiny-umt5': give --text-en"):
        load_run(tmp_path / "bare")


def test_the_script_adds_states_to_records(tmp_path, encoder, folder, monkeypatch, capsys):
    script = load_script("scripts", "captions_to_states")
    monkeypatch.setattr(script, "CHUNK", 2)
    plain = write_records(
        tmp_path,
        "latents",
        {"train": [{**clip, "video": clip["video"] / 99, "kind": 1} for clip in clips(encoder)]},
        description="d",
        labels=["kind"],
        latents=(3, "codec"),
    )
    arguments = ["--input", plain, "--encoder", folder, "--output", tmp_path / "out"]
    monkeypatch.setattr("sys.argv", ["", *map(str, arguments), "--label-key", "kind"])
    script.main()
    written = capsys.readouterr().out.splitlines()[-1]
    assert written == str(tmp_path / "out" / "latents_states" / "1.0.0")
    found = RecordsSource(RecordsConfig(written, text_states_key="text_states", label_key="label"))
    before = RecordsSource(RecordsConfig(str(plain)))
    assert (found.codec, found.text_encoder) == ("codec", encoder.hash)
    for i, wanted in enumerate(encoder.encode(PROMPTS)):
        assert found[i]["caption"] == PROMPTS[i] and found[i]["segment_fields"] == {"label": 1}
        np.testing.assert_array_equal(found[i]["video"], before[i]["video"])
        # Encoded in other company, by eight devices: a state may round to its neighbour.
        np.testing.assert_allclose(
            found[i]["text_states"], wanted.astype(np.float32), rtol=2**-7, atol=1e-5
        )
