"""Ops of hocket's own in torch: defined once, by whoever needs them first, and there for as long as the process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_KEPT: list[torch.library.Library] = []
"""A library takes its ops away when it is collected."""


def define_op(schema: str, kernel: Callable[..., Any], fake: Callable[..., Any] | None = None) -> torch._ops.OpOverload:
    """Define ``hocket::NAME`` for every device and return it.

    schema: ``"name(Tensor x) -> Tensor"``; kernel: what runs; autograd has no part in it; fake: shapes and dtypes of the results
    where no kernel is to run, None for an op that is never traced. RuntimeError from torch where the name is taken.
    """
    name = schema.partition("(")[0]
    library = torch.library.Library("hocket", "FRAGMENT")
    library.define(schema)
    library.impl(name, kernel, "CompositeExplicitAutograd")
    if fake is not None:
        torch.library.register_fake(f"hocket::{name}", fake, lib=library)
    _KEPT.append(library)
    found: torch._ops.OpOverload = getattr(torch.ops.hocket, name).default
    return found
