"""Made videos: timed, named and damaged, against what they hold."""

import av
import numpy as np
import pytest

from dit_jax.prepare.media import DecodingLog, pictures, sampled
from dit_jax.prepare.refusals import Refused
from tests.prepare.made_media import displayed, moving, probe


def bright(count):
    """Frames whose level tells which they are."""
    return [np.full((32, 32, 3), 20 + 8 * i, np.uint8) for i in range(count)]


def numbers(path, fps=None):
    return [round((int(p.pixels()[5, 5, 0]) - 20) / 8) for _, p in sampled(path, fps)]


def test_a_variable_rate_is_sampled_by_time_stamps(written):
    times = [0, 0.1, 0.2, 0.3, 0.7, 0.8, 0.85, 0.9, 1.0]
    path = written("vfr.mkv", bright(9), 10, times=times)
    found = probe(path)
    assert found.fps == pytest.approx(10, abs=0.01) and not found.constant_rate
    # Between 0.3 and 0.7 the nearer one; of 0.85 and 0.8, 0.9 those on the grid.
    assert numbers(path) == [0, 1, 2, 3, 3, 4, 4, 4, 5, 7, 8]
    assert [round(t, 2) for t, _ in displayed(path)][:5] == [0, 0.1, 0.2, 0.3, 0.3]


def test_a_constant_rate_rounded_to_milliseconds_keeps_every_frame(written):
    path = written("ms.mkv", bright(24), 30, times=[round(i / 30, 3) for i in range(24)])
    found = probe(path)
    assert found.fps == 30 and found.constant_rate and found.frames == 24
    assert numbers(path) == list(range(24))


def test_a_name_is_no_protocol_and_no_pattern(written):
    clip = moving(9, 48, 64)
    shown = displayed(written("%03d:concat|a.mov", clip, kind="yuv420p"))
    assert len(shown) == 9
    for (_, pixels), frame in zip(shown, clip, strict=True):
        assert np.abs(pixels.astype(int) - frame).mean() < 20


PLAYLIST = b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n/etc/passwd\n#EXT-X-ENDLIST\n"


@pytest.mark.parametrize(
    "content, reason",
    [
        (b"", "empty file"),
        (b"hello, world\n" * 100, "not media"),
        (PLAYLIST, "not media"),
        (b"\xff\xd8\xff\xe0" + b"\0" * 200, "cannot be decoded"),
        ("no file", "cannot be read"),
        ("a folder", "cannot be read"),
        ("no index", "truncated"),
    ],
)
def test_what_is_not_media_is_refused_by_name(written, tmp_path, content, reason):
    path = tmp_path / "file"
    if content == "a folder":
        path.mkdir()
    elif content == "no index":
        whole = written("whole.mp4", moving(20)).read_bytes()
        path.write_bytes(whole[: whole.index(b"moov") - 40])
    elif content != "no file":
        path.write_bytes(content)
    with pytest.raises(Refused) as refused:
        probe(path)
    assert refused.value.reason == reason


def test_damage_ends_at_the_next_key_frame(written):
    path = written("hole.mkv", moving(36, seed=3), times=[i / 25 for i in range(36)])
    with av.open(str(path)) as container:
        spans = [(p.pos, p.size) for p in container.demux(video=0) if p.size]
    data = bytearray(path.read_bytes())
    at, size = spans[15]  # In the second of three groups of twelve.
    data[at + 8 : at + size] = bytes((b * 7 + 1) % 256 for b in range(size - 8))
    path.write_bytes(data)
    log = DecodingLog()
    decoded = list(pictures(path, log=log))
    times = [round(p.time * 25) for p in decoded]
    assert log.errors and log.notes()
    assert set(range(8)) | set(range(24, 36)) <= set(times) and 17 not in times
    assert [i for i, p in zip(times, decoded, strict=True) if p.after_gap] == [24]
    # The grid has no indices where frames are lost.
    assert [k for k, _ in sampled(path)] == times
