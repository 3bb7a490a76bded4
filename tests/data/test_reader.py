"""What cannot be used is left out, named by its index in the data set, and counted up to a limit."""

import errno
import itertools

import numpy as np
import pytest

from dit_jax import files
from dit_jax.codec.crops import CropConfig, CropLoader
from dit_jax.data import DataError, Loader, PackingConfig
from dit_jax.data.mixing import MixedSource, sample_name
from dit_jax.data.packing import Reader, checked_reader, first_sample
from dit_jax.files import InputError
from tests.data.test_packing import CONFIG, Clips, assert_same, take, tokens_of

BAD = {3, 11, 17}  # cannot be read, is too long, is not finite


class Dirty(Clips):
    """Clips of which three cannot be used."""

    def __getitem__(self, index):
        if index == 3:
            raise KeyError("video")
        sample = super().__getitem__(index)
        if index == 11:
            return {**sample, "video": np.zeros((7, 2, 2, 1), np.uint8)}
        return sample


def tokens(sample):
    out = tokens_of(sample)
    if sample["video"].flat[0] == 17:
        out["tokens"][0, 1] = np.nan
    return out


def loader(source, limit=10, unfit=None, **how):
    return Loader(Reader(source, limit, unfit), tokens, CONFIG, 0, **how)


def owners(batches):
    found = [batch.tokens[batch.segment_ids > 0][:, 0] for batch in batches]
    return set(np.concatenate(found).astype(int).tolist())


def test_bad_records_are_left_out_and_named_and_the_others_come(capsys):
    stream = loader(Dirty(40), 3)
    assert owners(take(stream, 12)) == set(range(40)) - BAD
    stream.close()
    assert set(stream.reader.left_out) == BAD
    told = capsys.readouterr().out
    for index in BAD:
        assert told.count(f"sample {index}") == 1  # By its place in the data set, and once.

    stream = loader(Dirty(40), 2)
    with pytest.raises(DataError, match="3 of 40"):  # One more than the limit.
        take(stream, 30)
    stream.close()


def damaged(count, last):
    """Clips of which those up to ``last`` cannot be read."""

    class Damaged(Clips):
        def __getitem__(self, index):
            if index <= last:
                raise ValueError("damaged")
            return super().__getitem__(index)

    return Damaged(count)


def test_a_set_without_a_usable_record_ends_instead_of_running_for_ever():
    stream = loader(damaged(5, 5), 100)
    with pytest.raises(DataError, match="5 of 5"):
        take(stream, 1)
    stream.close()
    with pytest.raises(InputError, match="damaged"):
        first_sample(damaged(5, 5), lambda sample, name: sample)
    assert first_sample(damaged(5, 1), lambda sample, name: sample)["video"].flat[0] == 2


def test_a_killed_run_reads_on_alike_and_remembers_what_was_left_out():
    stream, resumed = loader(Dirty(40)), loader(Dirty(40))
    take(stream, 5)
    state = stream.get_state()
    assert resumed.set_state(state)
    assert {int(i) for i in state["run"]["left_out"]} <= set(resumed.reader.left_out)
    for one, other in zip(take(resumed, 5), take(stream, 5), strict=True):
        assert_same(one, other)
    stream.close(), resumed.close()


def test_errors_of_the_disk_are_tried_again_and_are_no_fault_of_the_record(monkeypatch):
    monkeypatch.setattr(files, "WAIT_SECONDS", 0.0)
    tries = []

    class Flaky(Clips):
        def __getitem__(self, index):
            tries.append(index)
            if len(tries) < limit:
                raise OSError(errno.EIO, "input/output error")
            return super().__getitem__(index)

    limit = 3
    reader = Reader(Flaky(4), 4)
    assert reader.use(1, lambda sample, name: name) == "sample 1" and tries == [1, 1, 1]
    limit = 100
    with pytest.raises(OSError):
        reader.use(2, lambda sample, name: name)
    assert not reader.left_out


