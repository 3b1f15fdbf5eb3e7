"""The folders, the import names and the built distributions agree, and an installed hocket works without its checkout."""

import configparser
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import textwrap
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = {"hocket": "api", "hocket.compiler": "compiler", "hocket.passes": "passes", "hocket.runtime": "runtime"}


def config() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def modules() -> set[str]:
    """Every module as its path in an installation: ``hocket/compiler/emit.py``."""
    return {
        str(Path(*name.split(".")) / file.relative_to(ROOT / folder))
        for name, folder in ROOMS.items()
        for file in (ROOT / folder).rglob("*.py")
    }


def run(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False, **options)  # type: ignore[call-overload]
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done  # type: ignore[no-any-return]


def clean_environment() -> dict[str, str]:
    """No variable that could let the checkout in."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}


def test_packages_listed_are_the_folders_that_hold_modules() -> None:
    listed = config()["options"]["packages"].split()
    found = {str(Path(module).parent).replace("/", ".") for module in modules()}
    assert sorted(found) == sorted(listed)


def test_every_package_has_an_init_file() -> None:
    folders = {Path(module).parent for module in modules()}
    assert not [folder for folder in folders if str(folder / "__init__.py") not in modules()]


def test_the_version_is_said_once() -> None:
    import hocket

    assert config()["metadata"]["version"] == hocket.__version__


def test_torch_finds_the_backend_by_name() -> None:
    from importlib.metadata import entry_points

    (point,) = entry_points(group="torch_dynamo_backends", name="hocket")
    assert callable(point.load())


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and the sdist, built from a copy of what is in the checkout."""
    source = tmp_path_factory.mktemp("source") / "checkout"
    source.mkdir()
    skip = shutil.ignore_patterns("__pycache__", "*.egg-info", "_build")
    for folder in (*ROOMS.values(), "docs", "benchmarks", "tests"):
        if (ROOT / folder).is_dir():
            shutil.copytree(ROOT / folder, source / folder, ignore=skip)
    for file in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "MANIFEST.in"):
        shutil.copy(ROOT / file, source)
    out = tmp_path_factory.mktemp("dist")
    build = f"from setuptools import build_meta as b; b.build_sdist({str(out)!r}); b.build_wheel({str(out)!r})"
    run([sys.executable, "-c", build], cwd=source)
    return out


def test_the_wheel_holds_every_module_and_nothing_else(distributions: Path) -> None:
    (wheel,) = distributions.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name for name in names if name.endswith(".py")} == modules()
    assert "hocket/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_sdist_holds_what_is_needed_to_work_on_hocket(distributions: Path) -> None:
    (sdist,) = distributions.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {str(Path(*Path(name).parts[1:])) for name in archive.getnames()}
    for name, folder in ROOMS.items():
        expected = {module.replace(name.replace(".", "/"), folder, 1) for module in modules_of(name)}
        assert expected <= names
    wanted = {"README.md", "LICENSE", "CHANGELOG.md", "setup.cfg", "pyproject.toml", "docs/index.md", "docs/examples/quickstart.py"}
    assert wanted <= names
    assert "tests/compiler/cli/test_cli.py" in names


def modules_of(package: str) -> set[str]:
    """The modules of one room, not those of the rooms inside its import name."""
    prefix = package.replace(".", "/") + "/"
    others = tuple(name.replace(".", "/") + "/" for name in ROOMS if name != package and name.startswith(package))
    return {module for module in modules() if module.startswith(prefix) and not module.startswith(others or ("\0",))}


def make_environment(folder: Path) -> Path:
    """A fresh virtual environment that sees the libraries of this one, but not its hocket; the path of its python."""
    run([sys.executable, "-m", "venv", "--without-pip", str(folder)])
    python = folder / "bin" / "python"
    site = run([str(python), "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"]).stdout.strip()
    here = sysconfig.get_paths()["purelib"]
    # appended without reading the .pth files there, among which is that of the editable hocket
    Path(site, "libraries.pth").write_text(f"{here}\n")
    return python


def install(python: Path, what: list[str]) -> None:
    """Install without dependencies and without the network."""
    pip = [str(python), "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--no-build-isolation", "--ignore-installed"]
    run([*pip, "--disable-pip-version-check", *what], env=clean_environment(), cwd=ROOT.anchor)


BACKEND = """
    import torch
    from torch import nn

    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    compiled = torch.compile(model, backend="hocket", options={"mesh": "tp=2", "engine": "sim"})
    x = torch.randn(4, 8)
    torch.testing.assert_close(compiled(x), model(x))
    import hocket
    print("from", hocket.__file__)
"""


def test_an_installed_wheel_works_without_the_checkout(distributions: Path, tmp_path: Path) -> None:
    """The command, and ``torch.compile(backend="hocket")`` in a process that has imported nothing of hocket."""
    python = make_environment(tmp_path / "venv")
    (wheel,) = distributions.glob("*.whl")
    install(python, [str(wheel)])
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(BACKEND))
    told = run([str(python), str(script)], env=clean_environment(), cwd=tmp_path).stdout
    assert str(tmp_path / "venv") in told
    doctor = run([str(python), "-m", "hocket", "doctor"], env=clean_environment(), cwd=tmp_path).stdout
    assert "hocket doctor" in doctor


def test_an_editable_install_follows_the_checkout(tmp_path: Path) -> None:
    """A file added after the installation is found."""
    checkout = tmp_path / "my-checkout"
    checkout.mkdir()
    for folder in ROOMS.values():
        shutil.copytree(ROOT / folder, checkout / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, checkout)
    python = make_environment(tmp_path / "venv")
    install(python, ["-e", str(checkout)])
    (checkout / "runtime" / "added_later.py").write_text("here = True\n")
    code = "import hocket.runtime.added_later as a, hocket; print(a.here, hocket.__file__)"
    for place in (tmp_path, checkout):
        told = run([str(python), "-c", code], env=clean_environment(), cwd=place).stdout
        assert told.startswith("True ")
        assert str(checkout / "api") in told
