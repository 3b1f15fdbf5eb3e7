"""Engines by name."""

from __future__ import annotations

import os
from collections.abc import Callable

from ...runtime.engines.base import Engine
from ...runtime.mesh import Mesh
from ...runtime.transports.link import LinkSpec, check_transport
from ..cost.cluster import Cluster
from ..errors import InputError

ENGINES = ("local", "sim", "attach")


def _check_number_of_processes(mesh: Mesh) -> None:
    """A mesh of a cluster's size given to one machine is a mistake, and would take the machine down."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    most = max(64, 8 * cores)
    if mesh.size > most:
        raise InputError(
            f"mesh {mesh} has {mesh.size} ranks; engine='local' starts at most {most} processes on {cores} cores: "
            "check the plan with `hocket plan` or engine='sim', and run it with engine='attach' on machines that have the devices"
        )


def cluster_of(engine: str | Engine, transport: str) -> Cluster:
    """What the planner believes of this machine; of the link, where the engine is or will be one that emulates one."""
    link = check_transport(transport if isinstance(engine, str) else getattr(engine, "transport", "auto"))
    return Cluster.current().over(LinkSpec.parse(link).cost) if link else Cluster.current()


def engine_opener(engine: str | Engine, mesh: Mesh, *, inductor: bool = False, transport: str = "auto") -> Callable[[], Engine]:
    """A function that opens the engine of that name for a mesh, or gives the one passed in. InputError for a wrong name or mesh.

    inductor: whether ranks compile the regions between collectives; InputError where the engine cannot. For ``local`` the first
    rank process begins to load at once, in the background; opening waits for it. transport: how the ranks of ``local`` talk,
    "auto" or a link to emulate; InputError for the other engines.
    """
    if transport != "auto" and engine != "local":
        raise InputError(f"transport={transport!r} is for engine='local', whose ranks can emulate a link; found engine {engine!r}")
    if not isinstance(inductor, bool):
        raise InputError(f"inductor must be True or False, found {inductor!r}")
    if inductor and engine not in ("local", "attach"):
        raise InputError(
            "inductor=True is for engine='local' and engine='attach'; the others run every instruction by itself"
            if isinstance(engine, str)
            else "inductor=True cannot change an engine that is open already; make it with LocalEngine(mesh, inductor=True)"
        )
    match engine:
        case "local":
            from ...runtime.engines.local import LocalEngine
            from ...runtime.launcher import warm_up

            check_transport(transport)
            _check_number_of_processes(mesh)
            warm_up()
            return lambda: LocalEngine(mesh, inductor=inductor, transport=transport)
        case "sim":
            from ...runtime.engines.sim import SimEngine

            return lambda: SimEngine(mesh)
        case "attach":
            from ...runtime.engines.attach import AttachEngine

            return lambda: AttachEngine(mesh, inductor=inductor)
        case str():
            raise InputError(f"engine must be one of {', '.join(ENGINES)} or an Engine; found {engine!r}")
    given = engine
    if isinstance(given, type) or not all(hasattr(given, name) for name in ("mesh", "load", "forward", "backward", "close")):
        raise InputError(f"engine must be one of {', '.join(ENGINES)} or an Engine; found {given!r}")
    if given.mesh != mesh:
        raise InputError(f"the engine was made for mesh {given.mesh}, the module asks for {mesh}")
    return lambda: given
