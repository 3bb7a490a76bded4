"""Sets of images and references, written and read back."""

from __future__ import annotations

import contextlib
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dit_jax.evaluate import Statistics, open_images, open_reference, save_statistics, write_npz
from dit_jax.evaluate.samples import SampleStore, class_labels
from dit_jax.sampling import write_png, write_video


@pytest.fixture
def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (11, 8, 6, 3)).astype(np.uint8)


def everything(items, size: int = 4, start: int = 0, stop: int | None = None) -> np.ndarray:
    return np.concatenate(list(items.batches(start, items.count if stop is None else stop, size)))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_is_read_in_pieces(tmp_path: Path, images: np.ndarray, save: Any):
    path = tmp_path / "a.npz"
    save(path, images, np.arange(11))
    items = open_images(str(path))
    assert (items.count, items.shape) == (11, (8, 6, 3)) and items.kind == "images"
    np.testing.assert_array_equal(everything(items), images)
    np.testing.assert_array_equal(everything(items, 3, 4, 9), images[4:9])
    assert [len(batch) for batch in items.batches(4, 9, 3)] == [3, 2]


def test_npz_is_written_as_numpy_does(tmp_path: Path, images: np.ndarray):
    path, labels = tmp_path / "samples.npz", np.arange(11)
    write_npz(path, {"arr_1": labels}, [images[:5], images[5:]], 11)
    with np.load(path) as file:
        assert file.files == ["arr_0", "arr_1"] and file["arr_0"].dtype == np.uint8
        np.testing.assert_array_equal(file["arr_0"], images)
        np.testing.assert_array_equal(file["arr_1"], labels)
    # As OpenAI's suite reads them: a stored member, streamed.
    with zipfile.ZipFile(path) as archive:
        assert {one.compress_type for one in archive.infolist()} == {zipfile.ZIP_STORED}
    before = path.read_bytes()
    write_npz(path, {"arr_1": labels}, [images], 11)
    assert path.read_bytes() == before
    assert [one.name for one in tmp_path.iterdir()] == ["samples.npz"]


def test_folder_of_images_in_order_of_names(tmp_path: Path, images: np.ndarray):
    (tmp_path / "sub").mkdir()
    for i, image in enumerate(images):
        write_png(tmp_path / ("sub" if i > 5 else "") / f"{i:02d}.png", image)
    (tmp_path / "notes.txt").write_text("not an image")
    items = open_images(str(tmp_path))
    assert (items.count, items.shape) == (11, (8, 6, 3))
    np.testing.assert_array_equal(everything(items), images)
    write_png(tmp_path / "03.png", images[3, :4])
    with pytest.raises(ValueError, match=r"03.png' is \(4, 6, 3\)"):
        everything(items)


def test_folder_of_clips(tmp_path: Path):
    for i in range(3):
        write_video(tmp_path / f"{i}.mp4", np.full((4, 8, 8, 3), 80 * i, np.uint8), 8)
    items = open_images(str(tmp_path))
    assert (items.count, items.shape) == (3, (4, 8, 8, 3)) and items.kind == "clips"
    assert np.abs(everything(items).mean((1, 2, 3, 4)) - [0, 80, 160]).max() < 3
    write_png(tmp_path / "x.png", np.zeros((8, 8, 3), np.uint8))
    with pytest.raises(ValueError, match=r"\(x.png, 0.mp4\)"):
        open_images(str(tmp_path))


def test_what_holds_no_images_is_refused(tmp_path: Path, images: np.ndarray):
    path = tmp_path / "a.npz"
    for odd in (images.astype(np.float32), images[0], images[:0], images[..., :1]):
        np.savez(path, odd)
        with pytest.raises(ValueError, match="must hold uint8 images"):
            open_images(str(path))
    np.savez(path, mu=np.zeros(3))
    with pytest.raises(ValueError, match="a.npz.*arr_0"):
        open_images(str(path))
    path.write_bytes(b"PK")
    with pytest.raises(ValueError, match="cannot be read as .npz"):
        open_images(str(path))
    for name in (tmp_path / "none.npz", tmp_path / "none"):
        with pytest.raises(ValueError, match=r"none(\.npz)?' is not there"):
            open_images(str(name))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds none"):
        open_images(str(tmp_path / "empty"))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_damaged_npz_is_said_to_be(tmp_path: Path, images: np.ndarray, save: Any):
    path = tmp_path / "a.npz"
    save(path, images, mu_v=np.zeros(400), sigma_v=np.eye(400))
    whole = path.read_bytes()
    # In the images' header, their numbers, and the statistics.
    for at in (60, len(images.tobytes()) // 2, len(whole) // 2):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 255]) + whole[at + 1 :])
        with pytest.raises(ValueError, match="a.npz' .*(damaged|must hold).*"):
            everything(open_reference(str(path)).items)
    for at in range(0, 3000, 31):  # whatever is hit, it is no other error
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 255]) + whole[at + 1 :])
        with contextlib.suppress(ValueError):
            everything(open_images(str(path)))


