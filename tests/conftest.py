"""Eight emulated CPU devices for every test, set before JAX makes its backend."""

import fcntl
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest
from jaxtyping import install_import_hook

from tests.runs import Ended, Run, Verbs, end, free_port

jax.config.update("jax_num_cpu_devices", 8)
# What tests compile runs for milliseconds, and compiling it so takes a fraction of the time. The
# processes that they start do the same: what is compared bit by bit is compiled alike.
QUICK = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
)
if "--xla_backend_optimization_level" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {QUICK}".strip()
# What one test compiles, its neighbours, the processes that they start and the next session find again.
CACHE = Path(__file__).parents[1] / ".pytest_cache" / "jax"
for name, value in (
    ("COMPILATION_CACHE_DIR", str(CACHE)),
    ("PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", 0),
):
    if f"JAX_{name}" not in os.environ:
        os.environ[f"JAX_{name}"] = str(value)  # for processes
        jax.config.update(f"jax_{name.lower()}", value)

# Under `-m core` and `-m slow` the annotated shapes and dtypes of these rooms are checked at every call
# from here on (once per trace where a function is compiled); an int may stand for a float, as for type
# checkers. It makes tracing a model half as long again, so the default suite does without.
CHECKED = "dit_jax.model dit_jax.diffusion dit_jax.text.t5 " + " ".join(
    f"dit_jax.codec.{name}"
    for name in ("causal_autoencoder", "codec", "reconstruction_loss", "vgg")
)
if {"core", "slow"} & {*sys.argv}:
    os.environ["DIT_JAX_CHECK_SHAPES"] = "1"  # for pytest's workers
if "DIT_JAX_CHECK_SHAPES" in os.environ:
    checker = "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"
    install_import_hook(CHECKED.split(), checker)
# Imported below the hook, which checks only what is imported after it.
from tests.latents import latent_records, latents  # noqa: E402, F401

# One room's own tests each, all in one process in two minutes: what one runs while working.
CORE = ("test_imports.py", "data/", "diffusion/", "model/test_dit.py", "model/test_blocks.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks the tests of CORE."""
    tests = Path(__file__).parent
    for item in items:
        path = item.path.relative_to(tests).as_posix()
        if path.startswith(CORE) and not item.get_closest_marker("slow"):
            item.add_marker("core")


@pytest.fixture
def checked() -> None:
    """For tests of what the check of shapes finds."""
    if "DIT_JAX_CHECK_SHAPES" not in os.environ:
        pytest.skip("shapes are checked under -m core")


@pytest.fixture(scope="session")
def verbs(tmp_path_factory: pytest.TempPathFactory) -> Verbs:
    """Starts processes, which share what they compile with all others and the next session."""
    return Verbs(Path(os.environ["JAX_COMPILATION_CACHE_DIR"]), tmp_path_factory.mktemp("logs"))


def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of this session, the same for all of pytest's workers."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


@pytest.fixture
def one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test runs in this process has one device: a step over eight takes longer to compile."""
    first = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda: first)
    monkeypatch.setattr(jax, "local_devices", lambda: first)


@pytest.fixture(scope="session")
def whole(verbs: Verbs, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The run of the tiny config that nothing interrupted, which the first worker to ask makes."""
    directory = shared(tmp_path_factory) / "whole"
    directory.mkdir(exist_ok=True)
    said = directory / "said.json"
    with (directory / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not said.exists():
            (ended,) = end(verbs.train(directory / "run"))
            said.write_text(json.dumps([ended.status, ended.text]))
    return Run(directory / "run", ended=[Ended(*json.loads(said.read_text()))])


@pytest.fixture(scope="session")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """``gs://NAME`` of an emulator of Cloud Storage on loopback, for this process and its children."""
    pytest.importorskip("gcp_storage_emulator")
    port = free_port()
    log = tmp_path_factory.mktemp("emulator") / "log"
    with log.open("wb") as file:
        server = subprocess.Popen(
            [sys.executable, Path(__file__).with_name("storage_server.py"), str(port), "clips"],
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    address = f"http://127.0.0.1:{port}"
    names = {"STORAGE_EMULATOR_HOST": address, "TENSORSTORE_GCS_HTTP_URL": address}
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(names)
    try:
        for _ in range(100):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        else:
            raise RuntimeError(log.read_text())
        yield "gs://clips"
    finally:
        server.kill()
        server.wait()
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
