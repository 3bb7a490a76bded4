"""Records: what is written is read back exactly, without TensorFlow, and mistakes are named."""

import importlib.util
import io
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor

import av
import numpy as np
import pytest
import tensorflow_datasets as tfds

from dit_jax.config import check_types
from dit_jax.data.records import RecordsConfig, RecordsSource
from dit_jax.prepare.writing import write_records

SHAPES = [(5, 24, 40, 3), (1, 16, 8, 3), (3, 9, 7, 3), (2, 32, 32, 3)]


def samples(n=4, seed=0):
    rng = np.random.default_rng(seed)
    for i in range(n):
        video = rng.integers(0, 256, SHAPES[i % len(SHAPES)], np.uint8)
        yield {"video": video, "caption": f"Nº {i}", "fps": 8.0 + i / 2, "kind": i % 3}


@pytest.fixture(scope="module")
def builder(tmp_path_factory):
    splits = {"train": samples(), "test": samples(2, seed=1)}
    root = tmp_path_factory.mktemp("records")
    return write_records(root, "clips", splits, description="d", labels=["kind"])


def image_file(pixels, pix_fmt, codec="png"):
    target = io.BytesIO()
    with av.open(target, "w", format="image2pipe") as container:
        stream = container.add_stream(codec, rate=1)
        stream.height, stream.width = pixels.shape[:2]
        stream.pix_fmt = pix_fmt
        frame = av.VideoFrame.from_ndarray(pixels, "gray" if pixels.ndim == 2 else "rgb24")
        for packet in (*stream.encode(frame), *stream.encode()):
            container.mux(packet)
    return target.getvalue()


def foreign_builder(root, features, examples, metadata=None):
    """A builder with features of its own, as any TFDS user makes one."""

    class Foreign(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("2.0.0")
        name = "foreign"

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self,
                description="d",
                features=tfds.features.FeaturesDict(features),
                metadata=tfds.core.MetadataDict(metadata or {}),
                disable_shuffling=True,
            )

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            yield from enumerate(examples)

    made = Foreign(data_dir=str(root), file_format="array_record")
    made.download_and_prepare(download_dir=str(root / "downloads"))
    return str(root / "foreign" / "2.0.0")


@pytest.mark.parametrize("encoding", ["zlib", "bytes"])
def test_round_trip_is_exact_and_keeps_the_order(tmp_path, builder, encoding):
    path = builder
    if encoding != "zlib":
        splits = {"train": samples()}
        path = write_records(tmp_path, "clips", splits, description="d", encoding=encoding)
        assert path == tmp_path / "clips" / "1.0.0"
        assert [p.name for p in tmp_path.iterdir()] == ["clips"]
    source = RecordsSource(RecordsConfig(str(path)))
    assert len(source) == 4
    for sample, expected in zip(source, samples(), strict=True):
        assert set(sample) == {"video", "caption", "fps"}
        assert sample["video"].dtype == np.uint8 and type(sample["fps"]) is float
        np.testing.assert_array_equal(sample["video"], expected["video"])
        assert (sample["caption"], sample["fps"]) == (expected["caption"], expected["fps"])


def test_splits_slices_names_and_numpy_indices(builder):
    path = str(builder)
    assert RecordsSource(RecordsConfig(path, split="test"))[1]["caption"] == "Nº 1"
    assert RecordsSource(RecordsConfig(path, split="train[50%:]"))[0]["caption"] == "Nº 2"
    assert len(RecordsSource(RecordsConfig(path, split="train+test"))) == 6
    named = RecordsSource(RecordsConfig("clips", data_dir=str(builder.parents[1])))
    assert named[np.int64(3)]["caption"] == "Nº 3"
    with pytest.raises(IndexError):
        named[4]


def test_pickles_and_serves_threads(builder):
    source = RecordsSource(RecordsConfig(str(builder)))
    copy = pickle.loads(pickle.dumps(source))
    with ThreadPoolExecutor(4) as pool:
        parallel = list(pool.map(source.__getitem__, [i % 4 for i in range(80)]))
    for i, sample in enumerate(parallel):
        np.testing.assert_array_equal(sample["video"], copy[i % 4]["video"])


