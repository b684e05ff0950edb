"""What the README promises: its commands are those that run, its examples work, its links exist."""

from __future__ import annotations

import re
import shlex
import subprocess
import tomllib
from pathlib import Path

import pytest
from click.testing import CliRunner

from parallel_dicomseg.cli import export, main, process_dicom_to_hdf5
from parallel_dicomseg.config import load_settings, read_legacy_config
from parallel_dicomseg.phantoms import ellipse, make_rtstruct_series
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


def make_archive(directory: Path) -> None:
    """Three patients, each with a CT and an RTSTRUCT of a heart and two lungs."""
    middle = range(2, 6)
    structures = {
        "Heart": [(k, ellipse(33.0, 40.0, 11.0, 9.0)) for k in middle],
        "Lung_L": [(k, ellipse(17.0, 28.0, 9.0, 15.0)) for k in middle],
        "Lung_R": [(k, ellipse(48.0, 28.0, 9.0, 15.0)) for k in middle],
    }
    for k in range(3):
        make_rtstruct_series(
            directory / f"patient {k}", structures=structures, patient_id=f"P{k}", seed=k
        )


def commands() -> list[list[str]]:
    """All commands of the README but the demo, which has a test of its own."""
    lines = "".join(blocks("bash")).splitlines()
    words = [shlex.split(line, comments=True) for line in lines]
    return [w for w in words if w and w[0] in ("parallel-dicomseg", "process_dicom_to_hdf5")]


def test_examples_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every command, then every Python example, as it stands beside the data of the text."""
    monkeypatch.chdir(tmp_path)
    make_archive(tmp_path / "archive")
    make_sunnybrook_cohort("final_data", patients=2, slices=3, rows=40, columns=48, seed=1)
    for command, *arguments in commands():
        entry = main if command == "parallel-dicomseg" else process_dicom_to_hdf5
        result = CliRunner().invoke(entry, arguments)
        assert result.exit_code == 0, (command, arguments, result.output)
    examples = blocks("python")
    for example in examples:
        exec(compile(example, "README.md", "exec"), {})  # noqa: S102  # our own

    assert len(commands()) >= 12
    assert len(examples) >= 5
    printed = capsys.readouterr().out
    assert "(40, 48)" in printed
    assert "('heart', 'lung')" in printed
    assert Path("masks.png").stat().st_size > 10_000


def test_every_option_is_in_the_tables() -> None:
    """What `scan` and `convert` offer is what the README lists, and nothing else."""
    offered = {
        option
        for name in ("scan", "convert")
        for parameter in main.commands[name].params
        for option in parameter.opts
        if option.startswith("--")
    }
    listed = set(re.findall(r"`(--[a-z0-9-]+)`", README))

    assert offered - listed - {"--output"} == set()
    exported = {o for c in export.commands.values() for p in c.params for o in p.opts}
    inspected = {"--tag", *(o for p in process_dicom_to_hdf5.params for o in p.opts)}
    assert listed - offered - exported - inspected - {"--help", "--quick"} == set()


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
