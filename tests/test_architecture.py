"""Who may import whom, what the package shows to the outside, and that it starts fast."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

import pytest

CHECKOUT = Path(__file__).resolve().parents[1]
PACKAGE = CHECKOUT / "parallel_dicomseg"

#: The rooms from bottom to top: a module imports only from its own room and from levels below.
LEVELS = (
    {"errors", "records"},
    {"jit"},
    {"posix", "compressors", "chunks", "private", "foreign", "files", "limits"},
    {"seal", "geometry", "rasterize", "codec", "text", "checks", "resample", "deidentify"},
    {"overlap"},
    {"dicom"},
    {"volumes"},
    {"structures", "split"},
    {"sources"},
    {"cohort", "saved"},
    {"grid"},
    {"plan"},
    {"drawing", "store", "schedulers", "fingerprint"},
    {"blame"},
    {"running", "update"},
    {"convert"},
    {"loader"},
    {"report", "export"},
    {"synthetic", "phantoms"},
    {"config"},
    {"terminal"},
    {"demo"},
    {"cli_batches"},
    {"cli"},
    {""},  # __init__, which shows the public names
)

#: Which modules may import a package; a room stands for all its modules.
IMPORTERS = {
    "numba": {"jit", "posix", "compressors"},
    "llvmlite": {"compressors"},
    "dask": {"schedulers", "config"},
    "distributed": {"schedulers"},
    "h5py": {"foreign", "store", "loader.opening", "loader.readers"},
    "zarr": {"store", "loader.opening"},
    "google_crc32c": {"codec", "seal", "store", "loader.opening", "loader.readers"},
    "hdf5plugin": {"store"},
    "pydicom": {
        "dicom",
        "synthetic",
        "phantoms",
        "sources.rtstruct",
        "sources.rtstruct_files",
        "sources.seg",
        "deidentify",
        "store",
    },
    "imagecodecs": {"dicom"},
    "PIL": {"resample"},
    "defusedxml": {"sources.lidc"},
    "nibabel": {"export"},
    "isal": {"chunks", "codec", "compressors"},
    "numcodecs": {"chunks", "codec", "compressors"},
    "matplotlib": {"report.figures"},
    "click": {"cli", "cli_batches", "terminal"},
    "torch": {"loader.adapters.pytorch"},
    "keras": {"loader.adapters.keras"},
    "jax": {"loader.adapters.jax"},
    "tensorflow": {"loader.adapters.tensorflow"},
    "rich": {"cli", "terminal", "report.inspection"},
}

#: Imported inside the function that uses them: optional, or slow to import.
LAZY = {"dask", "distributed", "hdf5plugin", "matplotlib"}

#: Packages that are installed under another name than they are imported by.
DISTRIBUTIONS = {"PIL": "pillow"}

#: What printing a help text must not import.
HEAVY = {"dask", "distributed", "h5py", "matplotlib", "numba", "pydicom", "zarr"}


@dataclass(frozen=True)
class Import:
    """One import statement's target, as seen from one module of the package."""

    importer: str
    """Dotted, without the package's name: 'store.hdf5'; '' is __init__."""
    target: str
    """Dotted and absolute: 'parallel_dicomseg.records', 'numpy.typing'."""
    at_top: bool
    """Outside any function."""
    line: int

    @property
    def where(self) -> str:
        """For messages."""
        return f"{self.importer or '__init__'}:{self.line} imports {self.target}"


@cache
def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name without the package's own."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(part for part in parts if part != "__init__")] = path
    return found


@cache
def imports() -> tuple[Import, ...]:
    """Every import statement of the package, also those inside functions and TYPE_CHECKING."""
    return tuple(
        found
        for name, path in modules().items()
        for found in imports_of(name, path.name == "__init__.py", path.read_text(encoding="utf-8"))
    )


def imports_of(name: str, is_package: bool, source: str) -> Iterator[Import]:
    """The import statements of one module."""
    tree = ast.parse(source)
    inside = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(function)
    }
    here = ("parallel_dicomseg", *(part for part in name.split(".") if part))
    package = here if is_package else here[:-1]
    for node in ast.walk(tree):
        for target in targets(node, package):
            yield Import(name, target, id(node) not in inside, node.lineno)


def targets(node: ast.AST, package: tuple[str, ...]) -> Iterator[str]:
    """The modules that a statement imports; `from package import module` counts as the module."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        base = package[: len(package) + 1 - node.level] if node.level else ()
        source = ".".join((*base, *([node.module] if node.module else [])))
        known = {f"parallel_dicomseg.{name}" for name in modules() if name}
        for alias in node.names:
            full = f"{source}.{alias.name}"
            yield full if full in known else source


def room(module: str) -> str:
    """The part of the package that a module belongs to."""
    return module.partition(".")[0]


def own(target: str) -> str | None:
    """The name of a module of the package without the package's own, or None for a foreign one."""
    package, _, name = target.partition(".")
    return name if package == "parallel_dicomseg" else None


