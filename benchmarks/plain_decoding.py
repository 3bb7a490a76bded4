"""FFmpeg alone, to measure ``prepare.py`` against; a module that child processes can import."""

import av
from av.video.reformatter import VideoReformatter


def decode(path: str) -> int:
    """Decodes every frame of a video with one thread; their number."""
    with av.open(path) as container:
        stream = container.streams.video[0]
        stream.thread_type = "NONE"
        return sum(1 for _ in container.decode(stream))


def decode_to_pixels(what: tuple[str, int, int]) -> int:
    """The same of (path, height, width), each frame scaled to RGB of that size, as ``ffmpeg -vf scale``
    does it with its default filter (bicubic)."""
    path, height, width = what
    scaler, count = VideoReformatter(), 0
    with av.open(path) as container:
        stream = container.streams.video[0]
        stream.thread_type = "NONE"
        for frame in container.decode(stream):
            scaler.reformat(frame, width, height, "rgb24", threads=1)
            count += 1
    return count
