"""Models that read an encoder's states: from records, from captions, and from prompts at sampling."""

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds
from flax import linen as nn

from dit_jax import sample
from dit_jax.config import VideoRun, from_dict, to_dict
from dit_jax.convert import write_run
from dit_jax.data import (
    MixedSetConfig,
    MixtureConfig,
    RecordsConfig,
    RecordsSource,
)
from dit_jax.evaluate import __main__ as evaluate
from dit_jax.model import TextStatesConfig
from dit_jax.parallel import MeshConfig, make_mesh
from dit_jax.prepare.writing import StatesOf, write_records
from dit_jax.sampling import Request
from dit_jax.sampling.media import read_video
from dit_jax.sampling.pipeline import load_run
from dit_jax.text.config import TextEncoderConfig
from dit_jax.text.encoder import StatesEncoder
from dit_jax.text.folders import load_text_encoder, text_encoder_identity
from dit_jax.train import FIXED, MAY_CHANGE, check_same
from dit_jax.training.video_task import (
    eval_requests,
    init_params,
    make_model,
    prompt_length,
    with_states,
)
from tests import tiny_config
from tests.scripts import load_script
from tests.text_files import TINY, needs_tokenizers, write_t5

pytestmark = needs_tokenizers

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


def with_text(config: VideoRun, **fields) -> VideoRun:
    """With other settings of the model's text; rows hold as much of it as they say."""
    text = dataclasses.replace(config.model.text, **fields)
    packing = dataclasses.replace(config.data.packing, row_text=max(96, text.max_tokens))
    data = dataclasses.replace(config.data, packing=packing)
    model = dataclasses.replace(config.model, text=text)
    return dataclasses.replace(config, model=model, data=data)


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
    return dataclasses.replace(captioned, data=data, text_encoder=TextEncoderConfig())


def test_states_are_stored_in_half_and_say_their_encoder(states, encoder):
    feature = tfds.builder_from_directory(states).info.features["text_states"]
    assert (feature.shape, feature.np_dtype) == ((None, 8), "bfloat16")
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
    of = StatesOf(8, "h", "x")
    with pytest.raises(ValueError, match=f"text_states of sample 0 of split 'train' .*{said}"):
        write_records(tmp_path, "clips", {"train": [bad]}, description="d", text_states=of)


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
    named = with_text(recorded, encoder="umt5-xxl")
    refused(named, rf"{made} states of 'umt5-xxl' \(no hash\)")


def test_a_resumed_run_keeps_its_encoder(captioned):
    known = captioned.with_hashes()
    again = dataclasses.replace(known.text_encoder, path="elsewhere")
    rules = (known, FIXED, MAY_CHANGE, "a run", "give another")
    check_same(dataclasses.replace(known, text_encoder=again), *rules)
    changed = dataclasses.replace(known.text_encoder, hash="other")
    with pytest.raises(ValueError, match="text_encoder.hash = "):
        check_same(dataclasses.replace(known, text_encoder=changed), *rules)
    with pytest.raises(ValueError, match="text_encoder.path is .* the model reads no states"):
        dataclasses.replace(VideoRun(), text_encoder=known.text_encoder)


def first_batch(config, mesh):
    task = config.build(mesh)
    loader = task.loader(tuple(range(task.rows)))
    batch = next(loader)
    loader.close()
    return batch


def test_batches_hold_the_states_of_captions(captioned, encoder, mesh):
    batch = first_batch(captioned, mesh)
    source = captioned.data.source
    captions = {source[i]["caption"] for i in range(len(source))}
    known = [s.astype(np.float32) for s in encoder.encode(sorted(captions))]
    assert matches(batch, known) > 8


def test_sets_with_and_without_states_are_mixed_where_an_encoder_is_given(
    recorded, captioned, states, encoder, mesh
):
    with_them, without = {"text_states_key": "text_states"}, {"captioned": False}
    sets = [MixedSetConfig(states, **given) for given in (with_them, {}, without)]
    sets.append(MixedSetConfig(states, **without, weight=1e4))

    def of(config, *chosen):
        source = MixtureConfig(tuple(sets[i] for i in chosen))
        data = dataclasses.replace(config.data, source=source)
        return dataclasses.replace(config, data=data)

    *known, _ = [s.astype(np.float32) for s in encoder.encode(PROMPTS)]
    none = np.zeros((0, 8), np.float32)
    # An empty caption is one that was dropped, and not what the encoder makes of no text.
    assert matches(first_batch(of(captioned, 0, 1, 2), mesh), [*known, none]) > 4
    # What is encoded is still mixed by weight.
    assert matches(first_batch(of(captioned, 1, 3), mesh), [none]) > 4
    assert of(captioned, 1, 0).with_hashes().text_encoder.hash == encoder.hash
    with pytest.raises(ValueError, match="has none: name a feature"):
        of(recorded, 0, 1).build(mesh)
    mixed = of(recorded, 2, 0)
    assert matches(first_batch(mixed, mesh), [*known, none]) > 2
    assert mixed.with_hashes().text_encoder.hash == encoder.hash
    assert [one.prompt for one in eval_requests(mixed, None, 8)[0]] == PROMPTS


