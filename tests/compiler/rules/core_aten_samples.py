"""Calls of core ATen ops, collected from torch's own samples (``op_db``) as they are dispatched, forward and backward."""

from __future__ import annotations

import importlib.util
import sys
import types
import unittest
import warnings

import torch
import torch.fx as fx
from rule_helpers import op_node
from torch.utils._python_dispatch import TorchDispatchMode


class Collector(TorchDispatchMode):
    """Keeps the first calls of every core op that returns tensors and changes nothing."""

    def __init__(self, per_op: int) -> None:
        super().__init__()
        self.per_op = per_op
        self.found: dict[object, list[fx.Node]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if torch.Tag.core in func.tags and not func._schema.is_mutable:
            kept = self.found.setdefault(func, [])
            sizes = [t.shape for t in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
            if len(kept) < self.per_op and (not sizes or any(any(n > 1 for n in shape) for shape in sizes)):
                kept.append(op_node(func, *args, **(kwargs or {})))
        return func(*args, **(kwargs or {}))


def _samples():
    """torch's sample inputs. Importing them asks for a package that only torch's expectation tests use: an empty one will do."""
    if importlib.util.find_spec("expecttest") is None:
        sys.modules["expecttest"] = stand_in = types.ModuleType("expecttest")
        stand_in.TestCase = unittest.TestCase
    from torch.testing._internal.common_methods_invocations import op_db

    return [
        info for info in op_db if not info.name.startswith(("linalg", "fft", "special", "signal", "masked", "sparse", "torch.ops"))
    ]


def core_aten_nodes(per_op: int = 3) -> dict[object, list[fx.Node]]:
    """Core op -> nodes with real values in ``meta["val"]``."""

    collector = Collector(per_op)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for info in _samples():
            if torch.float32 not in info.supported_dtypes("cpu"):
                continue
            try:
                samples = list(info.sample_inputs("cpu", torch.float32, requires_grad=False))[:4]
            except Exception:  # a sample generator that needs what this machine lacks
                continue
            for sample in samples:
                try:
                    with collector:
                        info(sample.input, *sample.args, **sample.kwargs)
                except Exception:  # some samples are expected to fail
                    continue
    return {op: nodes for op, nodes in collector.found.items() if nodes}
