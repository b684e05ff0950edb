"""What the README promises: its commands are those that run, its examples work, its links exist."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path

import pytest

from parallel_dicomseg.cohort import scan_cohort
from parallel_dicomseg.config import load_settings, read_legacy_config
from parallel_dicomseg.convert import convert_cohort
from parallel_dicomseg.records import ConvertOptions
from parallel_dicomseg.synthetic import make_sunnybrook_cohort

CHECKOUT = Path(__file__).resolve().parents[1]
README = (CHECKOUT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    """The fenced blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def test_ci_runs_the_test_command_of_the_readme() -> None:
    """What .ci/run takes out of the README is the one marked block, word for word."""
    marked = re.findall(
        r"<!-- test-command -->\n```bash\n(.*?)```\n<!-- end -->", README, re.DOTALL
    )
    printed = subprocess.run(
        [CHECKOUT / ".ci" / "run", "--print-test-command"],
        capture_output=True,
        text=True,
        check=True,
    )

    assert marked == [printed.stdout]
    assert "-m pytest" in printed.stdout


def test_commands_install_only_extras_that_exist() -> None:
    """Every extra that a command of the README installs is in pyproject.toml."""
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    named = [name for text in re.findall(r'"\.\[(.*?)\]"', README) for name in text.split(",")]

    assert named
    assert set(named) <= set(project["optional-dependencies"])


def test_python_examples_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every Python example runs as it stands beside the cohort that the text speaks of."""
    monkeypatch.chdir(tmp_path)
    make_sunnybrook_cohort("final_data", patients=2, slices=3, rows=40, columns=48, seed=1)
    options = ConvertOptions(zarr="cohort.zarr")
    convert_cohort(scan_cohort("final_data"), "cohort.h5", options=options)
    examples = blocks("python")
    for example in examples:
        exec(compile(example, "README.md", "exec"), {})

    assert len(examples) >= 4
    assert "(40, 48)" in capsys.readouterr().out


def test_configuration_examples_are_read(tmp_path: Path) -> None:
    """The TOML and config.ini of the README are accepted, and the latter shows the defaults."""
    toml, ini = tmp_path / "c.toml", tmp_path / "config.ini"
    (toml_text,), (ini_text,) = blocks("toml"), blocks("ini")
    toml.write_text(toml_text)
    ini.write_text(ini_text)
    settings = load_settings(config=toml)

    assert settings.scan.structures == ("i", "o")
    assert settings.convert.memory_limit == 2**30
    assert settings.convert.checks.max_mask_fraction == 0.3
    assert read_legacy_config(ini) == type(read_legacy_config(ini))()


def test_links_lead_somewhere() -> None:
    """Every relative link and picture of the README exists in the checkout."""
    targets = re.findall(r"\]\((?!https?:)([^)#]+)\)", README)

    assert targets
    assert not [target for target in targets if not (CHECKOUT / target).exists()]