class Sized(Clips):
    """A source whose metadata have sizes: every tenth clip is too long, and one of an odd height."""

    def __init__(self, count):
        super().__init__(count)
        self.sizes = np.tile(np.int32([[5, 2, 2]]), (count, 1))
        self.sizes[::10, 0] = 9
        self.sizes[7, 1] = 3


def check(t, h, w):
    if t > 8 or h % 2:
        raise ValueError(f"{t} frames of {h} x {w} do not fit")


def test_sizes_tell_beforehand_what_does_not_fit(capsys):
    source = Sized(40)
    unfit = checked_reader(source, check, "skip", 0).unfit
    assert np.flatnonzero(unfit).tolist() == [0, 7, 10, 20, 30]
    told = capsys.readouterr().out
    assert "5 of 40" in told and "4 of 9 x 2 x 2 (the first: sample 0)" in told
    assert "1 of 5 x 3 x 2 (the first: sample 7)" in told
    with pytest.raises(InputError, match="5 of 40"):
        checked_reader(source, check, "refuse", 0)
    reader = Reader(source, 0, unfit)
    assert reader.use(10, lambda sample, name: name) is None and not reader.left_out
    assert reader.unfit_names(2) == ["sample 0", "sample 7"]
    expected = set(range(40)) - {0, 7, 10, 17, 20, 30}
    assert owners(take(loader(source, 1, unfit), 12)) == expected


def test_sources_may_use_names_of_ours_for_something_else():
    source = Clips(4)
    source.name, source.sizes = "clips", ((32, 32),)
    reader = checked_reader(source, check, "refuse", 0)
    assert reader.unfit is None and reader.use(1, lambda sample, name: name) == "sample 1"


def test_sizes_of_mixed_sets_are_put_together_and_their_records_named_by_set():
    mixed = MixedSource([Clips(6), Sized(12)], [1, 1])
    unfit = checked_reader(mixed, check, "skip", 0).unfit
    assert unfit is not None and np.flatnonzero(unfit).tolist() == [6, 13, 16]
    assert sample_name(mixed, 13) == "sample 7"


def test_nothing_left_to_train_on_is_refused_soon():
    source = Sized(10_000_000)
    unfit = checked_reader(source, check, "skip", 0).unfit
    assert unfit is not None and unfit.sum() == 1_000_001
    source = Sized(10)
    source.sizes[:, 0] = 9
    with pytest.raises(InputError, match="10 of 10"):
        checked_reader(source, check, "skip", 0)


def test_windows_of_a_codec_leave_out_bad_clips_too():
    crop = CropConfig(rows=2, frames=1, height=2, width=2)
    source = Dirty(12)
    reader = Reader(source, 12)
    stream = CropLoader(reader, crop, 1, 0)
    taken = list(itertools.islice(stream, 24))
    stream.close()
    # Every sixth clip is of one pixel: smaller than a window.
    assert set(reader.left_out) == {3, 4, 10} and len(taken) == 24


def test_rows_packed_anew_go_on_behind_the_last_sample():
    stream = Loader(Clips(250), tokens_of, CONFIG, 0)
    seen = owners(take(stream, 6))
    state = stream.get_state()
    config = PackingConfig(rows=4, row_tokens=40, row_text=40, row_segments=8, bins=2)
    resumed, again = (Loader(Clips(250), tokens_of, config, 0) for _ in range(2))
    assert not resumed.set_state(state)
    first = take(resumed, 3)
    ids = np.concatenate([batch.sample_ids[batch.num_tokens > 0] for batch in first])
    assert ids.min() == state["run"]["place"] and not owners(first) & seen
    # And a run resumed once more, with the same rows, goes on from its own state.
    assert again.set_state(resumed.get_state())
    assert_same(next(again), next(resumed))
    for one in (stream, resumed, again):
        one.close()
