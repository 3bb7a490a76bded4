"""Children that hang, crash, eat memory or are interrupted; the others go on."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dit_jax.prepare.workers import Outcome, WorkersConfig, run

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
    items = [("slow", 0.4), *(("square", n) for n in range(40)), ("slow", 0.0)]
    assert values(items) == ["slow", *(n**2 for n in range(40)), "slow"]
    assert values([]) == []


def test_hanging_and_dying_children_are_reported_and_replaced():
    expected = {
        ("square", 2): (4, "", ""),
        ("hang", 0): (None, "timed out", "killed after 1.5 s"),
        ("die", signal.SIGSEGV): (None, "decoder crashed", "its process was ended by SIGSEGV"),
        ("square", 3): (9, "", ""),
        ("hang hard", 0): (None, "timed out", "killed after 1.5 s"),
        ("exit", 3): (None, "decoder crashed", "its process ended with status 3"),
        ("die", signal.SIGKILL): (None, "decoder crashed", "its process was ended by SIGKILL"),
        ("fail", "x"): (None, "failed", "KeyError: 'x' (preparation_jobs.py:32)"),
        ("refuse", "words"): (None, "hdr", "words"),
        ("square", 4): (16, "", ""),
    }
    begun = time.monotonic()
    found = list(run(job, expected, WorkersConfig(count=2, time_limit=1.5)))
    assert time.monotonic() - begun < 30
    assert [(o.value, o.reason, o.detail) for o in found] == list(expected.values())
    assert 1.4 < found[1].seconds < 6


def test_children_import_neither_jax_nor_the_main_module():
    names = ["jax", "flax", "tensorflow", "tensorflow_datasets", "grain", "pytest", "torch"]
    assert values([("modules", [*names, "av"])]) == [["av"]]


def test_memory_is_limited():
    config = WorkersConfig(count=1, memory_limit=4 << 30)
    found = list(run(job, [("fill", 8 << 30), ("fill", 1000)], config))
    assert found[0].reason == "out of memory" and found[1].value == 1000


def test_children_are_replaced_after_their_share():
    pids = values([("pid", 0)] * 6, WorkersConfig(count=1, items_per_child=2))
    assert len(set(pids)) == 3 and pids[0] == pids[1] and pids[4] == pids[5]


def test_items_are_not_taken_far_ahead():
    taken = []

    def items():
        for n in range(10_000):
            taken.append(n)
            yield ("square", n)

    results = run(job, items(), TWO)
    assert next(results) == Outcome(0, seconds=pytest.approx(0, abs=5))
    assert len(taken) < 100
    results.close()


def test_closing_and_exceptions_leave_no_children():
    results = run(job, [("pid", 0), ("hang", 0), ("hang", 0), ("hang", 0)], TWO)
    pid = next(results).value
    assert alive(pid)
    results.close()
    assert not alive(pid)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_program_leaves_no_children(how):
    # A program in the background of a script ignores SIGINT unless it says otherwise.
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from dit_jax.prepare.workers import run, WorkersConfig\n"
        "from preparation_jobs import job\n"
        "for o in run(job, [('pid', 0), ('hang', 0)], WorkersConfig(count=1)):\n"
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
