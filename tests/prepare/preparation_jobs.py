"""What the children of test_workers.py do."""

import os
import signal
import sys
import time

from dit_jax.prepare.refusals import Refused


def job(item):
    """Does what the item says."""
    name, value = item
    match name:
        case "square":
            return value**2
        case "slow":
            time.sleep(value)
            return name
        case "hang":
            while True:
                time.sleep(60)
        case "hang hard":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            while True:
                pass
        case "die":
            os.kill(os.getpid(), value)
        case "exit":
            os._exit(value)
        case "fail":
            raise KeyError(value)
        case "refuse":
            raise Refused("hdr", value)
        case "fill":
            return len(bytearray(value))
        case "modules":
            return sorted(set(value) & set(sys.modules))
        case "pid":
            return os.getpid()