def test_captions_of_labels_and_frame_rates(builder):
    path = str(builder)
    plain = RecordsConfig(path, caption_template="kind {kind} of {{x}}")
    assert RecordsSource(plain)[1]["caption"] == "kind 1 of {x}"
    named = RecordsConfig(path, caption_template="a {kind}", label_names=("cat", "dog", "cow"))
    assert [s["caption"] for s in RecordsSource(named)] == ["a cat", "a dog", "a cow", "a cat"]
    both = RecordsConfig(path, caption_template="{caption}: {kind}", fps_key=None, fps=24.0)
    assert RecordsSource(both)[2]["caption"] == "Nº 2: 2"
    assert RecordsSource(both)[2]["fps"] == 24.0
    assert RecordsSource(RecordsConfig(path, fps_key="kind"))[2]["fps"] == 2.0
    one = RecordsConfig(path, caption_template="a {kind}", label_names=("cat",))
    with pytest.raises(ValueError, match="kind=1 .* has 1"):
        RecordsSource(one)[1]


def test_image_features_are_one_frame_videos(tmp_path):
    rng = np.random.default_rng(0)
    grey, rgb = rng.integers(0, 256, (28, 26), np.uint8), rng.integers(0, 256, (9, 7, 3), np.uint8)
    (tmp_path / "grey.png").write_bytes(image_file(grey, "gray"))
    (tmp_path / "rgb.png").write_bytes(image_file(rgb, "rgb24"))
    features = {
        "image": tfds.features.Image(shape=(None, None, 1)),
        "other": tfds.features.Image(shape=(None, None, 3)),
        "raw": tfds.features.Tensor(shape=(4, 6, 1), dtype=np.uint8),
        "wide": tfds.features.Tensor(shape=(4, 6, 3), dtype=np.int32),
        "label": tfds.features.ClassLabel(names=["zero", "one"]),
    }
    example = {
        "image": str(tmp_path / "grey.png"),
        "other": str(tmp_path / "rgb.png"),
        "raw": np.arange(24, dtype=np.uint8).reshape(4, 6, 1),
        "wide": np.zeros((4, 6, 3), np.int32),
        "label": 1,
    }
    path = foreign_builder(tmp_path, features, [example])

    def read(key):
        config = RecordsConfig(path, video_key=key, caption_template="digit {label}", fps=4.0)
        return RecordsSource(config)[0]

    sample = read("image")
    np.testing.assert_array_equal(sample["video"], np.repeat(grey[None, :, :, None], 3, -1))
    assert (sample["caption"], sample["fps"]) == ("digit one", 4.0)
    np.testing.assert_array_equal(read("other")["video"], rgb[None])
    np.testing.assert_array_equal(read("raw")["video"][0, :, :, 2], np.arange(24).reshape(4, 6))
    with pytest.raises(ValueError, match=r"record 0 of .*'wide' is int32 \[4, 6, 3\]: need uint8"):
        read("wide")
    with pytest.raises(ValueError, match="record 0 of .*'label'"):
        read("label")


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    """A builder of latents and text states of several sizes, and what is in it."""
    rng = np.random.default_rng(0)
    examples = [
        {
            "latents": rng.normal(size=size).astype(np.float32),
            "half": rng.normal(size=size[1:]).astype(np.float16),
            "states": rng.normal(size=(length, 8)).astype(np.float32),
            "caption": f"clip {i}",
        }
        for i, (size, length) in enumerate((((3, 4, 6, 16), 5), ((1, 2, 2, 16), 0)))
    ]
    tensor, n = tfds.features.Tensor, None
    features = {
        "latents": tensor(shape=(n, n, n, 16), dtype=np.float32, encoding="zlib"),
        "half": tensor(shape=(n, n, 16), dtype=np.float16, encoding="zlib"),
        "states": tensor(shape=(n, 8), dtype=np.float32),
        "caption": tfds.features.Text(),
    }
    return foreign_builder(tmp_path_factory.mktemp("latents"), features, examples), examples


def test_latents_and_text_states_are_read_back_exactly(latents):
    path, examples = latents
    config = RecordsConfig(path, video_key="latents", text_states_key="states", fps=6.0)
    for sample, example in zip(RecordsSource(config), examples, strict=True):
        assert set(sample) == {"video", "caption", "fps", "text_states"}
        assert sample["video"].dtype == sample["text_states"].dtype == np.float32
        np.testing.assert_array_equal(sample["video"], example["latents"])
        np.testing.assert_array_equal(sample["text_states"], example["states"])
        assert (sample["caption"], sample["fps"]) == (example["caption"], 6.0)
    # Latents of an image are one frame, and half precision widens.
    for sample, example in zip(
        RecordsSource(RecordsConfig(path, video_key="half")), examples, strict=True
    ):
        assert "text_states" not in sample and sample["video"].dtype == np.float32
        np.testing.assert_array_equal(sample["video"], example["half"][None])
    assert "tensorflow" not in sys.modules
    with pytest.raises(ValueError, match="no features .*'t5'.*caption, half, latents, states"):
        RecordsSource(RecordsConfig(path, video_key="latents", text_states_key="t5"))


