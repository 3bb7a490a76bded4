"""Where one shot ends and the next begins: PySceneDetect's detectors on small frames of our decoding.

Cuts are found by `AdaptiveDetector`: the mean change of lightness from frame to frame (not of hue and
saturation, which are noise in the dark), where it stands out from the frames around it: motion, shaking
and dissolves change all of them alike. Where the frames around it do not change at all (held
drawings, slides), what stands out is a cut only if the outlines change too.
Black between shots is cut off on both sides by `ThresholdDetector`, and so are fades to and from it.
No shot is too short to be found here; what is too short to be used is for the clips to say.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable

import numpy as np

from dit_jax.preparation.refusals import extra


@dataclasses.dataclass(frozen=True)
class ShotConfig:
    """What counts as a cut. Levels are of pixels, 0 to 255.

    The defaults were chosen on the real clips of the tests, joined in all pairs: the least that a
    join changes is 3.6, and 7.1 times as much as its neighbours, both between two takes of one person
    before one wall; within continuous clips nothing above 3.8 times is found.
    """

    ratio: float = 5.0
    """A cut changes so many times as much as the frames around it."""
    change: float = 3.0
    """And at least so much, on average."""
    window: int = 4
    """So many frames on either side are around it."""
    held: float = 0.1
    """Frames that change less than this on average are held drawings."""
    outlines: float = 0.4
    """Between held drawings, a correlation of outlines above this is no cut."""
    black: float | None = 16.0
    """Frames with 98 % of their pixels under this are black, and so are shots of their own, from
    three in a row; None: they are as others."""

    def __post_init__(self) -> None:
        if not (self.ratio > 1 and self.change >= 0 and self.window >= 1):
            raise ValueError(
                f"shots: ratio {self.ratio}, change {self.change}, window {self.window}: they are "
                "above 1, at least 0 and at least 1"
            )


class ShotFinder:
    """Finds the cuts of frames that are fed in order; one for each run without gaps."""

    def __init__(self, config: ShotConfig, fps: float):
        detectors, common = extra("scenedetect.detectors"), extra("scenedetect.common")
        self.config, self._cv2 = config, extra("cv2")
        # Moved, for the detectors know no frames before 0.
        base = common.FrameTimecode(0, fps=fps)
        self._time = lambda i: common.FrameTimecode(i + config.window, fps=base)
        self._adaptive = lambda: detectors.AdaptiveDetector(
            adaptive_threshold=config.ratio,
            min_scene_len=1,
            window_width=config.window,
            min_content_val=config.change,
            luma_only=True,
        )
        self._fades = [
            detectors.ThresholdDetector(
                threshold=128,  # Of what `feed` makes of it: 0 or 255.
                min_scene_len=0,
                min_out_length=3,
                fade_bias=side,  # -1: where the black begins; 1: where it ends.
                add_final_scene=True,
            )
            for side in (-1.0, 1.0)
            if config.black is not None
        ]
        size = 2 * config.window + 2
        self._recent: collections.deque[np.ndarray] = collections.deque(maxlen=size)
        self._changes: collections.deque[float] = collections.deque(maxlen=size)
        self._bright: bool | None = None
        self._fed = 0
        self._found: set[int] = set()

    def feed(self, light: np.ndarray) -> float:
        """The next frame's lightness, uint8 [h, w] of one size throughout; its mean change, 0..255."""
        cv2 = self._cv2
        change = 0.0 if not self._fed else float(cv2.mean(cv2.absdiff(light, self._last))[0])
        self._last = light
        if self._fades:
            bright = bool(np.count_nonzero(light >= self.config.black) > 0.02 * light.size)
            if bright != self._bright:  # What goes on does not move the detectors.
                level, time = np.full((1, 1, 3), 255 * bright, np.uint8), self._time(self._fed)
                for fade in self._fades:
                    self._add(fade.process_frame(time, level))
            self._bright = bright
        self._fed += 1
        if self._fed == 1:  # Repeated, so that the first frames have neighbours.
            for i in range(-self.config.window, 0):
                self._step(i, light)
        self._step(self._fed - 1, light)
        return change

    def cuts(self) -> list[int]:
        """The first frames of all shots but the first, counted from the first frame fed."""
        if self._fed:
            for i in range(self.config.window):
                self._step(self._fed + i, self._last)
            for fade in self._fades:
                self._add(fade.post_process(self._time(self._fed - 1)))
        return sorted(cut for cut in self._found if 0 < cut < self._fed)

    def _step(self, index: int, light: np.ndarray) -> None:
        """Asks the detector of cuts about the frame `window` frames before, if it may be one."""
        cv2 = self._cv2
        half = cv2.resize(light, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)
        change = cv2.mean(cv2.absdiff(half, self._recent[-1]))[0] if self._recent else 0.0
        self._recent.append(half)
        self._changes.append(change)
        at = index - self.config.window
        if 0 < at < self._fed and self._stands_out() and self._detected(index):
            if self._holds(at, index):
                self._found.add(at)

    def _stands_out(self) -> bool:
        """Whether the detector's bounds are not clearly missed: it takes longer than all the rest."""
        config, changes = self.config, list(self._changes)[1:]
        change = changes.pop(config.window) * (1 + 1e-6)
        return change >= config.change and change * 2 * config.window >= config.ratio * sum(changes)

    def _detected(self, latest: int) -> bool:
        """What the detector says of the frame in the middle of the recent ones."""
        detector, first = self._adaptive(), latest - len(self._recent) + 1
        found = []
        for i, half in enumerate(self._recent):
            found = detector.process_frame(self._time(first + i), self._cv2.merge([half] * 3))
        return bool(found)

    def _add(self, times: list) -> None:
        self._found.update(time.frame_num - self.config.window for time in times)

    def _holds(self, at: int, latest: int) -> bool:
        """Whether a change stands out from its real neighbours, not only from repeated frames, and is
        not from one held drawing to another of the same outlines."""
        cv2, frames = self._cv2, list(self._recent)
        first = latest - len(frames) + 1  # The index of frames[0].
        changes = {
            first + i: cv2.mean(cv2.absdiff(frames[i - 1], frames[i]))[0]
            for i in range(1, len(frames))
            if 0 < first + i < self._fed and abs(first + i - at) <= self.config.window
        }
        change = changes.pop(at)
        around = list(changes.values())
        if around and change < self.config.ratio * np.mean(around):
            return False
        if not around or np.median(around) >= self.config.held:
            return True
        before, after = (_outlines(cv2, frames[at - first + i]) for i in (-1, 0))
        scale = float(np.sqrt((before**2).mean() * (after**2).mean()))
        return scale == 0 or float((before * after).mean()) / scale <= self.config.outlines


def _outlines(cv2, light: np.ndarray) -> np.ndarray:
    """Where lightness changes: float32 [h, w], its mean subtracted; flat areas give zeros."""
    x, y = (cv2.Sobel(light, cv2.CV_32F, *axis) for axis in ((1, 0), (0, 1)))
    edges = np.minimum(cv2.magnitude(x, y), 128.0)  # The outline, and not how strong it is.
    return edges - edges.mean()


def shot_cuts(
    frames: Iterable[np.ndarray], fps: float = 25.0, config: ShotConfig | None = None
) -> list[int]:
    """The indices at which shots begin, 0 not among them.

    `frames`: lightness, uint8 [h, w] of one size, best about 128 pixels wide.
    """
    finder = ShotFinder(config or ShotConfig(), fps)
    for frame in frames:
        finder.feed(frame)
    return finder.cuts()
