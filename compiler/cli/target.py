"""What ``FILE:NAME`` and ``--input`` on the command line stand for."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import inspect
import re
import sys
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import HocketError, InputError

_SPEC = re.compile(r"(?:(?P<name>[A-Za-z_]\w*)=)?(?P<shape>\d+(?:x\d+)*|scalar)(?::(?P<dtype>\w+))?(?::(?P<high>\d+))?")

INPUT_HELP = (
    "an example tensor, SHAPE[:DTYPE[:HIGH]], once per positional argument: 8x128:int64:256 is an 8 by 128 tensor of integers "
    "below 256, 8x3x32x32 float32 noise; NAME=SHAPE... gives a keyword argument. Without it, the file's example_inputs() is called"
)


@dataclass(frozen=True)
class Target:
    """A model and the inputs of one call of it."""

    label: str
    model: nn.Module
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)


def load_target(text: str, inputs: Sequence[str], *, seed: int = 0, examples: bool = True) -> Target:
    """Build the model named by ``path/to/file.py:NAME`` or ``package.module:NAME``.

    NAME is an nn.Module class (made without arguments), a module, or a function that returns one, or returns ``(model, args)`` or
    ``(model, args, kwargs)``. examples: the target needs example inputs. Raises InputError that says which of these was expected
    and what was found.
    """
    path, _, name = text.rpartition(":")
    if not path or not name:
        raise InputError(f"expected FILE:NAME, such as model.py:Net, found {text!r}")
    torch.manual_seed(seed)
    module = _import(path)
    if not hasattr(module, name):
        near = [n for n, v in vars(module).items() if not n.startswith("_") and (inspect.isclass(v) or inspect.isfunction(v))]
        raise InputError(f"{path} has no {name!r}; it has {', '.join(near) or 'no classes or functions'}")
    made = getattr(module, name)
    if not isinstance(made, nn.Module):
        made = _call(made, text)
    model, args, kwargs = _split(made, text)
    if inputs:
        args, kwargs = parse_inputs(inputs)
    elif examples and not args and not kwargs:
        args, kwargs = _examples(module, text)
    return Target(text, model, args, kwargs)


def parse_inputs(specs: Sequence[str]) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """Example tensors from ``--input`` texts: (positional, by keyword)."""
    args: list[Tensor] = []
    kwargs: dict[str, Tensor] = {}
    for spec in specs:
        match = _SPEC.fullmatch(spec)
        if match is None:
            raise InputError(f"--input {spec!r}: expected [NAME=]SHAPE[:DTYPE[:HIGH]], for example 8x128:int64:256")
        value = _example(match["shape"], match["dtype"] or "float32", match["high"], spec)
        if match["name"]:
            kwargs[match["name"]] = value
        else:
            args.append(value)
    return tuple(args), kwargs


def _example(shape: str, dtype_name: str, high: str | None, spec: str) -> Tensor:
    dtype = getattr(torch, dtype_name, None)
    if not isinstance(dtype, torch.dtype):
        raise InputError(f"--input {spec!r}: torch has no dtype {dtype_name!r}")
    size = () if shape == "scalar" else tuple(int(part) for part in shape.split("x"))
    if dtype.is_floating_point or dtype.is_complex:
        if high is not None:
            raise InputError(f"--input {spec!r}: an upper bound is for integers, {dtype_name} values are drawn from a normal")
        return torch.randn(size, dtype=dtype)
    if high is not None and int(high) < 1:
        raise InputError(f"--input {spec!r}: integers are drawn from 0 up to HIGH - 1, so HIGH is at least 1")
    return torch.randint(int(high or 2), size).to(dtype)


def _import(path: str) -> ModuleType:
    if not path.endswith(".py"):
        try:
            return importlib.import_module(path)
        except ModuleNotFoundError as error:
            raise InputError(f"no module named {path!r} ({error}); for a file, write its name with .py") from error
    file = Path(path)
    if not file.is_file():
        raise InputError(f"no file {path!r} here ({Path.cwd()})")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None, "a .py file always has an import spec"
    assert spec.loader is not None, "a .py file always has a loader"
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module
    sys.path.insert(0, str(file.parent.resolve()))
    with _users_code(f"cannot import {path}"):
        spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def _users_code(doing: str) -> Iterator[None]:
    """An error of the user's own code as an InputError with their line; its traceback is the cause."""
    try:
        yield
    except HocketError:
        raise
    except Exception as error:
        own = [
            frame
            for frame in traceback.extract_tb(error.__traceback__)
            if frame.filename != __file__ and "importlib" not in frame.filename
        ]
        where = f" ({Path(own[-1].filename).name}:{own[-1].lineno} {own[-1].line})" if own else ""
        raise InputError(f"{doing}: {type(error).__name__}: {error}{where}") from error


def _call(made: Any, text: str) -> Any:
    if not callable(made):
        raise InputError(f"{text}: expected an nn.Module, a class or a function, found {type(made).__name__}")
    required = [
        p.name
        for p in inspect.signature(made).parameters.values()
        if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    ]
    if required:
        raise InputError(
            f"{text} needs arguments ({', '.join(required)}); write a function without any in the same file that makes the model, "
            "and name that"
        )
    with _users_code(f"cannot make {text}"):
        return made()


def _split(made: Any, text: str) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    match made:
        case nn.Module():
            return made, (), {}
        case (nn.Module() as model, tuple() as args):
            return model, args, {}
        case (nn.Module() as model, tuple() as args, dict() as kwargs):
            return model, args, kwargs
    raise InputError(f"{text} made {type(made).__name__}; expected an nn.Module, (model, args) or (model, args, kwargs)")


def _examples(module: ModuleType, text: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    maker = getattr(module, "example_inputs", None)
    if maker is None:
        raise InputError(
            f"no example inputs for {text}: give --input SHAPE:DTYPE:HIGH once per argument, or define example_inputs() in the file"
        )
    with _users_code(f"cannot make the example inputs of {text}"):
        made = maker()
    match made:
        case (tuple() as args, dict() as kwargs):
            return args, kwargs
        case tuple():
            return made, {}
    return (made,), {}
