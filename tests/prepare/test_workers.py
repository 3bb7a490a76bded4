"""Children that hang, crash, eat memory or are interrupted; the others go on."""

import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dit_jax.prepare.workers import WorkersConfig, run

# Children import what they do by name: by one that is found on the module search path.
sys.path.append(str(Path(__file__).parent))

from preparation_jobs import job  # noqa: E402

TWO = WorkersConfig(count=2, time_limit=30.0)


def values(items, config=TWO):
    return [outcome.value for outcome in run(job, items, config)]


def alive(pid):
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


def test_results_come_in_the_order_of_the_items():
    items = ["time.sleep(0.4)", *(f"{n}**2" for n in range(40)), "time.sleep(0)"]
    assert values(items) == [None, *(n**2 for n in range(40)), None]
    assert values([]) == []


def test_hanging_and_dying_children_are_reported_and_replaced():
    expected = {
        "2**2": (4, "", ""),
        "time.sleep(60)": (None, "timed out", "killed after 1.5 s"),
        "os.abort()": (None, "decoder crashed", "its process was ended by SIGABRT"),
        "3**2": (9, "", ""),
        "os._exit(3)": (None, "decoder crashed", "its process ended with status 3"),
        "{}['x']": (None, "failed", "KeyError: 'x' (<string>:1)"),
        "refuse('words')": (None, "hdr", "words"),
        "4**2": (16, "", ""),
    }
    begun = time.monotonic()
    found = list(run(job, expected, WorkersConfig(count=2, time_limit=1.5)))
    assert time.monotonic() - begun < 30
    assert [(o.value, o.reason, o.detail) for o in found] == list(expected.values())
    assert 1.4 < found[1].seconds < 6


def test_children_import_neither_jax_nor_the_main_module():
    names = {"jax", "flax", "tensorflow", "tensorflow_datasets", "grain", "pytest", "torch", "av"}
    assert values([f"{names} & {{*sys.modules}}"]) == [{"av"}]


def test_memory_is_limited_and_children_are_replaced_after_their_share():
    config = WorkersConfig(count=1, memory_limit=4 << 30, items_per_child=2)
    found = list(run(job, ["bytearray(8 << 30)", *["os.getpid()"] * 3], config))
    assert found[0].reason == "out of memory"
    first, second, third = (one.value for one in found[1:])
    assert first == second != third


def test_items_are_not_taken_far_ahead_and_closing_leaves_no_children():
    taken = itertools.count()
    results = run(job, (f"os.getpid() + 0 * {n}" for n in taken), TWO)
    pid = next(results).value
    assert next(taken) < 100 and alive(pid)
    results.close()
    assert not alive(pid)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_program_leaves_no_children(how):
    # A program in the background of a script ignores SIGINT unless it says otherwise.
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from dit_jax.prepare.workers import run, WorkersConfig\n"
        "from preparation_jobs import job\n"
        "for o in run(job, ['os.getpid()', 'time.sleep(60)'], WorkersConfig(count=1)):\n"
        "    print(o.value, flush=True)\n"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    line, pipe = [sys.executable, "-c", code], subprocess.PIPE
    with subprocess.Popen(
        line, stdout=pipe, stderr=pipe, env=env, start_new_session=True
    ) as program:
        pid = int(program.stdout.readline())
        time.sleep(0.3)
        program.send_signal(how)
        program.wait(20)
        deadline = time.monotonic() + 10
        while alive(pid) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not alive(pid)


def test_functions_without_a_name_are_refused():
    with pytest.raises(ValueError, match="define it in a module"):
        next(run(lambda item: item, [1]))
    with pytest.raises(ValueError, match="time_limit=0"):
        WorkersConfig(time_limit=0)