@pytest.mark.skipif(
    bool(importlib.util.find_spec("PIL") or importlib.util.find_spec("cv2")),
    reason="Pillow or OpenCV is installed, and TFDS decodes the sequence with it",
)
def test_features_that_need_tensorflow_are_refused(tmp_path):
    (tmp_path / "rgb.png").write_bytes(image_file(np.zeros((9, 7, 3), np.uint8), "rgb24"))
    images = tfds.features.Sequence(tfds.features.Image(shape=(9, 7, 3)))
    features = {"video": images, "caption": tfds.features.Text()}
    example = {"video": [str(tmp_path / "rgb.png")], "caption": "x"}
    path = foreign_builder(tmp_path, features, [example])
    with pytest.raises(ValueError, match="cannot be decoded without TensorFlow"):
        RecordsSource(RecordsConfig(path))[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"split": "val"}, r"'val'.* choose of train \(4\), test \(2\)"),
        ({"split": "train[:0]"}, "no records"),
        ({"video_key": "image"}, "'image'.*caption, fps, kind, video"),
        ({"video_key": "caption"}, "record 0 of .*'caption'"),
        ({"caption_key": "text"}, "'text'"),
        ({"caption_template": "a {label}"}, "'label'"),
        ({"fps_key": "rate"}, "'rate'"),
        ({"text_states_key": "states"}, "no features .*'states'.*caption, fps"),
    ],
)
def test_source_refuses(builder, changes, message):
    with pytest.raises(ValueError, match=message):
        RecordsSource(RecordsConfig(str(builder), **changes))[0]


def test_source_refuses_places_without_a_builder(builder, tmp_path):
    for path, message in (
        (str(builder.parents[1]), r"it holds .*clips/1.0.0"),
        (str(tmp_path / "absent"), "neither the name"),
        ("no_such_data_set", "neither the name"),
        ("mnist", "not prepared in"),
    ):
        with pytest.raises(ValueError, match=message):
            RecordsSource(RecordsConfig(path, data_dir=str(tmp_path)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"path": ""}, "path is empty"),
        ({"fps": 0.0}, "fps is 0.0"),
        ({"caption_template": "a digit"}, "names no feature"),
        ({"caption_template": "a {digit"}, "is no template"),
        ({"label_names": ("a",)}, "label_names"),
        ({"label_names": ("a",), "caption_template": "{x} {y}"}, "label_names.*'x', 'y'"),
    ],
)
def test_config_refuses(changes, message):
    with pytest.raises(ValueError, match=message):
        check_types(RecordsConfig(**{"path": "x", **changes}))


GOOD = {"video": np.zeros((1, 4, 4, 3), np.uint8), "caption": "x", "fps": 8.0}


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (None, "split 'train' has no samples"),
        ({"video": GOOD["video"]}, r"sample 0 of split 'train' lacks \['caption', 'fps'\]"),
        ({**GOOD, "video": np.zeros((1, 4, 4, 3))}, r"is float64 \[1, 4, 4, 3\]: need uint8"),
        ({**GOOD, "video": np.zeros((0, 4, 4, 3), np.uint8)}, "no axis empty"),
        ({**GOOD, "video": np.zeros((1, 4, 4, 4), np.uint8)}, r"uint8 \[1, 4, 4, 4\]"),
        ({**GOOD, "fps": 0.0}, "fps 0.0"),
        ({**GOOD, "caption": 3}, "caption 3"),
    ],
)
def test_writer_refuses_samples(tmp_path, sample, message):
    with pytest.raises(ValueError, match=message):
        write_records(tmp_path, "clips", {"train": [sample] if sample else []}, description="d")
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


def test_writer_refuses_names_and_places(builder, tmp_path):
    (tmp_path / "file").touch()
    splits = {"train": [GOOD]}
    for root, name, changes, message in (
        (builder.parents[1], "clips", {}, "exists: remove it"),
        (tmp_path, "My Clips", {}, "name='My Clips'"),
        (tmp_path, "clips", {"splits": {}}, "splits is empty"),
        (tmp_path / "file", "clips", {}, "cannot be written"),
        (tmp_path, "clips", {"labels": ["fps"]}, "fps.* twice"),
        (tmp_path, "clips", {"encoding": "png"}, "encoding='png'"),
        (tmp_path, "clips", {"latents": (8, "codec")}, "float with 8"),
    ):
        with pytest.raises(ValueError, match=message):
            write_records(root, name, **{"splits": splits, "description": "d", **changes})
