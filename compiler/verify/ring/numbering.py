"""One table of calls for several programs: the same op on the same arguments is one value, whoever computes it.

    a = a'  and  b = b'    =>    f(a, b) = f(a', b')                                  congruence, for every deterministic op
    reshape(reshape(x)) = reshape(x)      permute(permute(x)) = permute(x)      clone(x) = contiguous(x) = wait(x) = x

Programs of one rank are entered one after the other. Two values with one number are equal on all inputs, with certainty and without
an evaluation; what is left is evaluated once for all programs (value numbering: Kildall, POPL 1973).
"""

from __future__ import annotations

import operator
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx as fx

from ...errors import HocketError, InputError, UnsupportedError, VerificationError
from ...program import Program, Role, RoleKind, note
from ..forms import DEVICE_ARGUMENTS, UNKNOWN, Form, TensorForm, form_of, freeze, infer
from .algebra import Algebra
from .calls import Call, Ref, defaults_of, draws, filled, order_of, range_of, with_numbers
from .evaluate import apply
from .table import supported
from .value import Value

aten = torch.ops.aten

UNCHANGED = frozenset(
    getattr(aten, name).default for name in ("alias", "detach", "clone", "contiguous", "lift_fresh_copy", "_to_copy", "expand")
) | {torch.ops._c10d_functional.wait_tensor.default}
"""Ops that return their first argument where shape and dtype stay."""

RESHAPES = frozenset((aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.unsqueeze.default)) | {
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
}
SLICES = frozenset((aten.slice.Tensor, aten.narrow.default))
PERMUTES = frozenset((aten.t.default, aten.transpose.int, aten.permute.default))

KERNEL_ERRORS = (RuntimeError, IndexError, ValueError, TypeError, AttributeError, AssertionError)


