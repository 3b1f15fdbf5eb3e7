"""How one dimension is cut over ``parts`` ranks: the chunk rule of torch (and of DTensor), so that parameters leave as DTensors.

    chunk k of n over p:  start = min(k*ceil(n/p), n),  length = min(ceil(n/p), n - start)

The functions below are the only rank-dependent values of a program. In a lowered graph they are ``call_function`` targets that
return ints; when a program is loaded on a rank they are folded to constants.
"""

from __future__ import annotations


def chunk_size(total: int, parts: int) -> int:
    """Length of the longest chunk, ``ceil(total / parts)``."""
    return -(-total // parts)


def local_offset(total: int, parts: int, index: int) -> int:
    """First global index that chunk ``index`` holds."""
    return min(index * chunk_size(total, parts), total)


def local_size(total: int, parts: int, index: int) -> int:
    """Length of chunk ``index``; the last ones are shorter when ``parts`` does not divide ``total``."""
    return min(chunk_size(total, parts), total - local_offset(total, parts, index))


def padded_size(total: int, parts: int) -> int:
    """Length once every chunk is as long as the longest: ``parts * ceil(total / parts)``. The extra elements all lie at the end."""
    return parts * chunk_size(total, parts)


def padding(have: int, want: int) -> int:
    """How many elements are missing to a length."""
    return want - have


def coordinate(axis: str) -> int:
    """Index of the executing rank on a mesh axis. Only a loader or an interpreter that knows the rank can answer."""
    raise RuntimeError(f"coordinate({axis!r}) must be resolved by the executor")
