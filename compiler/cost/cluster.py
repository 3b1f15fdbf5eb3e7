"""What the planner knows of the hardware: a roofline per device and an alpha-beta line per collective.

    op          seconds = overhead + max(flops / flops_per_second, bytes / memory_bandwidth)
    collective  seconds = alpha * ceil(log2(ranks)) + beta * (bytes that one rank puts on the wire)

The figures are a person's or a calibration's (``calibrate.py``), never looked up by the name of a device. Each collective has its
own line: on common transports an all-gather costs several times an all-reduce of the same bytes.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ...runtime.transports.transport import LinkCost
from ..errors import InputError
from ..redistribute import StepKind

VERSION = 1
COLLECTIVES = (StepKind.ALL_REDUCE, StepKind.ALL_GATHER, StepKind.REDUCE_SCATTER, StepKind.ALL_TO_ALL)


@dataclass(frozen=True)
class Line:
    """alpha: seconds per collective between two ranks; beta: seconds per byte on the wire. Raises InputError if negative."""

    alpha: float
    beta: float

    def __post_init__(self) -> None:
        if not all(math.isfinite(x) and x >= 0 for x in (self.alpha, self.beta)):
            raise InputError(f"alpha and beta must be finite and not negative; found {self.alpha!r} and {self.beta!r}")

    def seconds(self, wire_bytes: float, ranks: int) -> float:
        """Time of one collective over ``ranks`` ranks."""
        return self.alpha * max(1, math.ceil(math.log2(ranks))) + self.beta * wire_bytes


BUSY = 0.25
"""Spread of times above which other work has disturbed a calibration."""


@dataclass(frozen=True)
class TileCosts:
    """What a tile loop costs beyond its ops and its bytes, in seconds. InputError if negative.

    begin: once a loop; turn: each tile, for its views, its signal and the wait for it; repack: a byte of what a product reads
    whole, for every tile anew (weights are packed for each product); collective: one through shared memory, whatever its size;
    doubt: by how much predictions are off either way, so that a loop must gain more than twice of it; measured: whether
    ``hocket calibrate`` has found them here; spread: by which part times lay above undisturbed ones then: beyond ``BUSY`` the
    figures are not to be relied on, and a loop must gain that part of its time. The defaults are rounded from calibrations of
    two-core virtual machines, and are used,
    and named in the decisions, until there is one of this machine.
    """

    begin: float = 1.0e-4
    turn: float = 5.0e-5
    repack: float = 4.0e-11
    collective: float = 6.0e-5
    doubt: float = 5.0e-5
    measured: bool = False
    spread: float = 0.0

    def __post_init__(self) -> None:
        for one in dataclasses.fields(self):
            figure = getattr(self, one.name)
            if not (math.isfinite(figure) and figure >= 0):
                raise InputError(f"{one.name} of a tile loop must be finite and not negative; found {figure!r}")

    @property
    def is_unsteady(self) -> bool:
        """Whether the machine was too busy to be measured."""
        return self.spread > BUSY

    @property
    def origin(self) -> str:
        """Where the figures come from, for a person."""
        if self.is_unsteady:
            return f"costs measured on this machine while it was busy, times {self.spread:.0%} too long: hocket calibrate again"
        return "costs measured on this machine" if self.measured else "default costs: hocket calibrate measures them"


@dataclass(frozen=True)
class Cluster:
    """One rank's device and what joins the ranks.

    device: ``"cpu"`` or ``"cuda"``; flops: matmul flops per second by dtype name (``"float32"``; a dtype that is not listed
    counts as float32); memory_bandwidth: bytes/s; op_overhead: seconds per op; collectives: a line per collective; axes: other
    lines for some mesh axes (a slower network between nodes); tiles: what tile loops cost; link: a wire that moves bytes by itself
    between ranks that do not see each other's memory, None where they do. Raises InputError for missing or senseless figures.
    """

    device: str
    flops: Mapping[str, float]
    memory_bandwidth: float
    op_overhead: float
    collectives: Mapping[StepKind, Line]
    axes: Mapping[str, Mapping[StepKind, Line]] = field(default_factory=dict)
    tiles: TileCosts = TileCosts()
    link: Line | None = None

    def __post_init__(self) -> None:
        if "float32" not in self.flops:
            raise InputError(f"flops needs at least an entry for float32; found {sorted(self.flops)}")
        for name, figure in {**self.flops, "memory_bandwidth": self.memory_bandwidth}.items():
            if not (math.isfinite(figure) and figure > 0):
                raise InputError(f"{name} must be a positive number; found {figure!r}")
        if not (math.isfinite(self.op_overhead) and self.op_overhead >= 0):
            raise InputError(f"op_overhead must not be negative; found {self.op_overhead!r}")
        missing = [kind.value for kind in COLLECTIVES if kind not in self.collectives]
        if missing:
            raise InputError(f"a cluster needs a line for every collective; {', '.join(missing)} is missing")

    def line(self, kind: StepKind, axis: str) -> Line:
        """The line of a collective along a mesh axis."""
        return self.axes.get(axis, {}).get(kind) or self.collectives[kind]

    def flops_per_second(self, dtype: torch.dtype) -> float:
        """Matmul speed for a dtype."""
        return self.flops.get(str(dtype).removeprefix("torch."), self.flops["float32"])

    def op_seconds(self, flops: float, bytes_moved: float, dtype: torch.dtype = torch.float32) -> float:
        """Roofline time of one op."""
        return self.op_overhead + max(flops / self.flops_per_second(dtype), bytes_moved / self.memory_bandwidth)

    def over(self, cost: LinkCost) -> Cluster:
        """The same devices joined by a link of that cost: every message takes a latency, every byte its time on the wire."""
        line = Line(cost.alpha, cost.beta)
        lines = {**dict.fromkeys(COLLECTIVES, line), StepKind.ALL_REDUCE: Line(2 * cost.alpha, cost.beta)}
        return dataclasses.replace(self, collectives=lines, axes={}, link=line)

    @classmethod
    def default(cls, device: str = "cpu") -> Cluster:
        """Round figures for when nothing was measured: one CPU thread a rank with gloo, or one data-centre GPU with NVLink."""
        if device == "cpu":
            return cls(
                device="cpu",
                flops={"float32": 6e10, "float64": 3e10, "bfloat16": 3e10, "float16": 1e10},
                memory_bandwidth=1e10,
                op_overhead=4e-6,
                collectives={
                    StepKind.ALL_REDUCE: Line(1.2e-4, 0.7e-9),
                    StepKind.ALL_GATHER: Line(1.2e-4, 1.5e-9),
                    StepKind.REDUCE_SCATTER: Line(1.5e-4, 2.0e-9),
                    StepKind.ALL_TO_ALL: Line(1.5e-4, 1.0e-9),
                },
            )
        if device == "cuda":
            line = Line(1.5e-5, 1 / 2e11)
            return cls(
                device="cuda",
                flops={"float32": 5e13, "float64": 3e13, "bfloat16": 5e14, "float16": 5e14},
                memory_bandwidth=2e12,
                op_overhead=5e-6,
                collectives=dict.fromkeys(COLLECTIVES, line),
            )
        raise InputError(f'device must be "cpu" or "cuda"; found {device!r}')

    @classmethod
    def current(cls, device: str = "cpu") -> Cluster:
        """The calibrated cluster of this user and device if one was saved, else the default one.

        Raises InputError if the file is bad.
        """
        path = default_path(device)
        return cls.load(path) if path.exists() else cls.default(device)

    def to_json(self) -> dict[str, Any]:
        """Plain data, inverse of ``from_json``."""
        return {
            "version": VERSION,
            "device": self.device,
            "flops": dict(self.flops),
            "memory_bandwidth": self.memory_bandwidth,
            "op_overhead": self.op_overhead,
            "collectives": _lines_to_json(self.collectives),
            "axes": {axis: _lines_to_json(lines) for axis, lines in self.axes.items()},
            "tiles": dataclasses.asdict(self.tiles),
        }

    @classmethod
    def from_json(cls, data: object) -> Cluster:
        """Read ``to_json``'s form. Raises InputError naming what is wrong."""
        if not isinstance(data, dict) or data.get("version") != VERSION:
            found = data.get("version") if isinstance(data, dict) else type(data).__name__
            raise InputError(f"a cluster file must have version {VERSION}; found {found!r}: calibrate again")
        try:
            return cls(
                device=str(data["device"]),
                flops={str(name): float(figure) for name, figure in data["flops"].items()},
                memory_bandwidth=float(data["memory_bandwidth"]),
                op_overhead=float(data["op_overhead"]),
                collectives=_lines_from_json(data["collectives"]),
                axes={str(axis): _lines_from_json(lines) for axis, lines in data.get("axes", {}).items()},
                tiles=TileCosts(**data.get("tiles", {})),
            )
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise InputError(f"not a cluster description: {type(error).__name__}: {error}; calibrate again") from error

    def save(self, path: Path | None = None) -> Path:
        """Write as JSON (to the user's configuration folder by default), in one step: a reader never sees half a file."""
        path = path or default_path(self.device)
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
        try:
            with os.fdopen(handle, "w") as file:
                json.dump(self.to_json(), file, indent=1)
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
        return path

    @classmethod
    def load(cls, path: Path) -> Cluster:
        """Read a saved cluster. Raises InputError for a file that is missing or no cluster description."""
        try:
            data = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise InputError(f"{path}: expected a cluster description in JSON, found {error}") from error
        return cls.from_json(data)


def default_path(device: str) -> Path:
    """Where calibrations live: ``$XDG_CONFIG_HOME/hocket/cluster-cpu.json``, below ``~/.config`` if that is not set."""
    home = os.environ.get("XDG_CONFIG_HOME")
    return (Path(home) if home else Path.home() / ".config") / "hocket" / f"cluster-{device}.json"


def _lines_to_json(lines: Mapping[StepKind, Line]) -> dict[str, dict[str, float]]:
    return {kind.value: {"alpha": line.alpha, "beta": line.beta} for kind, line in lines.items()}


def _lines_from_json(data: Mapping[str, Mapping[str, float]]) -> dict[StepKind, Line]:
    return {StepKind(kind): Line(float(line["alpha"]), float(line["beta"])) for kind, line in data.items()}
