"""``hocket.parallelize`` and ``@hocket.parallel``: the main doors."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, cast

from torch import Tensor, nn

from ...runtime.engines.base import Engine
from ...runtime.mesh import Mesh
from ..errors import InputError
from ..plan.tactics import RewriteTactic, Tactic
from .checks import check_constraints, check_examples, check_level, check_memory, check_model, check_tactics
from .engines import cluster_of, engine_opener
from .hall import Options
from .module import ParallelModule, lazy_class, parallel_view
from .pipeline.options import PipelineOrder, pipeline_order
from .pipeline.session import PipelineSession
from .session import Session
from .state import PiecewiseState, WholeState

Model = TypeVar("Model", bound=nn.Module)


def parallelize(
    model: nn.Module,
    mesh: str | int | Mesh,
    example_args: tuple[Any, ...] | Tensor = (),
    example_kwargs: Mapping[str, Any] | None = None,
    *,
    tactics: Sequence[Tactic | RewriteTactic] | str = "auto",
    engine: str | Engine = "local",
    constraints: Mapping[str, Any] | None = None,
    verify: str | None = None,
    memory_limit: int | str | None = None,
    inductor: bool = False,
    transport: str = "auto",
) -> ParallelModule:
    """The same module, running on the ranks of a mesh.

    model: an ordinary module; it shares its parameters and buffers with the result and stays usable beside it.
    mesh: ``"tp=2"``, ``"dp=2,tp=2"``, or a number of ranks.
    example_args, example_kwargs: inputs of one call, to compile now rather than at the first call; a tensor stands for ``(x,)``.
    tactics: ``"auto"``, or a list such as ``[DataParallel("dp"), TensorParallel("tp")]``; the planner decides what it leaves open.
    A ``Rewrites(before=..., after=...)`` among them adds passes of your own.
    A mesh axis ``pp`` makes a pipeline of the model, see ``PipelineParallel``: train it with ``train_step``.
    engine: ``"local"`` (ranks are processes of this machine), ``"sim"`` (all ranks in this process), ``"attach"`` (this process is
    one rank, started by torchrun or SLURM), or an engine of your own, which ``close()`` leaves open.
    constraints: parameter or input name (globs) -> placements, such as ``{"layers.*.up.weight": "tp:S(0)"}``.
    verify: how much to prove after every pass, "off", "types", "float", "ring" or "full"; None asks the environment variable
    HOCKET_VERIFY. memory_limit: most bytes, or "8GB", that a rank may hold at once: parameters, inputs, saved activations,
    gradients, and the optimizer's state in ``hocket.train_step`` (an optimizer of your own is outside the ranks).
    inductor: whether the ranks compile what lies between two collectives with torch's Inductor. Needs a C++ compiler; results
    agree up to rounding. Compiling takes seconds to minutes the first time; ``explain()`` says what was compiled.
    transport: how the processes of engine ``"local"`` talk: ``"auto"``, or a network to emulate with its latency and bandwidth,
    such as ``"link:20us,1GB/s"``: then the plan is made for that network, and what overlaps can be measured on one machine.

    Returns a module of the same class: same signature, outputs, parameter names, ``state_dict`` and train/eval modes. Ordinary
    training code works on it. It adds ``plan``, ``explain()``, ``verify()`` and ``close()``, and is a context manager.

    Raises InputError for arguments that cannot be right, CaptureError where the model cannot be traced, PlanError where the
    constraints contradict each other, VerificationError where a rewrite is not proven, RunError where a rank fails.
    """
    example_args, example_kwargs = check_examples(example_args, example_kwargs)
    options = {"constraints": constraints, "memory_limit": memory_limit, "inductor": inductor, "transport": transport}
    order = pipelined_order(model, mesh, {**options, "tactics": tactics, "verify": verify})
    session: Session | PipelineSession
    if order is not None:
        session = PipelineSession(order, engine)
    else:
        session = open_session(
            model,
            mesh,
            tactics=tactics,
            engine=engine,
            constraints=constraints,
            verify=verify,
            memory_limit=memory_limit,
            inductor=inductor,
            transport=transport,
        )
    if example_args or example_kwargs:
        try:
            session.prepare(example_args, dict(example_kwargs), mode=model.training)
        except BaseException:
            session.close()
            raise
    return parallel_view(model, session)


def pipelined_order(model: nn.Module, mesh: str | int | Mesh, options: Mapping[str, Any]) -> PipelineOrder | None:
    """What the arguments of ``parallelize`` ask of a pipeline, None where they ask for none. InputError for options it has not."""
    shape = Mesh.parse(mesh)
    order = pipeline_order(model, shape, check_tactics(options.get("tactics", "auto")), options.get("verify"))
    if order is None:
        return None
    check_model(model)
    unknown = set(options) - set(inspect.signature(open_session).parameters)
    if unknown:
        raise InputError(f"a pipeline has no option {sorted(unknown)[0]!r}; see hocket.parallelize and PipelineParallel")
    refused = [name for name in ("constraints", "memory_limit", "inductor") if options.get(name)]
    refused += ["transport"] if options.get("transport", "auto") != "auto" else []
    if refused:
        raise InputError(
            f"a pipeline takes no {refused[0]}; see the options of PipelineParallel, which has memory= for activations"
        )
    return order


def open_session(
    model: nn.Module,
    mesh: str | int | Mesh,
    *,
    tactics: Sequence[Tactic | RewriteTactic] | str = "auto",
    engine: str | Engine = "local",
    constraints: Mapping[str, Any] | None = None,
    verify: str | None = None,
    memory_limit: int | str | None = None,
    inductor: bool = False,
    transport: str = "auto",
) -> Session:
    """Check the arguments of ``parallelize`` and open a session on a fresh engine; nothing is compiled yet."""
    check_model(model)
    shape = Mesh.parse(mesh)
    if pipeline_order(model, shape, check_tactics(tactics)) is not None:
        raise InputError(f"a pipeline (mesh {shape}) is opened by hocket.parallelize, and trained with its train_step(...)")
    attached = engine == "attach"
    options = Options(
        mesh=shape,
        tactics=check_tactics(tactics),
        constraints=check_constraints(constraints),
        memory_limit=check_memory(memory_limit),
        outputs="replicate" if attached else "any",
        gradients="like-params" if attached else "any",
        level=check_level(verify),
        cluster=cluster_of(engine, transport),
    )
    open_engine = engine_opener(engine, shape, inductor=inductor, transport=transport)
    if not attached:
        return Session(WholeState(model), open_engine, options, owns_engine=isinstance(engine, str))
    rank: Any = open_engine()
    return Session(PiecewiseState(model, shape, rank.rank, rank.device), lambda: rank, options)


def parallel(mesh: str | int | Mesh, **options: Any) -> Callable[[type[Model]], type[Model]]:
    """Class decorator: instances run on the ranks of ``mesh`` from their first call on.

    Takes the keyword arguments of ``parallelize``. The decorated class is a subclass of the original one.
    """

    if isinstance(mesh, type):
        raise InputError(f'expected a mesh: write @hocket.parallel(mesh="tp=2") above class {mesh.__name__}')
    Mesh.parse(mesh)
    unknown = set(options) - set(inspect.signature(open_session).parameters)
    if unknown:
        raise InputError(f"@hocket.parallel has no option {sorted(unknown)[0]!r}; it takes those of hocket.parallelize")

    def decorate(cls: type[Model]) -> type[Model]:
        if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
            raise InputError(f"@hocket.parallel decorates subclasses of nn.Module; found {cls!r}")
        return cast(type[Model], lazy_class(cls, functools.partial(open_session, mesh=mesh, **options)))

    return decorate
