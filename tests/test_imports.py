"""The shape of the code, read from its source: who imports whom.

The core never imports a satellite; a satellite imports the core and, of the others, `interop` alone.
Nothing here runs the package, but one process imports it.
"""

import ast
import functools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "dit_jax"
FILES = sorted((ROOT / PACKAGE).rglob("*.py"))

FOREIGN = {"tensorflow", "torch"}
CORE = {"train", "sample", "config", "types", "files", "video"}
CORE |= {"data", "model", "diffusion", "parallel", "training", "sampling"}
SATELLITES = {"codec", "text", "interop", "convert", "evaluate", "prepare", "plan", "upscale"}
SATELLITES |= {"wan", "lora"}
VERBS = {"train", "sample", "convert"}


def module_name(path: Path) -> str:
    """`dit_jax/models/dit.py` -> `dit_jax.models.dit`; an `__init__.py` names its package."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@functools.cache
def parsed(source: str) -> ast.Module:
    return ast.parse(source)


def imports(source: str, module: str, is_package: bool) -> Iterator[tuple[str, str | None]]:
    """Yields (module, name) of every import at any depth, relative ones resolved.

    name is None for `import module`. A literal `importlib.import_module` or `__import__` counts.
    """
    for node in ast.walk(parsed(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, None
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")
                parents = parents[: len(parents) - node.level + is_package]
                base = ".".join([*parents, *filter(None, [node.module])])
            for alias in node.names:
                yield base, alias.name
        elif isinstance(node, ast.Call) and node.args:
            called = getattr(node.func, "attr", getattr(node.func, "id", ""))
            first = node.args[0]
            if called in ("import_module", "__import__") and isinstance(first, ast.Constant):
                yield str(first.value), None


def refusal(room: str, target: str) -> str | None:
    """Why a module of `room` may not import one of `target`; None if it may."""
    if target not in CORE | SATELLITES:
        return f"imports {target}, which is neither core nor a satellite: add it to docs/DESIGN.md"
    if target in VERBS and room != target:
        return f"imports the verb {target}; nothing may"
    if room in CORE and target in SATELLITES:
        return f"imports the satellite {target}; the core may not"
    if room in SATELLITES and target in SATELLITES - {room, "interop"}:
        return f"imports the satellite {target}; {room} may import the core and interop"
    return None


def violations(source: str, module: str, is_package: bool = False) -> set[str]:
    """A line for each forbidden import of ours in a module's source."""
    room = (module.split(".") + [""])[1]
    out = set()
    for target, name in imports(source, module, is_package):
        first, *rest = target.split(".")
        if first == PACKAGE and (why := refusal(room, rest[0] if rest else name or "")):
            out.add(f"{module} {why}")
    return out


def test_the_core_imports_no_satellite_and_satellites_no_other():
    found = set()
    for path in FILES:
        found |= violations(path.read_text(), module_name(path), path.name == "__init__.py")
    assert not found, "\n" + "\n".join(sorted(found))


@pytest.mark.parametrize(
    "module, source",
    [
        ("dit_jax.model.dit", "import dit_jax.codec.vgg"),
        ("dit_jax.model.dit", "from dit_jax import codec"),
        ("dit_jax.model.dit", "from ..codec.vgg import x"),
        ("dit_jax.model.dit", "from .. import text"),
        ("dit_jax.train", "def f():\n    import dit_jax.prepare.chat as m"),
        ("dit_jax.train", "import importlib\nimportlib.import_module('dit_jax.codec')"),
        ("dit_jax.train", "if TYPE_CHECKING:\n    from dit_jax.evaluate import judge"),
        ("dit_jax.codec.train", "from dit_jax.text import t5"),
        ("dit_jax.codec.train", "from dit_jax.train import main"),
        ("dit_jax.sample", "from dit_jax import train"),
        ("dit_jax.sample", "from dit_jax.helpers import text"),
    ],
)
def test_a_forbidden_import_is_caught(module, source):
    assert len(violations(source, module)) == 1


@pytest.mark.parametrize(
    "module, source",
    [
        ("dit_jax.types", "import numpy, jax.numpy as jnp"),
        ("dit_jax.model.dit", "from dit_jax import types\nfrom .patch import Patch"),
        ("dit_jax.codec.train", "from dit_jax.interop import maps\nfrom dit_jax.config import Run"),
        ("dit_jax.model.dit", "import dit_jaxlike, train\nfrom sample import x"),
    ],
)
def test_an_allowed_import_is_left_alone(module, source):
    assert violations(source, module) == set()


def init_faults(source: str) -> list[str]:
    """What an `__init__.py` holds besides a docstring, explicit imports and a true `__all__`."""
    body = parsed(source).body
    faults = [] if ast.get_docstring(parsed(source)) else ["no docstring"]
    names, exported = set(), []
    for node in body[1:] if not faults else body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
        elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            exported = ast.literal_eval(node.value)
        else:
            faults.append(f"line {node.lineno}: {ast.unparse(node).splitlines()[0]}")
    if "*" in names:
        faults.append("import *: name what is exported")
    return faults + [f"__all__ has {name}, not imported" for name in set(exported) - names]


def test_inits_only_re_export():
    faults = {str(p): init_faults(p.read_text()) for p in FILES if p.name == "__init__.py"}
    assert not any(faults.values()), {path: fault for path, fault in faults.items() if fault}


def test_a_busy_init_is_caught():
    assert init_faults('"""Doc."""\n\nfrom .a import b, c as d\n\n__all__ = ["b", "d"]\n') == []
    assert init_faults("from .a import b\n") == ["no docstring"]
    for line in ("x = 1", "def f(): pass", "from .a import *", "__all__ = ['q']", "print()"):
        assert len(init_faults(f'"""Doc."""\n{line}\n')) == 1, line


def foreign_imports(source: str) -> set[str]:
    """The other frameworks a source imports (`tensorflow_datasets` is not one of them)."""
    return {target.split(".")[0] for target, _ in imports(source, "", False)} & FOREIGN


def test_no_other_framework_is_imported():
    found = {str(path): foreign_imports(path.read_text()) for path in FILES}
    assert not any(found.values()), {path: names for path, names in found.items() if names}
    assert foreign_imports("def f():\n    import torch.nn as nn") == {"torch"}
    assert foreign_imports("from tensorflow.io import gfile") == {"tensorflow"}
    assert foreign_imports("import tensorflow_datasets as tfds") == set()


def test_importing_the_verbs_loads_no_other_framework():
    """This file's process may have loaded them for other tests, so that a new one is asked."""
    code = f"import sys, dit_jax.sample; assert not {FOREIGN!r} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)


def test_processes_that_decode_media_start_without_jax():
    """A thousand files a process: what it imports is a third of what 4,000 pictures take."""
    code = "import sys, dit_jax.prepare.stages; assert not {'jax', 'flax'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)
