"""What is installed and what is run: the lock file, and calls that would run what a file says."""

from __future__ import annotations

import ast
import itertools
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

CHECKOUT = Path(__file__).resolve().parents[1]
LOCK = (CHECKOUT / "requirements.lock").read_text(encoding="utf-8")
PROJECT = tomllib.loads((CHECKOUT / "pyproject.toml").read_text(encoding="utf-8"))
PYTHONS = ("3.11", "3.12", "3.13")

#: Modules that make objects, or run code, of what a file holds.
FORBIDDEN_MODULES = frozenset(
    {"cloudpickle", "code", "dill", "joblib", "jsonpickle", "marshal", "pickle", "shelve", "yaml"}
)
#: Functions that run text, or a shell.
FORBIDDEN_CALLS = frozenset(
    {"__import__", "compile", "eval", "exec", "os.popen", "os.system", "torch.load"}
)
#: Arguments that turn a harmless function into one of these.
FORBIDDEN_ARGUMENTS = frozenset({"allow_pickle", "shell", "weights_only"})
#: Whoever needs one of them writes down here where, and why it is harmless.
ALLOWED = frozenset(
    {
        # tasks and results between a run and the worker processes that it started itself, over a
        # socket that nobody else has; as `multiprocessing` does it. No file comes into it.
        ("parallel_dicomseg/schedulers/process.py", "pickle"),
    }
)


# --- what runs -----------------------------------------------------------------------------------


def dangers(source: str) -> Iterator[str]:
    """Everything in a module that may run what a file says."""
    tree = ast.parse(source)
    names = dict(imported_names(tree))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = node.module or "" if isinstance(node, ast.ImportFrom) else ""
            targets = [module] if module else [alias.name for alias in node.names]
            yield from (t for t in targets if t.partition(".")[0].strip("_") in FORBIDDEN_MODULES)
        elif isinstance(node, ast.Call):
            called = dotted(node.func, names)
            if called in FORBIDDEN_CALLS:
                yield called
            if called.endswith("import_module") and node.args:
                target = node.args[0]
                named = isinstance(target, ast.Constant) and str(target.value).partition(".")[0]
                yield from [named] if named in FORBIDDEN_MODULES else []
            yield from (k.arg for k in node.keywords if k.arg in FORBIDDEN_ARGUMENTS)