def test_every_form_of_import_is_seen() -> None:
    """Absolute, relative, aliased, nested and package imports all count as the module they load."""
    source = """
import numpy.typing as npt, os
from . import dicom
from .records import Layout
from ..errors import LayoutError
from parallel_dicomseg import codec
if TYPE_CHECKING:
    import zarr
def f():
    from parallel_dicomseg.store import hdf5
"""
    seen = [(f.target, f.at_top) for f in imports_of("store.table", False, source)]

    assert sorted(seen) == [
        ("numpy.typing", True),
        ("os", True),
        ("parallel_dicomseg.codec", True),
        ("parallel_dicomseg.errors", True),
        ("parallel_dicomseg.store", True),
        ("parallel_dicomseg.store.hdf5", False),
        ("parallel_dicomseg.store.records", True),
        ("zarr", True),
    ]


def test_every_module_has_a_level() -> None:
    """A new module is placed in the list before it is imported."""
    assert {room(name) for name in modules()} <= set().union(*LEVELS)


def test_imports_point_downwards() -> None:
    """No module imports from its own level or from above, except inside its own room."""
    level = {name: number for number, names in enumerate(LEVELS) for name in names}
    wrong = [
        found.where
        for found in imports()
        if (name := own(found.target)) is not None
        and room(name) != room(found.importer)
        and level[room(name)] >= level[room(found.importer)]
    ]

    assert not wrong


def test_imports_have_no_cycle() -> None:
    """The modules can be put in an order in which each imports only earlier ones."""
    graph: dict[str, set[str]] = {name: set() for name in modules()}
    for found in imports():
        name = own(found.target)
        if name is not None and name != found.importer:
            graph[found.importer].add(name)

    order = list(TopologicalSorter(graph).static_order())

    assert len(order) == len(set(order)) >= len(graph)


def test_foreign_packages_stay_in_their_rooms() -> None:
    """Only the modules in the table import a third-party package; NumPy is everywhere."""
    wrong = []
    for found in imports():
        package = found.target.partition(".")[0]
        if own(found.target) is not None or package in {*sys.stdlib_module_names, "numpy"}:
            continue
        if not {found.importer, room(found.importer)} & IMPORTERS.get(package, set()):
            wrong.append(found.where)

    assert not wrong


def test_optional_and_slow_packages_are_imported_where_they_are_used() -> None:
    """No module imports an optional or slow package just because it is imported itself."""
    wrong = [f.where for f in imports() if f.at_top and f.target.partition(".")[0] in LAZY]

    assert not wrong


def test_public_names_are_few_and_documented() -> None:
    """The package shows at most 14 names, each with a docstring."""
    package = importlib.import_module("parallel_dicomseg")
    undocumented = [
        name
        for name in package.__all__
        if not name.startswith("__") and not getattr(package, name).__doc__
    ]

    assert not undocumented
    assert len(package.__all__) <= 14
    assert set(package.__all__) <= set(dir(package))


@pytest.mark.parametrize(
    "arguments", [None, ["--help"], ["convert", "-h"], ["scan", "--show-config"]]
)
def test_nothing_heavy_is_imported_before_it_is_needed(
    arguments: list[str] | None, tmp_path: Path
) -> None:
    """The package itself, help texts and settings come without numba, Dask, h5py and the like."""
    run = f"main({arguments!r}, standalone_mode=False)" if arguments else ""
    start = "from parallel_dicomseg.cli import main" if arguments else "import parallel_dicomseg"
    program = f"{start}\n{run}\nimport sys\nprint('heavy:', *({HEAVY!r} & sys.modules.keys()))"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True
    )

    assert done.stdout.splitlines()[-1] == "heavy:"


def project() -> dict[str, Any]:
    """The [project] table of pyproject.toml."""
    text = (CHECKOUT / "pyproject.toml").read_text(encoding="utf-8")
    table: dict[str, Any] = tomllib.loads(text)["project"]
    return table


def runtime_dependencies() -> set[str]:
    """Names of what is installed with the package or with an extra that users need."""
    extras = project()["optional-dependencies"]
    chosen = [extras[name] for name in extras if name not in {"test", "benchmark", "dev"}]
    requirements = [*project()["dependencies"], *(text for extra in chosen for text in extra)]
    return {re.split(r"[^\w-]", text)[0] for text in requirements}


def test_version_is_the_same_everywhere() -> None:
    """The package, pyproject.toml and CITATION.cff name one version."""
    citation = (CHECKOUT / "CITATION.cff").read_text(encoding="utf-8")
    cited = re.findall(r"^version: (\S+)$", citation, re.MULTILINE)

    assert [project()["version"]] == cited
    assert project()["version"] == importlib.import_module("parallel_dicomseg").__version__


def test_every_imported_package_is_declared() -> None:
    """What the package imports is in pyproject.toml, not merely somebody else's dependency."""
    declared = {name.replace("-", "_") for name in runtime_dependencies()}
    modules = {f.target.partition(".")[0] for f in imports() if own(f.target) is None}
    foreign = {DISTRIBUTIONS.get(module, module) for module in modules}

    assert set() == foreign - declared - sys.stdlib_module_names


def test_every_dependency_is_justified() -> None:
    """Every runtime dependency, optional or not, has a row in the README's table."""
    readme = (CHECKOUT / "README.md").read_text(encoding="utf-8")

    assert not {name for name in runtime_dependencies() if f"| {name} |" not in readme}
