"""What the children of test_workers.py do."""

import os  # noqa: F401
import signal  # noqa: F401
import sys  # noqa: F401
import time  # noqa: F401

from dit_jax.prepare.refusals import Refused


def refuse(words):
    raise Refused("hdr", words)


def job(code):
    """The value of an expression."""
    return eval(code)
