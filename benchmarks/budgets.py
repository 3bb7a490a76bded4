"""The sizes that docs/DESIGN.md promises (section 4), as they are, each beside its bound.

    python benchmarks/budgets.py

Counted from the source; the frames between the train step and a matrix product are read from the
traceback of a product while a small step is traced. Exit status 1 if a bound is passed.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
ROOMS = {"data", "model", "diffusion", "parallel", "training", "sampling"}
SATELLITES = {
    "codec": 1600,
    "text": 450,
    "interop": 1500,
    "evaluate": 1400,
    "prepare": 3750,
    "plan": 1400,
    "upscale": 250,
    "wan": 850,
    "lora": 800,
}
"""Satellites, and how many lines of code each may have; interop's with its verb, ``convert.py``."""
NEW = {"wan", "lora"}
"""Capabilities that came after the second edition: the bound of the package is without them."""


class Row(NamedTuple):
    """One line of the table."""

    name: str
    value: float
    bound: str
    within: bool


def sources(folder: str) -> dict[Path, str]:
    """Every Python file below a folder of the repository, by its path, with its text."""
    return {p.relative_to(ROOT): p.read_text() for p in sorted((ROOT / folder).rglob("*.py"))}


def room(path: Path) -> str:
    """The room or the module directly below the package that a file belongs to."""
    return path.parts[1].removesuffix(".py")


def is_core(path: Path) -> bool:
    """Everything in the package but the satellites and their verbs."""
    return room(path) not in SATELLITES.keys() | {"convert"}


def lines(files: dict[Path, str]) -> int:
    """Lines of all files together."""
    return sum(text.count("\n") for text in files.values())


def code(files: dict[Path, str]) -> int:
    """Lines that hold code: neither blank nor a comment nor part of a docstring."""
    count = 0
    for text in files.values():
        documented: set[int] = set()
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
                if isinstance(node.value.value, str):
                    documented.update(range(node.lineno, (node.end_lineno or 0) + 1))
        for number, line in enumerate(text.split("\n"), 1):
            blank_or_comment = not line.strip() or line.strip().startswith("#")
            count += not blank_or_comment and number not in documented
    return count


def raises(files: dict[Path, str]) -> float:
    """``raise`` statements per 1,000 lines."""
    count = sum(len(re.findall(r"^\s*raise\b", text, re.M)) for text in files.values())
    return 1000 * count / max(lines(files), 1)


def comments(files: dict[Path, str]) -> float:
    """Comment lines per other line that is not blank."""
    stripped = [line.strip() for text in files.values() for line in text.split("\n")]
    written = [line for line in stripped if line]
    count = sum(line.startswith("#") for line in written)
    return count / max(len(written) - count, 1)


def modules_loaded(package: dict[Path, str], verb: str = "dit_jax.train") -> set[str]:
    """Our modules that importing the verb loads: those imported at the top of each, in turn."""
    names = {".".join(p.with_suffix("").parts).removesuffix(".__init__"): p for p in package}
    loaded: set[str] = set()

    def visit(name: str) -> None:
        while name and name not in names:
            name = name.rpartition(".")[0]
        if not name or name in loaded:
            return
        loaded.add(name)
        for i in range(1, name.count(".") + 1):
            visit(".".join(name.split(".")[:i]))
        for node in ast.parse(package[names[name]]).body:
            if isinstance(node, ast.Import):
                for alias in node.names:
                    visit(alias.name if alias.name.startswith("dit_jax") else "")
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("dit_jax"):
                visit(node.module or "")
                for alias in node.names:
                    one = f"{node.module}.{alias.name}"
                    visit(one if one in names else "")

    visit(verb)
    return loaded


