"""What to try when plain tracing fails: ``torch.export``, then dynamo. Either gives a graph, which goes through the same trace.

Both run the model under rules of their own (``torch.compiler.is_compiling()`` is true, dynamo reads the byte code and knows numpy),
so code that cannot be traced op by op may still have a graph there. The graph's nodes remember the user's lines and submodules.
"""

from __future__ import annotations

import contextlib
import io
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.fx as fx
import torch.utils._pytree as pytree
from torch import nn

from ..errors import CaptureError
from .sources import SourceFinder, is_user_file, line_of

_FRAME = re.compile(r'File "([^"]+)", line (\d+)')


def export_graph(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> nn.Module:
    """The target as ``torch.export`` sees it (non-strict): a graph module that holds the same parameters and buffers."""
    module = target if isinstance(target, nn.Module) else _Wrapped(target)
    args, kwargs = _distinct((args, kwargs))
    with _quietly():
        return torch.export.export(module, args, kwargs, strict=False).module(check_guards=False)


def dynamo_graph(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> nn.Module:
    """The target as dynamo sees it: one graph, or an error at the first break."""
    from torch._dynamo.functional_export import _dynamo_graph_capture_for_export

    module = target if isinstance(target, nn.Module) else _Wrapped(target)
    args, kwargs = _distinct((args, kwargs))
    with _quietly():
        return _dynamo_graph_capture_for_export(module)(*args, **kwargs)


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Keep back what torch writes and warns of when this way fails too; what a way that works has written comes out afterwards."""
    written = io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stderr(written):
        warnings.simplefilter("ignore")
        yield
    sys.stderr.write(written.getvalue())


def _distinct(tree: Any) -> Any:
    """Every tensor leaf as an object of its own: both front ends would take one tensor given twice for one input."""
    return pytree.tree_map_only(torch.Tensor, lambda t: t.detach().requires_grad_(t.requires_grad), tree)


class _Wrapped(nn.Module):
    """A plain function as a module without parameters."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


class GraphCall:
    """Calls a captured graph module node by node, telling ``finder`` the user's line of each."""

    def __init__(self, graph: nn.Module, finder: SourceFinder) -> None:
        if not isinstance(graph, fx.GraphModule):
            raise CaptureError(f"expected a graph module from the fallback; found {type(graph).__name__}")
        self.graph = graph
        self.finder = finder

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        codegen = self.graph.graph._codegen
        if isinstance(codegen, fx.graph._PyTreeCodeGen):
            flat = _flat_inputs(codegen, args, kwargs)
            interpreter = _Tell(self.graph, self.finder)
            try:
                return codegen.process_outputs(interpreter.run(*flat, enable_io_processing=False))
            finally:
                self.finder.override = None
        return self.graph(*args, **kwargs)


def _flat_inputs(codegen: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """The flat placeholders' values; the order of keyword arguments is the one of the capture."""
    spec = codegen.pytree_info.in_spec
    leaves, found = pytree.tree_flatten((args, kwargs))
    return list(leaves) if found == spec else list(codegen.process_inputs(*args, **kwargs))


class _Tell(fx.Interpreter):
    def __init__(self, module: fx.GraphModule, finder: SourceFinder) -> None:
        super().__init__(module)
        self.finder = finder

    def run_node(self, n: fx.Node) -> Any:
        self.finder.override = (_line(n), _module_of(n)) if n.op not in ("placeholder", "output") else None
        return super().run_node(n)


def _line(node: fx.Node) -> str:
    """The user's innermost line in a node's recorded stack trace."""
    found = [(name, int(number)) for name, number in _FRAME.findall(node.meta.get("stack_trace") or "")]
    return next((line_of(name, number) for name, number in reversed(found) if is_user_file(name)), "")


def _module_of(node: fx.Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    last = next(reversed(list(stack.values())), ("", None))
    return re.sub(r"^L\['self'\]\.?|^L__self___?", "", str(last[0])).strip(".")