@dataclass
class Numbering:
    """The table. calls: in an order in which arguments come first; constants: number -> value."""

    calls: list[Call] = field(default_factory=list)
    constants: dict[int, torch.Tensor] = field(default_factory=dict)
    _numbers: dict[Any, int] = field(default_factory=dict)
    _forms: list[Form] = field(default_factory=list)
    _uses: list[list[int] | None] = field(default_factory=list)

    # ---- entering ----------------------------------------------------------------------------------------------------------

    def enter(self, program: Program) -> dict[fx.Node, int]:
        """Number all nodes of a logical program."""
        if program.mesh is not None:
            raise HocketError(f"values are numbered for programs of one rank; found one lowered to mesh {program.mesh}")
        numbers: dict[fx.Node, int] = {}
        roles = iter(program.signature.inputs)
        for node in program.graph.graph.nodes:
            if node.op == "placeholder":
                numbers[node] = self.input(node, next(roles), program)
            elif node.op != "output":
                numbers[node] = self.number(node, numbers)
        return numbers

    def input(self, node: fx.Node, role: Role, program: Program) -> int:
        """The number of an input: by role and form; a constant by its value."""
        if role.kind is not RoleKind.CONSTANT:
            form = form_of(node.meta.get("val"))
            number = self._entered(("input", role), Call(None, (role,), {}, node), form)
            if self._forms[number] != form:
                raise InputError(f"{role} is {self._forms[number]} in one program and {form} in the other")
            return number
        value = program.constants.get(role.name)
        if value is None:
            raise HocketError(f"the program gives no value for its input {role}")
        for number, known in self.constants.items():
            if known is value or (known.dtype == value.dtype and known.shape == value.shape and torch.equal(known, value)):
                return number
        number = self._entered(("constant", len(self.constants)), Call(None, (role,), {}, node), form_of(value))
        self.constants[number] = value
        return number

    def number(self, node: fx.Node, numbers: Mapping[fx.Node, int]) -> int:
        """The number of a call, whose arguments have theirs."""
        if node.op != "call_function":
            raise UnsupportedError(f"a program is flat; found a {node.op} node {node.name}")
        target = node.target
        args = with_numbers(node.args, numbers)
        kwargs = {name: with_numbers(arg, numbers) for name, arg in node.kwargs.items() if name not in DEVICE_ARGUMENTS}
        if kwargs and isinstance(target, torch._ops.OpOverload):
            usual = defaults_of(target)
            kwargs = {name: arg for name, arg in kwargs.items() if name not in usual or freeze(arg, _as_number, Ref) != usual[name]}
        call = Call(target, args, kwargs, node)
        key: Any = (target, freeze(args, _as_number, Ref), freeze(kwargs, _as_number, Ref))
        if draws(call):
            key = (node, key)
        try:
            known = self._numbers.get(key)
        except TypeError:  # an argument without a hash: nothing is known to be the same
            known, key = None, object()
        if known is None:
            known = self._numbers[key] = self._simplified(key, call)
        return known

    def _simplified(self, key: Any, call: Call) -> int:
        """The number of a call that nobody has made in this form."""
        target, args, node = call.target, call.args, call.node
        form = self._form(call)
        if type(form) is TensorForm and args and type(args[0]) is Ref:
            if target in UNCHANGED and self._forms[args[0]] == form:
                return int(args[0])
            if target in RESHAPES:
                return self._reshaped(args[0], form, node)
            if target in PERMUTES and len(form.shape) > 1:
                return self._permuted(args[0], order_of(target, args, len(form.shape)), form, node)
            if target in SLICES:
                return self._sliced(key, call, form)
        return self._entered((key,), call, form)

    def _form(self, call: Call) -> Form:
        def of(number: int) -> Form:
            return self._forms[number]

        if call.target is operator.getitem:
            source = self._forms[call.args[0]]
            return source[call.args[1]] if type(source) is tuple else UNKNOWN
        args, kwargs = freeze(call.args, of, Ref), freeze(call.kwargs, of, Ref)
        return infer(call.target, args, kwargs)

    def _entered(self, key: Any, call: Call, form: Form) -> int:
        found = self._numbers.get(key)
        if found is None:
            found = self._numbers[key] = len(self.calls)
            self.calls.append(call)
            self._forms.append(form)
            self._uses.append(None)
        return found

    def _reshaped(self, source: int, form: TensorForm, node: fx.Node) -> int:
        call = self.calls[source]
        if call.target is aten.reshape.default:
            source = call.args[0]
        if self._forms[source] == form:
            return int(source)
        key = (aten.reshape.default, source, form.shape)
        return self._entered(key, Call(aten.reshape.default, (Ref(source), list(form.shape)), {}, node), form)

    def _permuted(self, source: int, order: list[int], form: TensorForm, node: fx.Node) -> int:
        call = self.calls[source]
        if call.target is aten.permute.default:
            source, order = call.args[0], [call.args[1][dim] for dim in order]
        if order == sorted(order):
            return int(source)
        shape = self._forms[source].shape
        moved = [dim for dim in order if shape[dim] != 1]
        if moved == sorted(moved):  # what moves has size 1
            return self._reshaped(source, form, node)
        key = (aten.permute.default, source, tuple(order))
        return self._entered(key, Call(aten.permute.default, (Ref(source), order), {}, node), form)

    def _sliced(self, key: Any, call: Call, form: TensorForm) -> int:
        """A slice by the range it takes, whatever it is written as; all of it is the value itself."""
        source, bounds = call.args[0], range_of(call, self._forms[call.args[0]])
        if bounds is None:
            return self._entered((key,), call, form)
        if self._forms[source] == form:
            return int(source)
        return self._entered((aten.slice.Tensor, source, bounds), Call(aten.slice.Tensor, (source, *bounds), {}, call.node), form)

    # ---- looking -----------------------------------------------------------------------------------------------------------

    def form(self, number: int) -> Form:
        """Shape and dtype of a value."""
        return self._forms[number]

    def uses(self, number: int) -> list[int]:
        """Numbers of the arguments of a call."""
        found = self._uses[number]
        if found is None:
            found = self._uses[number] = self.calls[number].uses()
        return found

    def without_meaning(self, numbers: Iterable[int]) -> str:
        """The first op among these calls that takes or makes floats and has no entry in the op table, with its line; or ""."""
        known: dict[Any, bool] = {}
        for number in numbers:
            call = self.calls[number]
            target = call.target
            if target is None or target is operator.getitem or not isinstance(target, torch._ops.OpOverload):
                continue
            if target not in known:
                known[target] = supported(target)
            if not known[target] and any(_has_floats(self._forms[n]) for n in (number, *self.uses(number))):
                return f"unsupported({target}): the op has no exact meaning in the verifier's table [{_where(call.node)}]"
        return ""

    # ---- evaluating --------------------------------------------------------------------------------------------------------

    def evaluate(
        self, wanted: Sequence[int], given: Mapping[int, Value], algebra: Algebra, *, after: int = 0
    ) -> tuple[dict[int, Value], int]:
        """Values of ``wanted``, and the divisions by zero among the calls before number ``after``.

        given: values that are not computed. Every other value is computed once, and dropped when nobody needs it any more. Raises
        UnsupportedError for an op without a meaning, VerificationError for one that cannot be executed, with the user's line.
        """
        order = self.needed(wanted, given)
        last: dict[int, int] = {}
        for number in order:
            last[number] = number
            if number not in given:
                last.update(dict.fromkeys(self.uses(number), number))
        dying: dict[int, list[int]] = {}
        kept = set(wanted)
        for number, user in last.items():
            if number not in kept:
                dying.setdefault(user, []).append(number)
        values: dict[int, Value] = {}
        before = 0
        for number in order:
            values[number] = given[number] if number in given else self._call(self.calls[number], algebra, values)
            if number < after:
                before = algebra.poison
            for dead in dying.get(number, ()):
                del values[dead]
        return values, before

    def needed(self, wanted: Iterable[int], leaves: Container[int] = ()) -> list[int]:
        """The wanted values and all that they are computed from, arguments first; what leaves come from is left out."""
        found: set[int] = set()
        stack = list(wanted)
        while stack:
            number = stack.pop()
            if number not in found:
                found.add(number)
                if number not in leaves:
                    stack += self.uses(number)
        return sorted(found)

    def _call(self, call: Call, algebra: Algebra, values: Mapping[int, Value]) -> Value:
        if call.target is None:
            raise HocketError(f"no value was given for input {call.args[0]}")
        try:
            return apply(algebra, call.target, filled(call.args, values), filled(call.kwargs, values))
        except UnsupportedError as error:
            raise UnsupportedError(f"{error} [{_where(call.node)}]") from error
        except KERNEL_ERRORS as error:
            raise VerificationError(f"the program cannot be executed: {error} [{_where(call.node)}]") from error


def _where(node: fx.Node) -> str:
    return f"node {node.name} at {note(node).source or 'unknown source'}"


def _has_floats(form: Form) -> bool:
    """Also where the form is unknown."""
    if type(form) is tuple:
        return any(map(_has_floats, form))
    return form is UNKNOWN or (type(form) is TensorForm and form.is_float)


def _as_number(number: int) -> tuple[type[Ref], int]:
    return (Ref, int(number))