def frames_to_product() -> list[tuple[str, str]]:
    """Our (file, function) on the stack from the train step of the quickstart to a product of a block's
    MLP, as traced for two devices that share rows.

    There, as on accelerators, the product is ``jax.lax.dot_general``; on one CPU device
    ``parallel.matmul.flat_dot_general`` stands between.
    """
    sys.path.insert(0, str(ROOT))
    import jax

    jax.config.update("jax_num_cpu_devices", 2)
    from configs.quickstart import get_config
    from dit_jax.parallel import MeshConfig, local_rows, make_mesh
    from dit_jax.training import abstract_state, make_optimizer, make_step

    config = get_config()
    mesh = make_mesh(MeshConfig(data=1, context=2))
    task = config.build(mesh)
    optimizer = make_optimizer(config.optimizer, config.steps)
    shapes, shardings = abstract_state(task.init, optimizer, mesh)
    step = make_step(task.loss, optimizer, config.optimizer, config.seed, shardings)
    loader = task.loader(local_rows(mesh, config.rows))
    jaxpr = jax.make_jaxpr(step)(shapes, next(loader), {})
    loader.close()

    def products(jaxpr: Any, outer: list[tuple[str, str]]) -> Iterator[list[tuple[str, str]]]:
        """The stacks of all products, those in inner programs too, whose stacks may begin anew."""
        for equation in jaxpr.eqns:
            stack = equation.source_info.traceback.frames
            stack = [f for f in stack if f.file_name.startswith(str(ROOT / "dit_jax"))]
            own = [(Path(f.file_name).name, f.function_name) for f in stack]
            own += outer if own[-1:] != outer[-1:] else []
            if equation.primitive.name == "dot_general":
                yield own
            for value in equation.params.values():
                inner = getattr(value, "jaxpr", value)
                yield from products(inner, own) if hasattr(inner, "eqns") else ()

    stacks = list(products(jaxpr.jaxpr, []))
    of_blocks = [s for s in stacks if {"DiTBlock.__call__", "MLP.__call__"} <= {f for _, f in s}]
    return max(of_blocks, key=len)


def rows() -> list[Row]:
    """The table of docs/DESIGN.md, section 4, counted."""
    package, tests = sources("dit_jax"), sources("tests")
    core = {path: text for path, text in package.items() if is_core(path)}
    loaded = len(modules_loaded(package))
    core_code = code(core)
    total = code({path: text for path, text in package.items() if room(path) not in NEW})
    share, ratio = comments(core), lines(tests) / lines(package)
    frames = frames_to_product()
    files = len({file for file, _ in frames})
    table = [
        Row("core, lines of code", core_code, "6,850", core_code <= 6850),
        Row("core, files", len(core), "41", len(core) <= 41),
        Row("modules that `import dit_jax.train` loads", loaded, "45", loaded <= 45),
        Row("own frames from step to product", len(frames), "8", len(frames) <= 8),
        Row("files of these frames", files, "4", files <= 4),
        Row("core, raises per 1,000 lines", raises(core), "8", raises(core) <= 8),
        Row("core, comment lines per code line", share, "0.05-0.10", 0.05 <= share <= 0.10),
        Row("package but wan and lora, lines of code", total, "16,500", total <= 16500),
        Row("package, raises per 1,000 lines", raises(package), "8", raises(package) <= 8),
        Row("tests, lines per package line", ratio, "1.05", ratio <= 1.05),
    ]
    for name, bound in SATELLITES.items():
        rooms = {"interop", "convert"} if name == "interop" else {name}
        count = code({path: text for path, text in package.items() if room(path) in rooms})
        table.append(Row(f"{name}, lines of code", count, f"{bound:,}", count <= bound))
    return table


def main() -> int:
    """Prints the table; 1 if a bound is passed."""
    table = rows()
    for row in table:
        value = f"{row.value:,.0f}" if row.value >= 30 else f"{row.value:.3g}"
        print(f"{row.name:45} {value:>8}  bound {row.bound:>9}  {'ok' if row.within else 'ABOVE'}")
    package = sources("dit_jax")
    print(f"package, with docstrings, comments and blank lines: {lines(package):,} lines")
    whole = lines({path: text for path, text in package.items() if is_core(path)})
    print(f"core, with docstrings, comments and blank lines: {whole:,} lines")
    for name in sorted({room(path) for path in package if is_core(path)}):
        part = {path: text for path, text in package.items() if room(path) == name}
        print(
            f"  {name:12} {len(part):3} files {lines(part):6,} lines {raises(part):5.1f} raises/1,000"
        )
    return int(not all(row.within for row in table))


if __name__ == "__main__":
    sys.exit(main())