def imported_names(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """What names of the module stand for: ('np', 'numpy'), ('system', 'os.system')."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.asname, alias.name) for alias in node.names if alias.asname)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield alias.asname or alias.name, f"{node.module or ''}.{alias.name}"


def dotted(function: ast.expr, names: dict[str, str]) -> str:
    """The full name of what is called, '' where it is no name."""
    if isinstance(function, ast.Name):
        return names.get(function.id, function.id)
    if isinstance(function, ast.Attribute):
        owner = dotted(function.value, names)
        return f"{owner}.{function.attr}" if owner else ""
    return ""


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import pickle", ["pickle"]),
        ("from _pickle import loads", ["_pickle"]),
        ("def f():\n    from marshal import loads", ["marshal"]),
        ("import yaml as y", ["yaml"]),
        ("import importlib\nimportlib.import_module('dill')", ["dill"]),
        ("eval('1')", ["eval"]),
        ("exec(text)", ["exec"]),
        ("from os import system as run\nrun('ls')", ["os.system"]),
        ("import torch as t\nt.load('x')", ["torch.load"]),
        ("import numpy as np\nnp.load('x', allow_pickle=True)", ["allow_pickle"]),
        ("subprocess.run('ls', shell=True)", ["shell"]),
        ("import re\nre.compile('x')\nfile.load()\njson.loads(text)", []),
        ("import importlib\nimportlib.import_module('nibabel')", []),
    ],
)
def test_every_form_of_danger_is_seen(source: str, found: list[str]) -> None:
    """Imports, calls under any name, and arguments; nothing harmless is."""
    assert list(dangers(source)) == found


def test_nothing_runs_what_a_file_says() -> None:
    """No pickle, marshal, YAML, eval, exec or shell in the package, its benchmarks and examples."""
    wrong = {
        (path.relative_to(CHECKOUT).as_posix(), danger)
        for folder in ("parallel_dicomseg", "benchmarks", "examples", "docs")
        for path in (CHECKOUT / folder).rglob("*.py")
        for danger in dangers(path.read_text(encoding="utf-8"))
    }

    assert wrong == ALLOWED


def test_ruff_looks_for_the_same_in_tests_too() -> None:
    """Its rules against exec, pickle, eval, YAML and shells are switched off nowhere."""
    rules = {"S", "S102", "S301", "S302", "S307", "S506", "S602", "S604", "S605"}
    lint = PROJECT["tool"]["ruff"]["lint"]

    assert "S" in lint["select"]
    assert not rules & {*lint["ignore"], *itertools.chain(*lint["per-file-ignores"].values())}


# --- what is installed ---------------------------------------------------------------------------


def locked() -> list[tuple[Requirement, str, int]]:
    """Every entry of the lock file: the requirement, its version, and how many hashes it has."""
    entries = re.findall(r"^(\S[^\\\n]*?) \\\n((?:    --hash=.*\n?)+)", LOCK, re.MULTILINE)
    found = []
    for text, hashes in entries:
        requirement = Requirement(text)
        (pin,) = requirement.specifier
        assert pin.operator == "==", text
        found.append((requirement, pin.version, len(re.findall(r"sha256:[0-9a-f]{64}", hashes))))
    return found


def wanted() -> dict[str, Requirement]:
    """What the environment of tests and benchmarks needs, by name."""
    extras = PROJECT["project"]["optional-dependencies"]
    texts = [*PROJECT["project"]["dependencies"], *PROJECT["build-system"]["requires"]]
    pending = ["test", "benchmark"]
    while pending:
        for text in extras[pending.pop()]:
            requirement = Requirement(text)
            if requirement.name == PROJECT["project"]["name"]:
                pending += requirement.extras
            else:
                texts.append(text)
    return {canonicalize_name(one.name): one for one in map(Requirement, texts)}


@pytest.mark.parametrize("python", PYTHONS)
def test_the_lock_satisfies_the_project(python: str) -> None:
    """For each Python and Linux: one version of each package, within what pyproject.toml allows."""
    here = {
        "python_version": python,
        "python_full_version": f"{python}.0",
        "sys_platform": "linux",
        "platform_system": "Linux",
        "platform_machine": "x86_64",
        "platform_python_implementation": "CPython",
        "implementation_name": "cpython",
        "os_name": "posix",
    }
    versions: dict[str, list[str]] = {}
    for requirement, version, _ in locked():
        if requirement.marker is None or requirement.marker.evaluate(here):
            versions.setdefault(canonicalize_name(requirement.name), []).append(version)

    assert {name: found for name, found in versions.items() if len(found) > 1} == {}
    wrong = {
        name: versions.get(name)
        for name, requirement in wanted().items()
        if name not in versions or not requirement.specifier.contains(versions[name][0])
    }
    assert wrong == {}


def test_the_lock_pins_by_hashes_and_names_no_host() -> None:
    """Every line is a version or a hash of it: no address, no option, no package of another kind.

    Whoever installs decides where from; what comes must be these files.
    """
    entries = locked()

    assert all(hashes for _, _, hashes in entries)
    assert len(entries) == sum(not line.startswith(" ") for line in LOCK.splitlines())
    assert not re.search(r"://|\S@|^\s*-[^-]|--(?!hash=)|file:|git\+", LOCK, re.MULTILINE)
    assert "parallel" not in LOCK


def test_pydicom_is_new_enough() -> None:
    """3.0.2 mends CVE-2026-32711."""
    named = wanted()["pydicom"].specifier
    (version,) = (v for requirement, v, _ in locked() if requirement.name == "pydicom")

    assert not named.contains("3.0.1")
    assert Version(version) >= Version("3.0.2")
