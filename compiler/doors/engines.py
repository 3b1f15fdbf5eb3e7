"""Engines by name."""

from __future__ import annotations

from ...runtime.engines.base import Engine
from ...runtime.mesh import Mesh
from ..errors import InputError

ENGINES = ("local", "sim", "attach")


def make_engine(engine: str | Engine, mesh: Mesh) -> Engine:
    """The engine of that name for a mesh, or the given one if it is for that mesh. InputError otherwise."""
    match engine:
        case "local":
            from ...runtime.engines.local import LocalEngine

            return LocalEngine(mesh)
        case "sim":
            from ...runtime.engines.sim import SimEngine

            return SimEngine(mesh)
        case "attach":
            from ...runtime.engines.attach import AttachEngine

            return AttachEngine(mesh)
        case str():
            raise InputError(f"engine must be one of {', '.join(ENGINES)} or an Engine; found {engine!r}")
    assert not isinstance(engine, str), "all names are handled above"
    if engine.mesh != mesh:
        raise InputError(f"the engine was made for mesh {engine.mesh}, the module asks for {mesh}")
    return engine