def test_prompts_are_counted_in_the_tokens_that_the_encoder_reads(captioned, recorded, encoder):
    length, limit = prompt_length(captioned)
    text = " ".join(["a big red circle moves left."] * 30)
    assert limit == captioned.model.text.max_tokens - 1 == 23
    assert length(PROMPTS[0]) == len(encoder.tokenize(PROMPTS[0])) and length("") == 1
    assert length(text) > len(encoder.tokenize(text)) - 1  # Not cut there.
    whole = with_text(captioned, max_tokens=10_000)
    assert prompt_length(whole)[1] == encoder.max_tokens == 512
    assert prompt_length(recorded) is None
    length, limit = prompt_length(tiny_config.get_config())
    assert length("\u00e9a") == 3 and limit == 47


def matches(batch, known) -> int:
    """How many segments there are, all of which have one of the known states after a beginning."""
    found = 0
    for row, slot in np.ndindex(batch.num_tokens.shape):
        if batch.num_tokens[row, slot]:
            text = batch.text[row][batch.text_segment_ids[row] == slot + 1]
            assert not text[0].any()
            # Encoded in other company, a state is another sum, and may round to its neighbour.
            near = functools.partial(np.allclose, text[1:], rtol=2**-7, atol=2**-7)
            assert any(len(s) == len(text) - 1 and near(s) for s in (s[:23] for s in known))
            found += 1
    return found


def test_states_of_another_width_are_refused(captioned, mesh):
    with pytest.raises(ValueError, match="makes states of 8 numbers, and the model reads 7"):
        with_text(captioned, dim=7).build(mesh)


@pytest.mark.parametrize(
    ("axes", "bias"),
    [((1, 2, 1, 2), "layers"), pytest.param((2, 1, 2, 2), "shared", marks=pytest.mark.slow)],
)
def test_spread_over_devices_is_one_device(tmp_path, axes, bias):
    folder = write_t5(tmp_path / "t5", dataclasses.replace(TINY, width=16, bias=bias))
    mesh = make_mesh(MeshConfig(*axes), jax.devices()[: np.prod(axes)])
    spread = load_text_encoder(folder, mesh=mesh)
    kernel = spread.params["params"]["blocks"]["gate"]["kernel"]
    part = (2, 16 // (axes[1] * axes[2]), 16 // axes[3])
    assert kernel.sharding.shard_shape(kernel.shape) == part
    alone = load_text_encoder(folder)
    assert spread.hash == alone.hash
    for one, many in zip(alone.encode(PROMPTS), spread.encode(PROMPTS), strict=True):
        # Float32 in another order, and then rounded: to a neighbour at most.
        one, many = one.astype(np.float32), many.astype(np.float32)
        np.testing.assert_allclose(one, many, rtol=2**-7, atol=1e-5)


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
    write_run(directory, config, params)
    return directory


def sampled(run, output, *arguments) -> int:
    given = ["--checkpoint", run, "--output", output, "--steps", 1, "--frames", 1, *arguments]
    return sample.main([str(one) for one in given])


def test_prompts_become_clips(run, one_device, tmp_path):
    images = []
    for i, prompt in enumerate(PROMPTS[:2]):
        output = tmp_path / f"{i}.png"
        assert sampled(run, output, "--prompt", prompt, "--cfg-scale", 16) == 0
        images.append(read_video(output)[0].astype(int))
    assert images[0].shape == (1, 24, 24, 3)
    assert np.abs(images[0] - images[1]).max() > 4


def test_prompts_become_samples_to_measure(run, encoder, one_device, tmp_path):
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
    assert sampled(run, output, *arguments, other) == 2
    assert f"text_encoder.path {str(other)!r} is the encoder" in capsys.readouterr().err
    assert not output.exists()
    bare = dataclasses.replace(captioned, text_encoder=TextEncoderConfig())
    write_run(tmp_path / "bare", bare, {"x": np.zeros(1)})
    with pytest.raises(ValueError, match="reads prompts as states of 'tiny-umt5': give --text-en"):
        load_run(tmp_path / "bare")


def test_the_script_adds_states_to_records(tmp_path, encoder, folder, monkeypatch, capsys):
    script = load_script("scripts", "captions_to_states")
    monkeypatch.setattr(script, "CHUNK", 2)
    latents = [{**clip, "video": clip["video"] / 99, "kind": 1} for clip in clips(encoder)]
    given = dict(description="d", labels=["kind"], latents=(3, "codec"))
    plain = write_records(tmp_path, "latents", {"train": latents}, **given)
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
        wanted = wanted.astype(np.float32)
        np.testing.assert_allclose(found[i]["text_states"], wanted, rtol=2**-7, atol=1e-5)
