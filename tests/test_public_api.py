"""What ``import hocket`` offers is pinned, documented, and there without further imports."""

import importlib
import inspect
import subprocess
import sys

import pytest

import hocket
import hocket.errors

PUBLIC = [
    "Auto",
    "DataParallel",
    "Jacobi",
    "Mesh",
    "NGramDraft",
    "OverlapTiles",
    "PipelineParallel",
    "Rewrites",
    "SequenceParallel",
    "SplitBackward",
    "TensorParallel",
    "VocabularyParallel",
    "Zero",
    "__version__",
    "capture",
    "errors",
    "generate",
    "locality_order",
    "parallel",
    "parallelize",
    "sample",
    "sequential",
    "train_step",
    "verify",
]


def test_the_public_names_are_these() -> None:
    assert dir(hocket) == PUBLIC
    assert sorted(hocket.__all__) == [name for name in PUBLIC if name not in ("__version__", "errors")]


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_exists_and_is_documented(name: str) -> None:
    value = getattr(hocket, name)
    if name != "__version__":
        assert inspect.getdoc(value)
        assert value.__doc__, f"{name} inherits its docstring"


@pytest.mark.parametrize("name", hocket.errors.__all__)
def test_every_exception_is_a_documented_hocket_error(name: str) -> None:
    error = getattr(hocket.errors, name)
    assert issubclass(error, hocket.errors.HocketError)
    assert error.__doc__


def test_public_methods_of_what_the_doors_return_are_documented() -> None:
    module = importlib.import_module("hocket.compiler.doors.module").ParallelModule
    step = importlib.import_module("hocket.compiler.doors.train").TrainStep
    verdict = importlib.import_module("hocket.compiler.verify.report").Verdict
    for cls in (module, step, verdict):
        for name, member in vars(cls).items():
            if not name.startswith("_") and (inspect.isfunction(member) or isinstance(member, property)):
                assert inspect.getdoc(member), f"{cls.__name__}.{name}"


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'parallelise'"):
        hocket.parallelise  # type: ignore[attr-defined]  # noqa: B018


def test_errors_are_there_after_import_hocket_alone() -> None:
    code = "import hocket; print(hocket.errors.HocketError.__name__, hocket.__version__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240, check=True)
    assert done.stdout.split() == ["HocketError", hocket.__version__]
