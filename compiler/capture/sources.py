"""Which line of the user's code is running, and in which of their submodules.

While a model is traced, every op asks for the innermost frame that belongs neither to torch, nor to the standard library, nor to
hocket; the walk ends at the frame that started the trace, so the caller of ``capture`` is never blamed. A model made of torch.nn
parts alone has no line of its own: then the submodule stands for it.
"""

from __future__ import annotations

import linecache
import os
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import CodeType, FrameType, TracebackType

import torch

_TORCH = os.path.dirname(os.path.abspath(torch.__file__)) + os.sep
_HOCKET = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
_DEMO = os.path.join(_HOCKET, "demo") + os.sep  # its model plays the part of a user's
_STDLIB = os.path.abspath(sysconfig.get_paths()["stdlib"]) + os.sep
_SITE = (os.sep + "site-packages" + os.sep, os.sep + "dist-packages" + os.sep)
_known_files: dict[str, bool] = {}


def is_user_file(filename: str) -> bool:
    """True for a file that is neither torch's, nor hocket's, nor the standard library's, nor generated code."""
    known = _known_files.get(filename)
    if known is None:
        path = os.path.abspath(filename)
        standard = path.startswith(_STDLIB) and not any(part in path for part in _SITE)
        ours = path.startswith(_HOCKET) and not path.startswith(_DEMO)
        known = not (filename.startswith("<") or path.startswith(_TORCH) or ours or standard)
        if filename.startswith(("<stdin>", "<ipython-input")):
            known = True
        _known_files[filename] = known
    return known


def line_of(filename: str, number: int) -> str:
    """``"model.py:41 self.o(h)"``."""
    return f"{os.path.basename(filename)}:{number} {linecache.getline(filename, number).strip()}".rstrip()


@dataclass
class SourceFinder:
    """Finds the user's line and submodule of whatever is running.

    modules: id of a submodule -> its qualified name; entry: the code object at which the walk up the stack ends; override: a
    (source, module) pair that stands for the stack while an already captured graph is run again. outer: how many entries to pass,
    for a trace inside a trace.
    """

    modules: Mapping[int, str]
    kinds: Mapping[str, str] = field(default_factory=dict)
    entry: set[CodeType] = field(default_factory=set)
    override: tuple[str, str] | None = None
    outer: int = 0

    def locate(self, frame: FrameType | None, *, outer: int = 0) -> tuple[str, str]:
        """(source, module) of the innermost user frame; empty strings where there is none."""
        if self.override is not None:
            return self.override
        source, module = "", None
        while frame is not None:
            code = frame.f_code
            if code in self.entry:
                if not outer:
                    break
                outer -= 1
            if not source and is_user_file(code.co_filename):
                source = line_of(code.co_filename, frame.f_lineno)
            if module is None and code.co_argcount:
                module = self.modules.get(id(frame.f_locals.get(code.co_varnames[0])))
            if source and module is not None:
                break
            frame = frame.f_back
        if not source and module is not None:
            source = f"{module or 'model'}: {self.kinds.get(module, 'module')}"
        return source, module or ""


def user_line(trace: TracebackType | None) -> str:
    """The innermost user line of an exception's traceback, "" if there is none."""
    found = ""
    while trace is not None:
        code = trace.tb_frame.f_code
        if is_user_file(code.co_filename):
            found = line_of(code.co_filename, trace.tb_lineno)
        trace = trace.tb_next
    return found
