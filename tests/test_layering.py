"""Dependencies point one way: runtime knows nothing of the others, passes know programs and not engines, compiler wires them."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PASSES_MAY_IMPORT = {
    "chains",
    "collector",
    "program",
    "layout",
    "rules",
    "cost",
    "contract",
    "redistribute",
    "errors",
    "plan",
    "stages",
    "tiles",
}
MAY_IMPORT_PASSES = {"doors", "cli", "demo", "report", "passmanager"}


def imports(room: str) -> Iterator[tuple[str, str]]:
    """(file, absolute name of what it imports) for every import of hocket in a room, those inside functions included."""
    for file in sorted((ROOT / room).rglob("*.py")):
        place = file.relative_to(ROOT / room)
        package = ("hocket", *(() if room == "api" else (room,)), *place.parts[:-1])
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                base = package[: len(package) - node.level + 1] if node.level else ()
                stem = ".".join((*base, *([node.module] if node.module else [])))
                names = [stem, *(f"{stem}.{alias.name}" for alias in node.names)]
            else:
                continue
            yield from ((f"{room}/{place}", name) for name in names if name.split(".")[0] == "hocket")


def test_the_walk_sees_the_imports_it_is_about() -> None:
    assert ("compiler/doors/hall.py", "hocket.passes.shard") in set(imports("compiler"))
    assert ("passes/shard.py", "hocket.compiler.plan.plan") in set(imports("passes"))


def test_runtime_imports_nothing_of_the_other_rooms() -> None:
    allowed = {"hocket", "hocket.runtime"}
    wrong = [(file, name) for file, name in imports("runtime") if ".".join(name.split(".")[:2]) not in allowed]
    assert not wrong


def test_passes_import_programs_rules_costs_and_contracts_only() -> None:
    wrong = []
    for file, name in imports("passes"):
        room, *rest = name.split(".")[1:] or [""]
        is_known = room == "passes" or (room == "compiler" and (not rest or rest[0] in PASSES_MAY_IMPORT))
        if not is_known and name != "hocket.runtime" and not name.startswith("hocket.runtime.mesh"):
            wrong.append((file, name))
    assert not wrong


def test_only_the_doors_and_what_stands_before_them_import_passes() -> None:
    wrong = [
        (file, name)
        for file, name in imports("compiler")
        if name.startswith("hocket.passes") and Path(file).parts[1].removesuffix(".py") not in MAY_IMPORT_PASSES
    ]
    assert not wrong


@pytest.mark.parametrize("room", ["compiler", "passes", "runtime"])
def test_no_room_imports_the_public_face(room: str) -> None:
    """It would be a circle; what the face gives out lives in the rooms."""
    public = ("hocket.errors", "hocket.__main__")
    assert not [(file, name) for file, name in imports(room) if name.startswith(public)]


def test_a_rank_process_loads_neither_the_compiler_nor_sympy() -> None:
    """Ranks start in a fraction of the time, and a fault in the compiler cannot touch them."""
    code = (
        "import sys, hocket.runtime.worker\n"
        "print([n for n in sys.modules if n.startswith(('hocket.compiler', 'hocket.passes', 'rich'))])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240, check=True)
    assert done.stdout.strip() == "[]"
