"""Number theory behind the ring, and its look-up tables on disk.

    r = p^2 + p + 1 and p both prime  =>  p | r - 1  and  r | p^3 - 1

so F_r* holds an element ``omega`` of order p and GF(p^3)* an element ``zeta`` of order r: exponentials can run in a cycle (see
``arithmetic``). GF(p^3) is F_p[x] / (x^3 - a x - b). The pairs of ``PRIMES`` also make 2 and 3 fourth powers in both fields, so
that literals such as 32**-0.5 or 32**-0.25 (attention scales) have true roots, and p = 3 mod 4, so that -1 is no square in GF(p^3).
"""

from __future__ import annotations

import contextlib
import functools
import os
import random
import tempfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import sympy
import torch

PRIMES = (1559, 1847)
"""The default pair: r = 2,432,041 and 3,413,257. Fourth roots of 2, 3 and 13 in both, of 5 in the first."""

MORE_PRIMES = (911, 839, 1583)
"""Rings for literals whose roots the default pair lacks: 839 has a fourth root of 7, 1583 one of 11."""

VERSION = 1
"""Of the table layout on disk; a file of another version is another file."""

Cubic = tuple[int, int, int]
"""An element of GF(p^3): coefficients of 1, x and x^2."""


@dataclass(frozen=True)
class Field:
    """GF(p^3) in plain Python integers: what building the tables needs. ``x^3 = a x + b``."""

    p: int
    a: int
    b: int

    def mul(self, x: Cubic, y: Cubic) -> Cubic:
        """Product."""
        p, a, b = self.p, self.a, self.b
        c3 = x[1] * y[2] + x[2] * y[1]
        c4 = x[2] * y[2]
        return (
            (x[0] * y[0] + b * c3) % p,
            (x[0] * y[1] + x[1] * y[0] + a * c3 + b * c4) % p,
            (x[0] * y[2] + x[1] * y[1] + x[2] * y[0] + a * c4) % p,
        )

    def power(self, x: Cubic, exponent: int) -> Cubic:
        """``x ** exponent`` for a non-negative exponent."""
        result: Cubic = (1, 0, 0)
        while exponent:
            if exponent & 1:
                result = self.mul(result, x)
            x = self.mul(x, x)
            exponent >>= 1
        return result


@dataclass(frozen=True)
class Tables:
    """One ring's numbers. All tensors are int32 on the CPU.

    exponential: [3, r], zeta**k; inverse: [r]; root: [r], the multiplicative square root map of F_r*; log_order: [r], the k in the
    order of the codes of zeta**k; omega_powers: [p]; functional: the F_p-linear map t of GF(p^3) whose values E exponentiates.
    """

    field: Field
    r: int
    exponential: torch.Tensor
    inverse: torch.Tensor
    root: torch.Tensor
    log_order: torch.Tensor
    omega_powers: torch.Tensor
    functional: Cubic


def odd_root_exponent(order: int) -> int:
    """e with (x^e)^2 = x for every x of odd order in a cyclic group of this order: the multiplicative square root map x -> x^e."""
    while order % 2 == 0:
        order //= 2
    return (order + 1) // 2


def powers(base: int, count: int, modulus: int) -> torch.Tensor:
    """``base**k mod modulus`` for k < count, int64, by doubling."""
    result = torch.ones(1, dtype=torch.int64)
    step = base % modulus
    while result.numel() < count:
        result = torch.cat((result, result * step % modulus))
        step = step * step % modulus
    return result[:count]


def check_pair(p: int) -> int:
    """r for a usable p; ValueError otherwise."""
    r = p * p + p + 1
    if not (2 < p < 2048 and p % 4 == 3 and sympy.isprime(p) and sympy.isprime(r)):
        raise ValueError(
            f"the ring needs p and p^2+p+1 prime and p < 2048 (exact products in float64) and p = 3 mod 4 (signs); found p = {p}"
        )
    return r


def irreducible_cubic(p: int) -> tuple[int, int]:
    """(a, b) such that x^3 - a x - b has no root mod p."""
    x = np.arange(p, dtype=np.int64)
    for b in range(2, p):
        if ((x * x * x - x - b) % p).all():
            return 1, b
    raise ValueError(f"no irreducible cubic x^3 - x - b mod {p}")


@functools.lru_cache(maxsize=4)
def load_tables(p: int, directory: str | None = None) -> Tables:
    """Tables of the ring with this p, from ``directory`` (default: the user's cache folder), built there when absent or damaged."""
    check_pair(p)
    folder = Path(directory) if directory is not None else default_folder()
    path = folder / f"ring-v{VERSION}-p{p}.npy"
    stored = _read(path, p)
    if stored is None:
        stored = _build(p)
        _write(path, stored)
    return _unpack(p, stored)


