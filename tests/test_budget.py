"""Files and functions stay small enough to be read at one sitting: hard limits here, soft ones are listed in the report of -rP."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
ROOMS = ("api", "compiler", "passes", "runtime", "tests", "benchmarks", "docs")
FILE, FUNCTION, PARAMETERS = 400, 80, 6
SOFT_FILE, SOFT_FUNCTION = 300, 45
SIGNATURES_OF_ATEN = (
    "compiler/verify/ring/ops/",  # exact versions of ATen ops, called with the arguments of the graph
    "compiler/verify/types/",  # typing rules, called likewise
    "compiler/capture/recorder.py",  # a decomposition, called in place of the op
)
"""Places whose parameter lists are those of ATen ops, and not ours to choose."""

Function = ast.FunctionDef | ast.AsyncFunctionDef


def files() -> list[Path]:
    return sorted(file for room in ROOMS for file in (ROOT / room).rglob("*.py"))


def functions() -> Iterator[tuple[str, Function]]:
    for file in files():
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, Function):
                yield f"{file.relative_to(ROOT)}:{node.lineno} {node.name}", node


def length(node: Function) -> int:
    """Lines, the docstring left out: documentation is not a burden."""
    assert node.end_lineno is not None
    first = node.body[0]
    documented = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str)
    docstring = (first.end_lineno or 0) - first.lineno + 1 if documented else 0
    return node.end_lineno - node.lineno + 1 - docstring


def test_the_walk_finds_the_code() -> None:
    assert len(files()) > 100


def test_files_fit() -> None:
    sizes = {str(file.relative_to(ROOT)): len(file.read_text().splitlines()) for file in files()}
    print("over the soft budget:", {name: size for name, size in sizes.items() if size > SOFT_FILE})
    assert not {name: size for name, size in sizes.items() if size > FILE}


def test_functions_fit() -> None:
    sizes = {where: length(node) for where, node in functions()}
    print("over the soft budget:", {where: size for where, size in sizes.items() if size > SOFT_FUNCTION})
    assert not {where: size for where, size in sizes.items() if size > FUNCTION}


def test_parameter_lists_fit() -> None:
    """Positional ones: a keyword says at the call what it is. Tests take fixtures and drawn values, which nobody passes by hand."""
    counts = {}
    for where, node in functions():
        names = [a.arg for a in (*node.args.posonlyargs, *node.args.args) if a.arg not in ("self", "cls")]
        if not where.startswith((*SIGNATURES_OF_ATEN, "tests/")):
            counts[where] = len(names)
    assert not {where: count for where, count in counts.items() if count > PARAMETERS}
