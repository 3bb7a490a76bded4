"""What became of requests to a model, and what they cost."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from typing import Literal

from dit_jax.prepare.answer_cache import Answer

Event = Literal["asked", "cached", "failed", "retried", "refused", "cut", "empty"]


class Summary:
    """Counts, for several threads. Of those asked, each was answered, cached or failed."""

    def __init__(self, model: str, server: str, clock: Callable[[], float]) -> None:
        self.model, self.server = model, server
        self.asked = self.answered = self.cached = 0
        self.retried: Counter[str] = Counter()
        """Attempts that failed and were repeated, by reason."""
        self.failed: Counter[str] = Counter()
        """Requests that were given up, by reason."""
        self.refused = self.cut = self.empty = 0
        """Answers, also cached ones, of no use to the caller."""
        self.prompt_tokens = self.completion_tokens = 0
        """Of the answers of this session: cached ones cost nothing."""
        self._clock, self._start, self._lock = clock, clock(), threading.Lock()

    def count(self, event: Event, reason: str = "") -> None:
        """Counts one; ``failed`` and ``retried`` have a reason."""
        with self._lock:
            if event in ("failed", "retried"):
                getattr(self, event)[reason] += 1
            else:
                setattr(self, event, getattr(self, event) + 1)

    def bill(self, answer: Answer) -> None:
        """Counts an answer that was made for this session."""
        with self._lock:
            self.answered += 1
            self.prompt_tokens += answer.prompt_tokens
            self.completion_tokens += answer.completion_tokens

    @property
    def seconds(self) -> float:
        """Since the client was made."""
        return self._clock() - self._start

    def render(self) -> str:
        """Some lines of text; what did not happen is left out."""
        with self._lock:
            useless = {"refused": self.refused, "cut off": self.cut, "empty": self.empty}
            lines = [
                f"{self.model} at {self.server}: {self.asked} asked in {self.seconds:.1f} s: "
                f"{self.answered} answered, {self.cached} from cache, {self.failed.total()} failed",
                f"  billed: {self.prompt_tokens} + {self.completion_tokens} tokens",
            ]
            for name, reasons in (("failed", self.failed), ("tried again", self.retried)):
                if reasons:
                    lines.append(f"  {name}: " + _listed(reasons))
            if any(useless.values()):
                lines.append("  of no use: " + _listed(Counter(useless)))
            return "\n".join(lines)


def _listed(reasons: Counter[str]) -> str:
    return ", ".join(f"{count} x {reason}" for reason, count in reasons.most_common() if count)
