"""The shape of the code, read from its source: who imports whom.

`ROOMS` is the table of docs/DESIGN section 4. Nothing here runs the package, but one subprocess.
"""

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "dit_jax"
FILES = sorted((ROOT / PACKAGE).rglob("*.py"))

FOREIGN = {"tensorflow", "torch"}

VERBS = {"train", "sample", "prepare", "evaluate", "convert", "plan"}
PARTS = {"models", "diffusion", "parallel", "data"}
ROOMS = {
    "types": set(),
    **{part: {"types"} for part in PARTS},
    "interop": {"types", "models"},
    "config": {"types"},
    "training": {"types", "config"} | PARTS,
    "sampling": {"types", "config"} | PARTS,
    "evaluation": {"types", "config", "interop", "training", "sampling"} | PARTS,
    "tasks": {"types", "config", "interop", "training", "sampling", "evaluation"} | PARTS,
    "preparation": {"types", "data"},
    "planning": {"types", "config", "parallel", "models", "training", "sampling", "tasks"},
}
ANYWHERE = {"files", "video", "checks"}
EVERYTHING = set(ROOMS) | ANYWHERE
# From these rooms `config` may take names ending in Config and UPPERCASE presets, nothing else.
CONFIGURED = PARTS | {"training", "sampling", "evaluation"}
CONFIG_NAME = re.compile(r"[A-Z]\w*Config|[A-Z][A-Z0-9_]*")


def module_name(path: Path, root: Path = ROOT) -> str:
    """`dit_jax/models/dit.py` -> `dit_jax.models.dit`; an `__init__.py` names its package."""
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(source: str, module: str, is_package: bool) -> Iterator[tuple[int, str, str | None]]:
    """Yields (line, module, name) of every import at any depth, relative ones resolved.

    name is None for `import module`. A literal `importlib.import_module` or `__import__` counts.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name, None
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")
                parents = parents[: len(parents) - node.level + is_package]
                base = ".".join([*parents, *filter(None, [node.module])])
            for alias in node.names:
                yield node.lineno, base, alias.name
        elif isinstance(node, ast.Call) and node.args:
            called = getattr(node.func, "attr", getattr(node.func, "id", ""))
            first = node.args[0]
            if called in ("import_module", "__import__") and isinstance(first, ast.Constant):
                yield node.lineno, str(first.value), None


def refusal(room: str, module: str, name: str | None) -> str | None:
    """Why `room` may not import `name` from `module` of ours; None if it may.

    `room` is a room, a verb, or "" for the package's own `__init__`.
    """
    parts = module.split(".")
    if len(parts) == 1 and name in EVERYTHING | VERBS:
        parts, name = [PACKAGE, name], None  # from dit_jax import models
    if len(parts) == 1:
        return f"imports {name or PACKAGE} from the package itself; import it from its room"
    target = parts[1]
    if target in VERBS:
        return f"imports the verb {target}; nothing may"
    if target not in EVERYTHING:
        return f"imports {target}, which is in no table; add it to ROOMS and DESIGN section 4"
    allowed = ROOMS.get(room, EVERYTHING)
    if target == room or target in allowed | ANYWHERE and room != "types":
        return None
    if room == "config" and target in CONFIGURED:
        if name is not None and CONFIG_NAME.fullmatch(name):
            return None
        return f"imports {name or module} from {target}; only names ending in Config or UPPERCASE"
    return f"imports {target}; {room} may import {sorted(allowed) or 'nothing of ours'}"


def violations(source: str, module: str, is_package: bool = False) -> list[str]:
    """One line for each forbidden import of ours in a module's source."""
    room = (module.split(".") + [""])[1]
    if room not in EVERYTHING | VERBS | {""}:
        return [f"{module}: room {room} is in no table; add it to ROOMS and DESIGN section 4"]
    found = []
    for line, target, name in imports(source, module, is_package):
        if target.split(".")[0] == PACKAGE and (why := refusal(room, target, name)):
            found.append(f"{module}:{line} {why}")
    return found


