"""What was measured of chains on this machine, on disk: one small JSON file for each chain and its sizes.

Files are named by a digest of the chain, torch's version and the processor, so a change of any of them starts afresh. They are
written beside and renamed into place, so several processes may write at once and the last one stays. A file that is not what it
should be is ignored with one line in the log; a folder that cannot be written costs nothing but the measuring. The oldest files go
when there are too many.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import platform
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch

log = logging.getLogger("hocket")
FORMAT = 1
MOST_FILES = 512
SWITCH = "HOCKET_CHAINS"
"""Environment variable: ``off`` keeps nothing on disk and reads nothing from it."""


class Remembered(NamedTuple):
    """costs: seconds of a step by its number of lanes; merge: steps of memory that the choice was made for; window: the contender
    that was chosen; reason: why."""

    costs: dict[int, float]
    merge: float
    window: int
    reason: str


def folder() -> Path | None:
    """``$XDG_CACHE_HOME/hocket/chains``, by default ``~/.cache/hocket/chains``; None where HOCKET_CHAINS is ``off``."""
    if os.environ.get(SWITCH, "").lower() == "off":
        return None
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "hocket" / "chains"


def recall(key: object) -> Remembered | None:
    """What is on disk about a chain."""
    where = folder()
    if where is None:
        return None
    path = where / _name(key)
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        return _checked(raw)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        log.warning("%s is ignored, and the chain measured again: %s: %s", path, type(error).__name__, error)
        return None


def remember(key: object, what: Remembered) -> None:
    """Keep it for the next process; where that cannot be done, nothing happens."""
    where = folder()
    if where is None:
        return
    try:
        where.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=where, prefix=".new-")  # one that stays behind is tidied away with the others
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump({"format": FORMAT, **what._asdict()}, file)
        os.replace(name, where / _name(key))
        _tidy(where)
    except OSError as error:
        log.debug("what was measured of a chain is not kept: %s", error)


def _checked(raw: dict[str, Any]) -> Remembered:
    """What a file says; an error of Python where it says something else."""
    if raw["format"] != FORMAT:
        raise ValueError(f"format {raw['format']!r} instead of {FORMAT}")
    costs = {int(lanes): float(seconds) for lanes, seconds in raw["costs"].items()}
    merge, window = float(raw["merge"]), int(raw["window"])
    if not all(lanes > 0 and seconds > 0 for lanes, seconds in costs.items()) or not merge >= 0 or window < -1:
        raise ValueError("a number that no measurement gives")
    return Remembered(costs, merge, window, str(raw["reason"]))


def _tidy(where: Path) -> None:
    """Remove the oldest files over the limit; one that another process has removed meanwhile is no error."""
    files = list(os.scandir(where))
    if len(files) <= MOST_FILES:
        return
    ages = []
    for entry in files:
        try:
            ages.append((entry.stat().st_mtime, entry.path))
        except FileNotFoundError:
            continue
    for _, path in sorted(ages)[: len(ages) - MOST_FILES]:
        Path(path).unlink(missing_ok=True)


def _name(key: object) -> str:
    return hashlib.sha256(f"{_machine()}\n{key!r}".encode()).hexdigest()[:40] + ".json"


@functools.cache
def _machine() -> str:
    """What the time of a step depends on besides the chain: torch, the processor, the accelerator."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        lines = []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no accelerator"
    return f"torch {torch.__version__}, {platform.machine()}, {model}, {os.cpu_count()} cores, {device}"
