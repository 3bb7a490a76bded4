"""Decoding alone, to measure ``prepare.py`` against; a module that child processes can import."""

import av


def decode(path: str) -> int:
    """Decodes every frame of a video with one thread; their number."""
    with av.open(path) as container:
        stream = container.streams.video[0]
        stream.thread_type = "NONE"
        return sum(1 for _ in container.decode(stream))
