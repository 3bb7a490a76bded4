"""What the first and the second start of sampling take, from the command to the file, and of it what.

    python benchmarks/start.py --checkpoint runs/quickstart --prompt "a big green cross moves up"

All options are those of ``dit_jax.sample``. The first start has an empty cache of compiled programs.
Seconds of CPU are those of all threads; what lies inside another part is not counted twice.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

MEASURED = """
import collections, json, os, sys, time
wall, cpu = collections.Counter(), collections.Counter()
clock = [time.time() - float(sys.argv.pop(1)), time.process_time()]
wall["starting Python"], cpu["starting Python"] = clock
clock = [time.perf_counter(), time.process_time()]

def lap(name):
    now = [time.perf_counter(), time.process_time()]
    wall[name] += now[0] - clock[0]
    cpu[name] += now[1] - clock[1]
    clock[:] = now

import jax
lap("importing JAX")
from dit_jax import parallel, sample
from dit_jax.sampling import media, pipeline, sampler
lap("importing the rest")
names = {"jaxpr_trace_duration": "tracing", "jaxpr_to_mlir_module_duration": "lowering",
         "backend_compile_duration": "compiling, or reading programs"}
inner, counts = collections.Counter(), collections.Counter()
def event(name, seconds, **_):
    inner[names.get(name.split("/")[-1], "")] += seconds
jax.monitoring.register_event_duration_secs_listener(event)
jax.monitoring.register_event_listener(lambda name, **_: counts.update([name.split("/")[-1]]))

def timed(owner, name, part):
    function = getattr(owner, name)
    def call(*arguments, **options):
        lap("options, config and the rest")
        out = function(*arguments, **options)
        lap(part)
        return out
    setattr(owner, name, call)

timed(pipeline.Pipeline, "_restore", "reading the checkpoint")
timed(sampler.Generator, "__call__", "sampling, with its programs")
timed(media, "write_video", "writing the file")
parallel.tune_cpu()
status = sample.main(sys.argv[1:])
lap("options, config and the rest")
kinds = {one: counts[f"cache_{one}"] for one in ("misses", "hits")}
print(json.dumps([wall, cpu, inner, kinds]))
raise SystemExit(status)
"""


def start(arguments: list[str], cache: str) -> tuple[float, list[Mapping[str, float]]]:
    """Seconds from the command to its end, and what the process measured."""
    drop = ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS")
    env = {key: value for key, value in os.environ.items() if key not in drop}
    begin = time.time()
    command = [sys.executable, "-c", MEASURED, str(begin), *arguments]
    out = subprocess.run(
        command, env=env | {"XDG_CACHE_HOME": cache}, check=True, stdout=subprocess.PIPE
    )
    return time.time() - begin, json.loads(out.stdout.splitlines()[-1])


def main() -> None:
    """Prints both starts."""
    with tempfile.TemporaryDirectory() as scratch:
        arguments = [*sys.argv[1:], "--output", str(Path(scratch) / "clip.mp4")]
        for name in ("first", "second"):
            total, (wall, cpu, inner, kinds) = start(arguments, scratch)
            print(f"{name} start: {total:.1f} s, {sum(cpu.values()):.1f} of CPU; programs: {kinds}")
            for part, seconds in wall.items():
                print(f"  {seconds:6.2f} s, {cpu[part]:6.2f} of CPU  {part}")
            for part in filter(None, inner):
                print(f"     of it {inner[part]:6.2f} s {part}")


if __name__ == "__main__":
    main()
