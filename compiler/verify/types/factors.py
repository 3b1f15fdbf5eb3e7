"""Regrouping the factors of a shape: what ``view`` does to a value that is cut.

    dims   [B, tp*H, S] -> atoms  B | tp H | S  -> view to local [B*H, S] -> dims [B x tp x H, S]

The order of the atoms never changes, so every regrouping is a view of the global tensor. Where a mesh axis stands between two
output dimensions it may belong to either; it goes with the local factor that it cut before, or where the declared layout has it.
"""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import numpy as np

from .problem import IllTyped, Moved, Op, Untypable
from .value import Axes, Cut, Dim, Integer, Type, same_integer


class Atom(NamedTuple):
    """A local factor (axis -1), a mesh axis, or (chunks set) a dimension cut into uneven pieces, kept in one block.

    follows: for an axis, whether a local factor > 1 that it cuts stands to its right in the same dimension.
    """

    size: int
    axis: int = -1
    follows: bool = False
    chunks: Dim | None = None


def atoms_of(op: Op, dim: Dim) -> list[Atom]:
    """The factors of a dimension, left to right, local ones of size 1 dropped."""
    if not dim.cuts:
        return [Atom(dim.size)] if dim.size != 1 else []
    if not op.axes.is_even(dim):
        return [Atom(dim.size, chunks=dim)]
    found, done = [], 1
    for i, cut in enumerate(dim.cuts):
        parts = op.axes.parts[cut.axis]
        if cut.outer > done:
            found.append(Atom(cut.outer // done))
        done = cut.outer * parts
        found.append(Atom(parts, cut.axis, dim.size // done > op.axes.product(dim.cuts[i + 1 :])))
    last = dim.size // done
    return [*found, Atom(last)] if last > 1 else found


def regroup(op: Op, value: Type, sizes: list[Integer]) -> tuple[Dim, ...]:
    """Dims of the value seen with local ``sizes`` (at most one -1)."""
    if not any(dim.cuts for dim in value.dims) and all(isinstance(n, int) for n in sizes):
        return tuple(Dim(n) for n in _complete(sizes, math.prod(dim.size for dim in value.dims)))
    if 0 in value.shape:
        raise Untypable("a view of an empty value that is cut")
    local = op.axes.local_shape(value)
    total: Integer = 1
    for length in local:
        total = total * length
    wanted = _complete(sizes, total)
    hints = op.hinted_dims()
    moves = any(hints.get(axis, place) != place for axis, place in value.cut_axes().items())
    if wanted and not moves and same_integer_shape(wanted, local):
        return value.dims
    queue = [atom for dim in value.dims for atom in atoms_of(op, dim)]
    queue.reverse()
    dims = [_take(op, queue, position, size, len(wanted) - 1 - position, hints) for position, size in enumerate(wanted)]
    if any(atom.size != 1 for atom in queue):
        raise IllTyped(
            f"a view to local sizes {[_show(n) for n in wanted]} does not fit {op.axes.describe(value)} of {list(value.shape)}", 0
        )
    return tuple(dims)


def same_integer_shape(left: list[Integer], right: tuple[Integer, ...]) -> bool:
    """Whether two local shapes agree on every rank."""
    return len(left) == len(right) and all(same_integer(a, b) for a, b in zip(left, right, strict=True))


def _complete(sizes: list[Integer], total: Integer) -> list[Integer]:
    unknown = [i for i, n in enumerate(sizes) if isinstance(n, int) and n == -1]
    if not unknown:
        return sizes
    known: Integer = 1
    for n in sizes:
        known = known if isinstance(n, int) and n == -1 else known * n
    missing = total // np.maximum(known, 1) if not isinstance(known, int) or not isinstance(total, int) else total // max(known, 1)
    if not isinstance(missing, int) and (missing == missing.flat[0]).all():
        missing = int(missing.flat[0])
    return [missing if i == unknown[0] else n for i, n in enumerate(sizes)]


def _take(op: Op, queue: list[Atom], position: int, size: Integer, remaining: int, hints: dict[int, int]) -> Dim:
    """Build one output dimension of local ``size`` from the front of the queue (its end)."""
    local, whole = 1, 1
    cuts: list[Cut] = []
    block: Dim | None = None
    while queue:
        atom = queue[-1]
        done = _done(op, local, block, size)
        if atom.axis >= 0:
            if done and not _belongs_here(op, queue, position, remaining, hints, started=whole > 1 or bool(cuts)):
                break
            queue.pop()
            cuts.append(Cut(atom.axis, whole))
            whole *= atom.size
        elif done:
            break
        elif atom.chunks is not None:
            if whole != 1 or block is not None:
                raise Untypable("a view merges a dimension cut into uneven pieces behind another one")
            block = queue.pop().chunks
        else:
            queue.pop()
            taken = _fitting(op, atom.size, local, block, size)
            if taken != atom.size:
                queue.append(Atom(atom.size // taken))
            local, whole = local * taken, whole * taken
    if not _done(op, local, block, size):
        raise IllTyped(f"a view asks for local size {_show(size)} in dimension {position}, which the pieces do not have", 0)
    if block is not None:
        if cuts:
            raise Untypable("a view merges an uneven dimension with another cut")
        return Dim(block.size * whole, block.cuts, block.granule * whole)
    return Dim(whole, tuple(cuts))


def _done(op: Op, local: int, block: Dim | None, size: Integer) -> bool:
    return same_integer(local if block is None else op.axes.length(block) * local, size)


def _fitting(op: Op, atom: int, local: int, block: Dim | None, size: Integer) -> int:
    """How much of a local factor the dimension takes."""
    have = local if block is None else op.axes.length(block) * local
    if not isinstance(have, int) or not isinstance(size, int):
        ratio = np.asarray(size) / np.maximum(np.asarray(have), 1)
        need = int(ratio.flat[0])
        if not (np.asarray(have) * need == np.asarray(size)).all():
            raise IllTyped(f"a view uses the size of one rank, {_show(size)}, but the ranks hold pieces of different lengths", 0)
    else:
        need = size // have if have and size % have == 0 else 0
    if need <= 0:
        raise IllTyped(f"a view cuts through a factor: local size {_show(size)} does not fit", 0)
    taken = min(need, atom)
    if atom % taken or need % taken:
        taken = math.gcd(need, atom)
    if atom % taken or taken == 1:
        raise IllTyped(f"a view cuts through a factor: local size {_show(size)} does not fit", 0)
    return taken


def _belongs_here(op: Op, queue: list[Atom], position: int, remaining: int, hints: dict[int, int], *, started: bool) -> bool:
    """Whether an axis that stands right behind a finished dimension is its innermost factor, not the next one's outermost."""
    atom = queue[-1]
    if remaining == 0:
        return True
    if atom.axis in hints:
        return hints[atom.axis] <= position
    if not started and not atom.follows:
        return True
    if started and atom.follows:
        return False
    op.ambiguous = True
    return op.flipped


def _show(size: Integer) -> str:
    return str(size) if isinstance(size, int) else "/".join(str(int(n)) for n in size.flat[:4]) + ("/..." if size.size > 4 else "")


def permutation(axes: Axes, move: Moved) -> tuple[list[int], list[int]]:
    """The change of reading as an op on the whole value: its shape split into factors, and the order in which they are wanted."""
    before = [_labels(axes, i, dim, _breaks(axes, i, move)) for i, dim in enumerate(move.before)]
    after = [_labels(axes, i, dim, _breaks(axes, i, move)) for i, dim in enumerate(move.after)]
    flat = [factor for dim in before for factor in dim]
    place = {label: i for i, (label, _) in enumerate(flat)}
    return [size for _, size in flat], [place[label] for dim in after for label, _ in dim]


def _breaks(axes: Axes, position: int, move: Moved) -> list[int]:
    """Where axes stand in a dimension before or after, in local elements."""
    found = {1}
    for dim in (move.before[position], move.after[position]):
        done = 1
        for cut in dim.cuts:
            found.add(cut.outer // done)
            done *= axes.parts[cut.axis]
    result = sorted(found)
    for low, high in itertools.pairwise(result):
        if high % low:
            raise Untypable("the axes stand at places of a dimension that do not nest")
    return result


def _labels(axes: Axes, position: int, dim: Dim, breaks: list[int]) -> list[tuple[tuple[str, int, int], int]]:
    """((kind, dimension or axis, number), size) from left to right."""
    if not axes.is_even(dim):
        return [(("uneven", position, 0), dim.size)]
    local = dim.size // axes.product(dim.cuts)
    found: list[tuple[tuple[str, int, int], int]] = []
    waiting = list(dim.cuts)
    done = 1
    for number, start in enumerate(breaks):
        while waiting and waiting[0].outer // done == start:
            cut = waiting.pop(0)
            done *= axes.parts[cut.axis]
            found.append((("axis", cut.axis, 0), axes.parts[cut.axis]))
        stop = breaks[number + 1] if number + 1 < len(breaks) else local
        if stop != start:
            found.append((("local", position, number), stop // start))
    return found
