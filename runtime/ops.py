"""Which ops a program may call, and how their names become callables.

A program is data from a file or a socket, so an op must be in a known namespace, be functional (no mutated argument, at least one
result) and not touch files. Collectives are not called through torch: executors hand them to a communicator.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from .errors import ProgramError

NAMESPACES = ("aten", "prims", "_c10d_functional", "hocket")
_NAME = re.compile(r"(aten|prims|_c10d_functional|hocket)\.([A-Za-z_][A-Za-z0-9_]*)\.([A-Za-z_][A-Za-z0-9_]*)")
_FORBIDDEN_ARGUMENTS = frozenset(("filename",))


class CollectiveOp(NamedTuple):
    """How a collective op maps onto ``Communicator``: its method, and which arguments of the op it takes, in its order.

    axis, size: positions of the mesh axis and of the group size (None where the op has none).
    """

    method: str
    arguments: tuple[int, ...]
    axis: int
    size: int | None = None


COLLECTIVES: dict[str, CollectiveOp] = {
    "_c10d_functional.all_reduce.default": CollectiveOp("all_reduce", (0, 1, 2), 2),
    "_c10d_functional.all_gather_into_tensor.default": CollectiveOp("all_gather", (0, 2), 2, 1),
    "_c10d_functional.reduce_scatter_tensor.default": CollectiveOp("reduce_scatter", (0, 1, 3), 3, 2),
    "_c10d_functional.all_to_all_single.default": CollectiveOp("all_to_all", (0, 1, 2, 3), 3),
    "_c10d_functional.broadcast.default": CollectiveOp("broadcast", (0, 1, 2), 2),
    "_c10d_functional.isend.default": CollectiveOp("send", (0, 1, 2, 3), 3),
    "_c10d_functional.irecv.default": CollectiveOp("recv", (0, 1, 2, 3), 3),
}
WAIT = "_c10d_functional.wait_tensor.default"
SEND = "_c10d_functional.isend.default"
RECV = "_c10d_functional.irecv.default"


def op_name(overload: torch._ops.OpOverload) -> str:
    """The name of an op in a program: ``aten.mm.default``."""
    return f"{overload.namespace}.{overload._schema.name.split('::')[1]}.{overload._overloadname}"


def check_op(name: str) -> None:
    """ProgramError unless the name is in an allowed namespace (whether the op exists is found out by ``resolve``)."""
    match = _NAME.fullmatch(name)
    if match is None:
        raise ProgramError(f"op {name!r} is not allowed: expected NAMESPACE.NAME.OVERLOAD in one of {', '.join(NAMESPACES)}")
    if match.group(1) == "_c10d_functional" and name not in COLLECTIVES and name != WAIT:
        raise ProgramError(f"collective {name!r} is not supported: expected one of {', '.join([*COLLECTIVES, WAIT])}")


@functools.cache
def overload_of(name: str) -> torch._ops.OpOverload:
    """The torch op of that name. ProgramError when it is not allowed, unknown to this torch, mutates, or touches files."""
    check_op(name)
    namespace, base, overload = name.split(".")
    if namespace == "hocket":
        _define(base)
    try:
        packet = getattr(getattr(torch.ops, namespace), base)
        found = getattr(packet, overload)
    except (AttributeError, RuntimeError) as error:
        raise ProgramError(
            f"op {name!r} does not exist in torch {torch.__version__}; was the program made for another one?"
        ) from error
    if not isinstance(found, torch._ops.OpOverload):
        raise ProgramError(f"op {name!r} is not an operator overload")
    schema = found._schema
    if schema.is_mutable or not schema.returns:
        raise ProgramError(f"op {name!r} is not functional: a program holds only ops that return new values")
    if any(argument.name in _FORBIDDEN_ARGUMENTS for argument in schema.arguments):
        raise ProgramError(f"op {name!r} is not allowed: it reads or writes files")
    return found


def _define(base: str) -> None:
    """Define one of hocket's own ops in torch, when it is first asked for."""
    if base == "chain":
        from .fixedpoint.op import chain_op  # its bodies hold ops of this table

        chain_op()
    elif base == "resume":
        from .fixedpoint.resume import resume_op

        resume_op()
    elif base in ("stand_in", "stand_ins"):
        from .stand_in import define

        define()


@functools.cache
def resolve(name: str) -> Callable[..., Any]:
    """The fastest callable of an allowed op (below the Python wrapper of ``OpOverload``)."""
    call: Callable[..., Any] = overload_of(name)._op
    return call


def is_random(name: str) -> bool:
    """Whether two calls with equal arguments may differ: then they must not be shared between ranks."""
    if name.startswith("_c10d_functional."):
        return False
    return torch.Tag.nondeterministic_seeded in overload_of(name).tags