def test_every_room_keeps_to_its_imports():
    found = []
    for path in FILES:
        found += violations(path.read_text(), module_name(path), path.name == "__init__.py")
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize(
    "module, source",
    [
        ("dit_jax.types", "import dit_jax.models"),
        ("dit_jax.models.dit", "from dit_jax.diffusion import paths"),
        ("dit_jax.models.dit", "from dit_jax import diffusion"),
        ("dit_jax.models.dit", "from ..diffusion.paths import sigma"),
        ("dit_jax.models.dit", "from .. import data"),
        ("dit_jax.models.dit", "from dit_jax.config import Config"),
        ("dit_jax.models.dit", "from dit_jax import DiT"),
        ("dit_jax.models.dit", "import dit_jax"),
        ("dit_jax.models.dit", "def f():\n    import dit_jax.parallel.mesh as m"),
        ("dit_jax.models.dit", "import importlib\nimportlib.import_module('dit_jax.data')"),
        ("dit_jax.models.dit", "if TYPE_CHECKING:\n    from dit_jax.data import Loader"),
        ("dit_jax.data.loader", "from dit_jax.models import codec"),
        ("dit_jax.interop.maps", "from dit_jax.training import state"),
        ("dit_jax.config", "from dit_jax.models import DiT"),
        ("dit_jax.config", "from dit_jax.models import *"),
        ("dit_jax.config", "from dit_jax.models.dit import make_config, DiTConfig"),
        ("dit_jax.config", "import dit_jax.models.dit"),
        ("dit_jax.config", "from dit_jax.interop import MapConfig"),
        ("dit_jax.training.step", "from dit_jax.sampling import media"),
        ("dit_jax.sampling.modes", "import dit_jax.training.state"),
        ("dit_jax.sampling.modes", "from dit_jax.interop import maps"),
        ("dit_jax.evaluation.fid", "from dit_jax.tasks import codec"),
        ("dit_jax.tasks.codec", "from dit_jax.train import main"),
        ("dit_jax.sample", "from dit_jax import train"),
        ("dit_jax.sample", "from .train import main"),
        ("dit_jax.helpers.text", "import os"),
        ("dit_jax.sample", "from dit_jax.helpers import text"),
        ("dit_jax", "from dit_jax.train import main"),
    ],
)
def test_a_forbidden_import_is_caught(module, source):
    assert len(violations(source, module)) == 1


def test_a_forbidden_relative_import_of_a_package_is_caught():
    assert violations("from ..diffusion import paths", "dit_jax.models", is_package=True)
    assert not violations("from .diffusion import paths", "dit_jax.models", is_package=True)


@pytest.mark.parametrize(
    "module, source",
    [
        ("dit_jax.types", "import numpy, jax.numpy as jnp"),
        (
            "dit_jax.models.dit",
            "from dit_jax import types\nfrom .patch import Patch\nfrom . import a",
        ),
        ("dit_jax.models.text.t5", "from ..patch import Patch\nfrom ...types import Batch"),
        ("dit_jax.interop.maps", "from dit_jax.models.dit import DiT"),
        ("dit_jax.config", "from dit_jax.models import DiTConfig, DIT_XL_2\nimport dit_jax.types"),
        ("dit_jax.config", "from .training.state import OptimizerConfig as Optimizer"),
        (
            "dit_jax.training.step",
            "from dit_jax.config import Config\nimport dit_jax.parallel.mesh",
        ),
        ("dit_jax.evaluation.fid", "from dit_jax import sampling, training, interop"),
        ("dit_jax.tasks.codec", "from ..evaluation import fid\nfrom ..models import codec"),
        ("dit_jax.train", "from dit_jax.tasks import codec\nfrom dit_jax import data, config"),
        ("dit_jax.models.dit", "import dit_jaxlike, train\nfrom sample import x"),
    ],
)
def test_an_allowed_import_is_left_alone(module, source):
    assert violations(source, module) == []


def init_faults(source: str) -> list[str]:
    """What an `__init__.py` holds besides a docstring, explicit imports and a true `__all__`."""
    body = ast.parse(source).body
    faults = [] if body and ast.get_docstring(ast.parse(source)) else ["no docstring"]
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


def foreign_imports(source: str, module: str) -> set[str]:
    """The other frameworks a source imports (`tensorflow_datasets` is not one of them)."""
    return {target.split(".")[0] for _, target, _ in imports(source, module, False)} & FOREIGN


def test_no_other_framework_is_imported():
    found = {str(p): foreign_imports(p.read_text(), module_name(p)) for p in FILES}
    assert not any(found.values()), {path: names for path, names in found.items() if names}
    assert foreign_imports("def f():\n    import torch.nn as nn", "dit_jax.x") == {"torch"}
    assert foreign_imports("from tensorflow.io import gfile", "dit_jax.x") == {"tensorflow"}
    assert foreign_imports("import tensorflow_datasets as tfds", "dit_jax.x") == set()


def test_importing_media_loads_no_other_framework():
    code = f"import sys, dit_jax.sampling.media; print({FOREIGN!r} & set(sys.modules))"
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "set()"