def test_statistics_and_headers_that_inflate_are_refused(tmp_path: Path):
    path = tmp_path / "a.npz"
    np.savez_compressed(path, mu=np.zeros(2048), sigma=np.zeros((4200, 4200)))
    assert path.stat().st_size < 2**18
    with pytest.raises(ValueError, match="a.npz' .*141,136,640 bytes in mu, sigma"):
        open_reference(str(path))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        header = b"\x93NUMPY\x02\x00" + (2**27).to_bytes(4, "little") + bytes(2**27)
        archive.writestr("arr_0.npy", header)
    with pytest.raises(ValueError, match=r"a.npz' .*version \(2, 0\)"):
        open_images(str(path))


@pytest.mark.parametrize("count", [np.array([3, 4]), np.array(0), np.array(2.5), np.array("many")])
def test_an_odd_count_is_refused(tmp_path: Path, count: np.ndarray):
    np.savez(tmp_path / "a.npz", mu_v=np.zeros(400), sigma_v=np.eye(400), count=count)
    with pytest.raises(ValueError, match="'count' in .*a.npz' is "):
        open_reference(str(tmp_path / "a.npz"))


def statistics(size: int, count: int | None = None) -> Statistics:
    rng = np.random.default_rng(size)
    root = rng.normal(size=(size, 3))
    return Statistics(rng.normal(size=size), root @ root.T, count)


def test_published_layouts_are_read(tmp_path: Path, images: np.ndarray):
    pool = statistics(2048)
    path = tmp_path / "fid.npz"
    np.savez(path, mu=pool.mean.astype(np.float32), sigma=pool.covariance)
    found = open_reference(str(path))
    assert set(found.statistics) == {"pool"} and found.items is None
    assert found.statistics["pool"].mean.dtype == np.float64
    np.savez(path, mu=np.zeros(64), sigma=np.eye(64))
    with pytest.raises(ValueError, match="64 numbers, .* 2048"):
        open_reference(str(path))
    np.savez(path, x=np.zeros(3))
    with pytest.raises(ValueError, match="holds x"):
        open_reference(str(path))
    np.savez(path, mu=np.full(2048, np.nan), sigma=np.eye(2048))
    with pytest.raises(ValueError, match="'mu' and 'sigma' in .*NaN"):
        open_reference(str(path))


def test_statistics_are_saved_and_read_back(tmp_path: Path, images: np.ndarray):
    np.savez(tmp_path / "images.npz", images)
    known = {"pool": statistics(2048, 77), "spatial": statistics(2023, 77)}
    items = open_images(str(tmp_path / "images.npz"))
    save_statistics(tmp_path / "saved.npz", known, items)
    found = open_reference(str(tmp_path / "saved.npz"))
    assert found.items is not None and found.statistics["pool"].count == 77
    np.testing.assert_array_equal(everything(found.items), images)
    for kind, one in known.items():
        np.testing.assert_array_equal(found.statistics[kind].mean, one.mean)
        np.testing.assert_array_equal(found.statistics[kind].covariance, one.covariance)
    save_statistics(tmp_path / "video.npz", {"video": statistics(400)})
    assert set(open_reference(str(tmp_path / "video.npz")).statistics) == {"video"}


class Killed(Exception):
    """Stands for a signal: nothing catches it."""


def test_store_goes_on_and_refuses_another_plan(tmp_path: Path, images: np.ndarray):
    plan = {"seed": 3, "sampling": {"interval": (0.0, 1.0)}}
    asked: list[list[int]] = []

    def sample(numbers: range) -> np.ndarray:
        if len(asked) == 1:
            asked.append([])
            raise Killed
        asked.append(list(numbers))
        return images[numbers, None]

    with pytest.raises(Killed):
        SampleStore(tmp_path, plan, 11, 4).fill(sample)
    assert [one.name for one in (tmp_path / "shards").iterdir()] == ["000000.npy"]
    for other, size, words in (
        ({**plan, "seed": 4}, 4, "seed 3, not 4"),
        (plan, 5, "shard 4, not 5"),
    ):
        with pytest.raises(ValueError, match=words):
            SampleStore(tmp_path, other, 11, size)
    items = SampleStore(tmp_path, plan, 11, 4).fill(sample)
    assert asked == [[0, 1, 2, 3], [], [4, 5, 6, 7], [8, 9, 10]]
    assert {one.name for one in tmp_path.iterdir()} == {"plan.json", "samples.npz"}
    np.testing.assert_array_equal(everything(items), images)
    # What is finished is not sampled again.
    SampleStore(tmp_path, plan, 11, 4).fill(sample, np.arange(11))
    assert len(asked) == 4
    (tmp_path / "plan.json").unlink()
    with pytest.raises(ValueError, match="no plan.json"):
        SampleStore(tmp_path, plan, 11, 4)


def test_classes_are_balanced_or_drawn():
    balanced = class_labels("balanced", 10, 25, 0)
    assert balanced.dtype == np.int64 and np.bincount(balanced).tolist() == [3] * 5 + [2] * 5
    drawn = class_labels("uniform", 10, 2000, 0)
    assert set(drawn) == set(range(10)) and np.bincount(drawn).std() > 3
    np.testing.assert_array_equal(drawn, class_labels("uniform", 10, 2000, 0))
    assert (drawn != class_labels("uniform", 10, 2000, 1)).any()
