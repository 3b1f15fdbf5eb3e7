"""Engines by name."""

from __future__ import annotations

from collections.abc import Callable

from ...runtime.engines.base import Engine
from ...runtime.mesh import Mesh
from ..errors import InputError

ENGINES = ("local", "sim", "attach")


def engine_opener(engine: str | Engine, mesh: Mesh) -> Callable[[], Engine]:
    """A function that opens the engine of that name for a mesh, or gives the one passed in. InputError for a wrong name or mesh.

    For ``local`` the first rank process begins to load at once, in the background; opening waits for it.
    """
    match engine:
        case "local":
            from ...runtime.engines.local import LocalEngine
            from ...runtime.launcher import warm_up

            warm_up()
            return lambda: LocalEngine(mesh)
        case "sim":
            from ...runtime.engines.sim import SimEngine

            return lambda: SimEngine(mesh)
        case "attach":
            from ...runtime.engines.attach import AttachEngine

            return lambda: AttachEngine(mesh)
        case str():
            raise InputError(f"engine must be one of {', '.join(ENGINES)} or an Engine; found {engine!r}")
    given = engine
    if given.mesh != mesh:
        raise InputError(f"the engine was made for mesh {given.mesh}, the module asks for {mesh}")
    return lambda: given
