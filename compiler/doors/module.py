"""The module that ``parallelize`` returns: the user's own class, names and state, with a forward that runs on the ranks."""

from __future__ import annotations

import copy
import functools
import inspect
from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, cast

from torch import Tensor, nn

from ..errors import InputError

if TYPE_CHECKING:
    from ..plan.plan import Plan
    from ..verify.report import Verdict
    from .pipeline.session import PipelineSession
    from .session import Session

_SESSION = "_hocket_session"
_ORIGINAL = "_hocket_original"
_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks_with_kwargs",
)


class ParallelModule(nn.Module):
    """Mixed into the user's class. ``isinstance(m, TheirClass)`` holds, and so does everything they wrote on it.

    Parameters, buffers and submodules are shared with the original module, which stays an ordinary module beside this one.
    """

    @property
    def plan(self) -> Plan:
        """Where everything runs, and why (of the latest specialisation)."""
        return session_of(self).latest.compiled.plan

    def explain(self, topic: str = "") -> str:
        """What was captured, planned, rewritten and proven, as text; ``topic`` narrows it to names that contain it."""
        return session_of(self).explain(topic)

    def verify(self, level: str = "full", *, canary: bool = False) -> Verdict:
        """Prove the latest specialisation again, at ``level``, and return the verdict.

        canary: also run one tiny step on the ranks in exact integers, which shows that the engine runs the proven program: its
        order, buffers and transport.
        """
        return session_of(self).verify(level, canary=canary)

    def train_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Forward, loss and backward of a batch on a pipeline (mesh ``"pp=2"``): adds gradients to ``.grad``, returns the loss.

        InputError for a module that is no pipeline: there ``loss.backward()`` does it.
        """
        return session_of(self).train_step(self, args, kwargs)

    def close(self) -> None:
        """End the ranks. Parameters and buffers stay valid; the module cannot be called afterwards."""
        session_of(self).close()

    def __enter__(self) -> ParallelModule:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute of the model that is run too, so that ``m.scale = 2`` means what it says."""
        super().__setattr__(name, value)
        original = self.__dict__.get(_ORIGINAL)
        if original is not None and name in self.__dict__ and name != "training":  # of its mode each face has its own
            original.__dict__[name] = value

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if isinstance(self, LazyModule) and _SESSION not in self.__dict__:
            made = memo[id(self)] = object.__new__(type(self))
            made.__dict__.update(copy.deepcopy(self.__dict__, memo))
            return made
        raise InputError(
            f"a parallel {type(self).__name__} owns running ranks and cannot be copied; copy the module that was given to "
            "hocket.parallelize, or make a new one and load this one's state_dict"
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        if isinstance(self, LazyModule) and _SESSION not in self.__dict__:
            return super().__reduce_ex__(protocol)
        raise InputError(
            f"a parallel {type(self).__name__} owns running ranks and cannot be pickled; save its state_dict() "
            "(torch.save(m.state_dict(), path)), which loads into the plain model as well"
        )


class LazyModule(ParallelModule):
    """Mixed into a decorated class."""

    open_session: ClassVar[Callable[[nn.Module], Session]]


def session_of(module: nn.Module) -> Session:
    """The session behind a parallel module; InputError for any other module."""
    session = module.__dict__.get(_SESSION)
    if session is None and isinstance(module, LazyModule):
        module.__dict__[_ORIGINAL] = plain = plain_view(module)
        session = module.__dict__[_SESSION] = type(module).open_session(plain)
    if session is None:
        raise InputError(f"expected a module returned by hocket.parallelize, found a plain {type(module).__name__}")
    return cast("Session", session)


def parallel_view(model: nn.Module, session: Session | PipelineSession) -> ParallelModule:
    """A second face of ``model``: same class, parameters, buffers, submodules and attributes, forward on the ranks.

    Hooks of the model itself are part of the captured program, so the view starts without them.
    """
    view = _same_state(model, _parallel_class(type(model)))
    view.__dict__[_SESSION] = session
    view.__dict__[_ORIGINAL] = model
    return cast(ParallelModule, view)


def plain_view(module: nn.Module) -> nn.Module:
    """The ordinary module behind an instance of a decorated class; hooks stay with the instance, which runs them itself."""
    original = next(cls for cls in type(module).__mro__ if issubclass(cls, nn.Module) and not issubclass(cls, ParallelModule))
    return _same_state(module, original)


def lazy_class(cls: type[nn.Module], open_session: Callable[[nn.Module], Session]) -> type[nn.Module]:
    """A subclass of ``cls`` whose instances open their session at the first use."""
    body = {"open_session": staticmethod(open_session), "__module__": cls.__module__, "__doc__": cls.__doc__}
    return type(cls.__name__, (LazyModule, _parallel_class(cls)), body)


def _same_state(module: nn.Module, cls: type[nn.Module]) -> nn.Module:
    view: nn.Module = object.__new__(cls)
    view.__dict__.update(module.__dict__)
    for name in _HOOKS:
        view.__dict__[name] = OrderedDict()
    return view


_classes: dict[type[nn.Module], type[nn.Module]] = {}


def _parallel_class(cls: type[nn.Module]) -> type[nn.Module]:
    """Made once for a class, so that two parallel modules of one class are of one class."""
    if cls not in _classes:
        _classes[cls] = _make_parallel_class(cls)
    return _classes[cls]


def _make_parallel_class(cls: type[nn.Module]) -> type[nn.Module]:
    taken = [name for name in ("plan", "explain", "verify", "train_step", "close") if hasattr(cls, name)]
    if taken:
        raise InputError(
            f"{cls.__name__} already has {', '.join(taken)}, which the parallel module adds; rename it in a subclass, since one of "
            "the two would hide the other"
        )
    return type(
        cls.__name__, (ParallelModule, cls), {"forward": _forward_of(cls), "__module__": cls.__module__, "__doc__": cls.__doc__}
    )


def _forward_of(cls: type[nn.Module]) -> Callable[..., Any]:
    @functools.wraps(cls.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return session_of(self).call(self, args, kwargs)

    forward.__signature__ = inspect.signature(cls.forward)  # type: ignore[attr-defined]
    return forward
