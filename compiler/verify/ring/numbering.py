"""One table of calls for several programs: the same op on the same arguments is one value, whoever computes it.

    a = a'  and  b = b'    =>    f(a, b) = f(a', b')                                  congruence, for every deterministic op
    reshape(reshape(x)) = reshape(x)      permute(permute(x)) = permute(x)      clone(x) = contiguous(x) = wait(x) = x

Programs of one rank are entered one after the other. Two values with one number are equal on all inputs, with certainty and without
an evaluation; what is left is evaluated once for all programs (value numbering: Kildall, POPL 1973).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx as fx

from ...errors import HocketError, InputError, UnsupportedError, VerificationError
from ...program import Program, Role, RoleKind, note
from ..forms import UNKNOWN, Form, TensorForm, form_of
from ..templates import Hole, Line, Lines, Template, Templates, lines_of
from .algebra import Algebra
from .calls import Call, Ref, order_of, range_of
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
    """The table. calls: in an order in which arguments come first; constants: number -> value; templates: of all that enters."""

    calls: list[Call] = field(default_factory=list)
    constants: dict[int, torch.Tensor] = field(default_factory=dict)
    templates: Templates = field(default_factory=Templates)
    _numbers: dict[Any, int] = field(default_factory=dict)
    _forms: list[Form] = field(default_factory=list)
    _simplify: dict[Template, _Simplify | None] = field(default_factory=dict)

    # ---- entering ----------------------------------------------------------------------------------------------------------

    def enter(self, program: Program) -> dict[fx.Node, int]:
        """Number all nodes of a logical program."""
        if program.mesh is not None:
            raise HocketError(f"values are numbered for programs of one rank; found one lowered to mesh {program.mesh}")
        lines = lines_of(program, self.templates)
        return {line.node: number for line, number in zip(lines.lines, self.enter_lines(lines), strict=True)}

    def enter_lines(self, program: Lines, settled: Callable[[Line, int], int] | None = None) -> list[int]:
        """Numbers of all lines of a program made with this table's templates. settled: may give a call another number that is
        known to be of the same value."""
        assert program.templates is self.templates
        numbers: list[int] = []
        roles = iter(program.program.signature.inputs)
        for line in program.lines:
            template = line.template
            if template is None:
                numbers.append(self.input(line.node, next(roles), program.program, line.form))
            else:
                number = self.call(template, tuple([numbers[place] for place in line.operands]), line.node)
                numbers.append(number if settled is None else settled(line, number))
        return numbers

    def input(self, node: fx.Node, role: Role, program: Program, form: Form = None) -> int:
        """The number of an input: by role and form; a constant by its value. form: where it is not that of the node's value."""
        if role.kind is not RoleKind.CONSTANT:
            form = form_of(node.meta.get("val")) if form is None else form
            number = self._entered(("input", role), Call(None, (), node, role), form)
            if self._forms[number] != form:
                raise InputError(f"{role} is {self._forms[number]} in one program and {form} in the other")
            return number
        value = program.constants.get(role.name)
        if value is None:
            raise HocketError(f"the program gives no value for its input {role}")
        for number, known in self.constants.items():
            if known is value or (known.dtype == value.dtype and known.shape == value.shape and torch.equal(known, value)):
                return number
        number = self._entered(("constant", len(self.constants)), Call(None, (), node, role), form_of(value))
        self.constants[number] = value
        return number

    def number(self, node: fx.Node, numbers: Mapping[fx.Node, int]) -> int:
        """The number of a node, whose arguments have theirs."""
        template, operands = self.templates.of(node.target, node.args, node.kwargs)
        return self.call(template, tuple([numbers[operand] for operand in operands]), node)

    def call(self, template: Template, operands: tuple[int, ...], node: fx.Node) -> int:
        """The number of a call. node: one that makes it."""
        key = (template, operands, node) if template.draws else (template, operands)
        known = self._numbers.get(key)
        if known is None:
            known = self._numbers[key] = self._simplified(key, template, operands, node)
        return known

    def _simplified(self, key: Any, template: Template, operands: tuple[int, ...], node: fx.Node) -> int:
        """The number of a call that nobody has made in this form."""
        form = template.form(tuple([self._forms[number] for number in operands]))
        if type(form) is TensorForm and operands:
            if template not in self._simplify:
                self._simplify[template] = _simplification(template)
            simplify = self._simplify[template]
            if simplify is not None:
                return simplify(self, template, operands[0], form, node)
        return self._entered((key,), Call(template, operands, node), form)

    def _entered(self, key: Any, call: Call, form: Form) -> int:
        found = self._numbers.get(key)
        if found is None:
            found = self._numbers[key] = len(self.calls)
            self.calls.append(call)
            self._forms.append(form)
        return found

    def _simple(self, form: TensorForm, node: fx.Node, target: Any, source: int, *rest: Any) -> int:
        """The number of ``target(source, *rest)``, which is simple already."""
        template, operands = self.templates.of(target, (Ref(source), *rest), {}, Ref)
        return self._entered((template, operands, "simple"), Call(template, (source,), node), form)

    def unchanged(self, template: Template, source: int, form: TensorForm, node: fx.Node) -> int:
        """An op that returns its first argument where shape and dtype stay."""
        if self._forms[source] == form:
            return source
        return self._entered(((template, (source,)),), Call(template, (source,), node), form)

    def reshaped(self, _: Template | None, source: int, form: TensorForm, node: fx.Node) -> int:
        """A view by the shape that it makes."""
        call = self.calls[source]
        if call.target is aten.reshape.default:
            source = call.operands[0]
        if self._forms[source] == form:
            return source
        return self._simple(form, node, aten.reshape.default, source, list(form.shape))

    def permuted(self, template: Template, source: int, form: TensorForm, node: fx.Node) -> int:
        """A transposition by the order that it makes of the dimensions."""
        if len(form.shape) < 2:
            return self.unchanged(template, source, form, node)
        order = order_of(template, len(form.shape))
        call = self.calls[source]
        if call.target is aten.permute.default:
            assert call.template is not None
            source, order = call.operands[0], [call.template.args[1][dim] for dim in order]
        if order == sorted(order):
            return source
        shape = self._forms[source].shape
        moved = [dim for dim in order if shape[dim] != 1]
        if moved == sorted(moved):  # what moves has size 1
            return self.reshaped(None, source, form, node)
        return self._simple(form, node, aten.permute.default, source, order)

    def sliced(self, template: Template, source: int, form: TensorForm, node: fx.Node) -> int:
        """A slice by the range it takes, whatever it is written as; all of it is the value itself."""
        bounds = range_of(template, self._forms[source])
        if bounds is None:
            return self._entered(((template, (source,)),), Call(template, (source,), node), form)
        if self._forms[source] == form:
            return source
        return self._simple(form, node, aten.slice.Tensor, source, *bounds)

    # ---- looking -----------------------------------------------------------------------------------------------------------

    def form(self, number: int) -> Form:
        """Shape and dtype of a value."""
        return self._forms[number]

    def uses(self, number: int) -> tuple[int, ...]:
        """Numbers of the arguments of a call."""
        return self.calls[number].operands

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
        if call.template is None:
            raise HocketError(f"no value was given for input {call.role}")
        try:
            args, kwargs = call.filled(values)
            return apply(algebra, call.target, args, kwargs)
        except UnsupportedError as error:
            raise UnsupportedError(f"{error} [{_where(call.node)}]") from error
        except KERNEL_ERRORS as error:
            raise VerificationError(f"the program cannot be executed: {error} [{_where(call.node)}]") from error


_Simplify = Callable[[Numbering, Template, int, TensorForm, fx.Node], int]


def _simplification(template: Template) -> _Simplify | None:
    """How a call of one tensor is brought to its simple form; None where it has none."""
    if not template.args or type(template.args[0]) is not Hole or template.holes != 1:
        return None
    for targets, simplify in ((UNCHANGED, Numbering.unchanged), (RESHAPES, Numbering.reshaped), (SLICES, Numbering.sliced)):
        if template.target in targets:
            return simplify
    return Numbering.permuted if template.target in PERMUTES else None


def _where(node: fx.Node) -> str:
    return f"node {node.name} at {note(node).source or 'unknown source'}"


def _has_floats(form: Form) -> bool:
    """Also where the form is unknown."""
    if type(form) is tuple:
        return any(map(_has_floats, form))
    return form is UNKNOWN or (type(form) is TensorForm and form.is_float)
