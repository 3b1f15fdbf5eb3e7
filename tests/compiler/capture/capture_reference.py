"""Runs a captured program with fx.Interpreter and eager autograd on the same numbers, and compares everything that comes out."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.fx as fx
import torch.utils._pytree as pytree

from hocket.compiler.capture import capture
from hocket.compiler.program import Literal, Program, RoleKind

SEED = 1234


def values_of(
    program: Program, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], tangents: dict[str, torch.Tensor]
) -> list:
    """The flat inputs of a program, cloned."""
    named = {}
    if isinstance(target, torch.nn.Module):
        named = {**dict(target.named_buffers()), **dict(target.named_parameters())}
    leaves = iter([leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)])
    values = []
    for role in program.signature.inputs:
        match role.kind:
            case RoleKind.PARAM | RoleKind.BUFFER:
                value = named[role.name]
            case RoleKind.INPUT:
                value = next(leaves)
            case RoleKind.SEED:
                value = torch.tensor(SEED)
            case RoleKind.CONSTANT:
                value = program.constants[role.name]
            case RoleKind.TANGENT:
                value = tangents[role.name]
            case _:
                raise AssertionError(role)
        values.append(value.detach().clone())
    return values


def interpret(program: Program, values: list) -> dict[Any, torch.Tensor | None]:
    """Role -> value of every output."""
    with torch.no_grad():
        results = fx.Interpreter(program.graph).run(*values, enable_io_processing=False)
    return dict(zip(program.signature.outputs, results, strict=True))


def random_tangents(program: Program) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    tangents = {}
    for role, node in zip(program.signature.inputs, program.placeholders, strict=True):
        if role.kind is RoleKind.TANGENT:
            val = node.meta["val"]
            made = torch.randn(val.shape, generator=generator, dtype=torch.float32).to(val.dtype)
            tangents[role.name] = torch.empty_strided(val.shape, val.stride(), dtype=val.dtype).copy_(made)
    return tangents


def close(found: torch.Tensor | None, expected: torch.Tensor | None, what: str, tolerance: float = 1e-5) -> None:
    """Equal to within ``tolerance`` of the largest element."""
    if expected is None or found is None:
        assert found is None, f"{what}: a value where eager has None"
        assert expected is None, f"{what}: None where eager has a value"
        return
    assert found.shape == expected.shape, what
    assert found.dtype == expected.dtype, what
    if found.numel() == 0:
        return
    kind = torch.complex128 if found.dtype.is_complex else torch.float64
    a, b = found.to(kind), expected.to(kind)
    scale = b.abs().nan_to_num(posinf=0).max().clamp(min=1e-3)
    assert torch.allclose(a / scale, b / scale, rtol=0, atol=tolerance, equal_nan=True), f"{what}: {(a - b).abs().max()} of {scale}"


def assert_like_eager(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None, tolerance: float = 1e-5) -> Program:
    """Capture for training, run, and compare outputs, gradients and updates with eager. Returns the program."""
    kwargs = kwargs or {}
    program = capture(target, args, kwargs)
    tangents = random_tangents(program)
    found = interpret(program, values_of(program, target, args, kwargs, tangents))

    reference = copy.deepcopy(target) if isinstance(target, torch.nn.Module) else target
    args, kwargs = pytree.tree_map_only(torch.Tensor, lambda t: t.detach().clone().requires_grad_(t.requires_grad), (args, kwargs))
    leaves = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    fed = dict(zip(program.signature.inputs_of(RoleKind.INPUT), leaves, strict=True))
    with torch.random.fork_rng():
        result = reference(*args, **kwargs)
    flat = pytree.tree_leaves(result)
    named = {}
    if isinstance(reference, torch.nn.Module):
        named = {**dict(reference.named_buffers()), **dict(reference.named_parameters())}
    assert len(flat) == len(program.signature.out_leaves)
    differentiable = {}
    for place, value in zip(program.signature.out_leaves, flat, strict=True):
        if isinstance(place, Literal):
            assert place.value == value
            continue
        role = program.signature.outputs[place]
        close(found[role], value.detach(), str(role), tolerance)
        if value.requires_grad:
            differentiable[role.name] = value
    assert list(differentiable) == list(program.signature.inputs_of(RoleKind.TANGENT))
    wanted = {n: t for n, t in {**named, **fed}.items() if t.requires_grad}
    assert set(program.signature.outputs_of(RoleKind.GRADIENT)) == set(wanted)
    if differentiable and wanted:
        gradients = torch.autograd.grad(
            list(differentiable.values()), list(wanted.values()), [tangents[n] for n in differentiable], allow_unused=True
        )
        expected = dict(zip(wanted, gradients, strict=True))
        for role, value in found.items():
            if role.kind is RoleKind.GRADIENT:
                close(value, expected[role.name], str(role), tolerance)
    for role, value in found.items():
        if role.kind is RoleKind.UPDATE:
            close(value, {**named, **fed}[role.name].detach(), str(role), tolerance)
    return program
