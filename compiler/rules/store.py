"""Answers of the rule table on disk: one small JSON file for each op signature.

Files are named by a digest of the signature, torch's version, hocket's version and the text of this package, so that a change of
any of them starts afresh. They are written beside and renamed into place. A file that cannot be read as what it should be is
ignored.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch


def default_cache_dir() -> Path:
    """``$XDG_CACHE_HOME/hocket/rules``, by default ``~/.cache/hocket/rules``."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "hocket" / "rules"


@lru_cache(maxsize=1)
def edition() -> str:
    """What answers depend on besides the signature: torch, hocket, and the source text of the rules."""
    try:
        version = importlib.metadata.version("hocket")
    except importlib.metadata.PackageNotFoundError:
        version = "unknown"
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    return f"torch {torch.__version__}, hocket {version}, rules {digest.hexdigest()[:16]}"


class RuleStore:
    """key -> JSON value, in a folder that may vanish, be read-only or hold rubbish at any time. folder None: stores nothing."""

    def __init__(self, folder: Path | None) -> None:
        """folder: made when the first value is written."""
        self.folder = folder

    def get(self, key: str) -> dict[str, Any] | None:
        """The stored value, or None."""
        if self.folder is None:
            return None
        try:
            found = json.loads(self._file(key).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        if not isinstance(found, dict) or found.get("key") != key or found.get("edition") != edition():
            return None
        value = found.get("value")
        return value if isinstance(value, dict) else None

    def put(self, key: str, value: dict[str, Any]) -> None:
        """Store a value; a folder that cannot be written is no error, it only costs the time to work the value out again."""
        if self.folder is None:
            return
        text = json.dumps({"key": key, "edition": edition(), "value": value}, indent=1)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=self.folder, prefix=".new-")
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
            os.replace(name, self._file(key))
        except OSError:
            self.folder = None  # do not try again for every op

    def _file(self, key: str) -> Path:
        assert self.folder is not None
        return self.folder / (hashlib.sha256(f"{edition()}\n{key}".encode()).hexdigest()[:40] + ".json")