def default_folder() -> Path:
    """``$XDG_CACHE_HOME/hocket``, by default ``~/.cache/hocket``."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "hocket"


def _length(p: int) -> int:
    r = p * p + p + 1
    return 6 * r + p + 3 + 1  # exponential x 3, inverse, root, log order | omega powers | functional | checksum


def _read(path: Path, p: int) -> np.ndarray | None:
    try:
        stored = np.load(path, mmap_mode="c", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    if stored.dtype != np.int32 or stored.shape != (_length(p),) or int(stored[-1]) != _checksum(stored):
        return None
    return np.asarray(stored)


def _checksum(stored: np.ndarray) -> int:
    return zlib.crc32(stored[:-1].view(np.uint8).data) & 0x7FFFFFFF


def _write(path: Path, stored: np.ndarray) -> None:
    """Through a temporary file and a rename, so that no reader ever sees half a table. An unwritable cache only costs time."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, suffix=".part")
        try:
            with os.fdopen(handle, "wb") as file:
                np.save(file, stored, allow_pickle=False)
            Path(name).replace(path)
        except OSError:
            Path(name).unlink(missing_ok=True)
            raise


def _unpack(p: int, stored: np.ndarray) -> Tables:
    r = p * p + p + 1
    data = torch.from_numpy(stored)
    a, b = irreducible_cubic(p)
    t0, t1, t2 = data[6 * r + p : 6 * r + p + 3].tolist()
    return Tables(
        field=Field(p, a, b),
        r=r,
        exponential=data[: 3 * r].view(3, r),
        inverse=data[3 * r : 4 * r],
        root=data[4 * r : 5 * r],
        log_order=data[5 * r : 6 * r],
        omega_powers=data[6 * r : 6 * r + p],
        functional=(t0, t1, t2),
    )


def _build(p: int) -> np.ndarray:
    r = p * p + p + 1
    field = Field(p, *irreducible_cubic(p))
    choose = random.Random(p)  # any fixed choice of omega, zeta and t gives a valid ring
    omega, zeta = 1, (1, 0, 0)
    while omega == 1:
        omega = pow(choose.randrange(2, r), (r - 1) // p, r)
    while zeta == (1, 0, 0):
        zeta = field.power((choose.randrange(p), choose.randrange(p), choose.randrange(p)), (p**3 - 1) // r)
        zeta = (1, 0, 0) if zeta == (0, 0, 0) else zeta
    functional = torch.tensor([choose.randrange(1, p) for _ in range(3)])
    exponential = _zeta_powers(field, zeta, r)
    code = exponential[0] + p * exponential[1] + p * p * exponential[2]
    inverse, root = _unit_tables(r)
    parts = (exponential.reshape(-1), inverse, root, torch.argsort(code), powers(omega, p, r), functional, torch.zeros(1))
    stored = torch.cat([part.to(torch.int32) for part in parts]).numpy()
    stored[-1] = _checksum(stored)
    return stored


def _zeta_powers(field: Field, zeta: Cubic, r: int) -> torch.Tensor:
    """[3, r]: a giant-step by baby-step outer product of powers."""
    block = 2048
    small: list[Cubic] = [(1, 0, 0)]
    for _ in range(block - 1):
        small.append(field.mul(small[-1], zeta))
    stride = field.mul(small[-1], zeta)
    large: list[Cubic] = [(1, 0, 0)]
    for _ in range(-(-r // block) - 1):
        large.append(field.mul(large[-1], stride))
    x = torch.tensor(large).T[:, :, None]
    y = torch.tensor(small).T[:, None, :]
    c3, c4 = x[1] * y[2] + x[2] * y[1], x[2] * y[2]
    product = torch.stack(
        (
            x[0] * y[0] + field.b * c3,
            x[0] * y[1] + x[1] * y[0] + field.a * c3 + field.b * c4,
            x[0] * y[2] + x[1] * y[1] + x[2] * y[0] + field.a * c4,
        )
    )
    return product.remainder_(field.p).reshape(3, -1)[:, :r].contiguous()


def _unit_tables(r: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inverse and square root map of F_r*, read off the powers of a generator."""
    generator = int(sympy.primitive_root(r))
    units = powers(generator, r - 1, r)
    inverse, root = torch.zeros(r, dtype=torch.int64), torch.zeros(r, dtype=torch.int64)
    inverse[units] = torch.cat((units[:1], units[1:].flip(0)))
    exponents = torch.arange(r - 1) * odd_root_exponent(r - 1) % (r - 1)
    root[units] = units[exponents]
    return inverse, root
