"""Where settings come from, and what is said about wrong ones."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallel_dicomseg import chunks, plan, rasterize, schedulers
from parallel_dicomseg.config import (
    SCHEDULERS,
    SETTINGS,
    LegacyConfig,
    Settings,
    check_layer,
    find_config,
    load_settings,
    read_config,
    read_legacy_config,
    resolve,
)
from parallel_dicomseg.errors import ConfigurationError
from parallel_dicomseg.records import Checks, ConvertOptions, Limits, ScanOptions

CONFIG = """
[scan]
structures = ["o", "i"]

[convert]
codec = "zstd"
memory_limit = "500 MB"
contour_origin = 1

[convert.checks]
max_mask_fraction = 0.25
"""

LEGACY = """
[local]
DATA_DIR_BASE = somewhere/
CONTOURS_SUB_DIR = /o-contours/
LINK_FILE_NAME = links.csv
HDF5_FILENAME = out.h5
BATCH_SIZE = 4
NUM_EPOCHS = 7
"""


@pytest.fixture(autouse=True)
def working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, so that no configuration file lies about."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(name: str, text: str) -> Path:
    """A configuration file in the working directory."""
    Path(name).write_text(text)
    return Path(name)


def leaves(record: Any) -> dict[str, Any]:
    """The fields of nested records by dotted name: the obvious twin of the declared settings."""
    found: dict[str, Any] = {}
    for field in fields(record):
        value = getattr(record, field.name)
        if isinstance(value, Limits):  # a table of their own
            continue
        below = leaves(value) if is_dataclass(value) else {"": value}
        found |= {f"{field.name}.{name}".rstrip("."): item for name, item in below.items()}
    return found


def test_every_field_of_the_records_can_be_set() -> None:
    """The settings are exactly the records' fields, with the records' defaults."""
    expected = {f"scan.{key}": value for key, value in leaves(ScanOptions()).items()}
    expected |= {f"convert.{key}": value for key, value in leaves(ConvertOptions()).items()}
    expected |= {f"limits.{key}": value for key, value in leaves(Limits()).items()}

    assert expected == {key: setting.default for key, setting in SETTINGS.items()}


def test_choices_are_those_of_the_rooms_that_obey_them() -> None:
    """The values that the command line offers are those that the work knows."""
    assert SETTINGS["convert.rule"].choices == tuple(rasterize.RULES)
    assert SETTINGS["convert.codec"].choices == tuple(chunks.CODECS)
    assert SETTINGS["convert.contour_origin"].choices == tuple(plan.CONTOUR_ORIGINS)
    assert (*schedulers.LOCAL_SCHEDULERS, "distributed") == SCHEDULERS


def test_every_setting_accepts_its_own_default() -> None:
    """No default is refused by its own checks."""
    defaults = {key: setting.default for key, setting in SETTINGS.items()}

    assert defaults == check_layer("anywhere", defaults).values


def test_without_anything_the_defaults_hold() -> None:
    """No command line and no file give the records as they are, and say so."""
    settings = load_settings()

    assert (ScanOptions(), ConvertOptions()) == (settings.scan, settings.convert)
    assert {"default"} == set(settings.origins.values())
    assert settings.file == ""


def test_a_file_beats_the_defaults_and_the_command_line_beats_the_file() -> None:
    """Each value comes from the strongest origin that gives it, and its origin is told."""
    write("parallel_dicomseg.toml", CONFIG)
    settings = load_settings({"convert.codec": "lz4", "convert.strict": True})

    assert settings.scan == ScanOptions(structures=("o", "i"))
    assert settings.convert == ConvertOptions(
        codec="lz4",
        strict=True,
        memory_limit=500_000_000,
        contour_origin=1.0,
        checks=replace(Checks(), max_mask_fraction=0.25),
    )
    assert settings.origins["convert.codec"] == "command line"
    assert settings.origins["convert.checks.max_mask_fraction"] == "parallel_dicomseg.toml"
    assert settings.origins["convert.rule"] == "default"


@st.composite
def layers(draw: st.DrawFn) -> dict[str, Any]:
    """Some settings with values that they accept."""
    values: dict[Any, st.SearchStrategy[Any]] = {
        bool: st.booleans(),
        int: st.integers(0, 2**40),
        float: st.floats(0, 1),
        str: st.just("processes"),
        tuple[str, ...]: st.lists(st.text(min_size=1), unique=True).map(tuple),
        tuple[float, ...]: st.lists(st.floats(0.1, 9), max_size=2).map(tuple),
        tuple[int, ...]: st.lists(st.integers(1, 9), max_size=2).map(tuple),
    }
    chosen = draw(st.sets(st.sampled_from(sorted(SETTINGS))))
    return {
        key: draw(
            st.sampled_from(SETTINGS[key].choices)
            if SETTINGS[key].choices
            else values[SETTINGS[key].type]
        )
        for key in chosen
    }


def obviously_resolved(command_line: dict[str, Any], file: dict[str, Any]) -> dict[str, Any]:
    """The slow, obvious twin of `resolve`."""
    result = {}
    for key, setting in SETTINGS.items():
        if key in command_line:
            result[key] = (command_line[key], "command line")
        elif key in file:
            result[key] = (file[key], "a file")
        else:
            result[key] = (setting.default, "default")
    return result


def in_records(settings: Settings) -> dict[str, Any]:
    """All values as the records hold them, by dotted key."""
    scan = {f"scan.{key}": value for key, value in leaves(settings.scan).items()}
    limits = {f"limits.{key}": value for key, value in leaves(settings.convert.limits).items()}
    assert settings.scan.limits == settings.convert.limits
    convert = {f"convert.{key}": value for key, value in leaves(settings.convert).items()}
    return scan | convert | limits


@given(layers(), layers())
def test_resolving_equals_looking_everywhere(
    command_line: dict[str, Any], file: dict[str, Any]
) -> None:
    """For any two layers, values, origins and records agree with a look at each place in turn."""
    settings = resolve(check_layer("command line", command_line), check_layer("a file", file))
    found = {key: (settings.values[key], settings.origins[key]) for key in SETTINGS}

    assert obviously_resolved(command_line, file) == found
    assert dict(settings.values) == in_records(settings)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[scan\n", r"c\.toml: not valid TOML: .*line 1"),
        (f"[scan]\nworkers = {'9' * 5000}", r"c\.toml: not valid TOML: .*digits"),
        ("[skan]\n", r"c\.toml: skan: there is no such setting; did you mean scan\?"),
        ("scan = 3", r"c\.toml: scan = 3: expected a table \[scan\]"),
        ("[convert]\nchecks = 1", r"convert\.checks = 1: expected a table \[convert\.checks\]"),
        ("[convert]\nrul = 'x'", r"convert\.rul: there is no such setting; did you mean rule\?"),
        (
            "[convert]\nqqq = 1",
            r"convert\.qqq: there is no such setting; known are allow_.*, checks, codec",
        ),
        ("[convert.checks]\nmax_mask = 1", r"did you mean max_mask_fraction\?"),
        ("[convert]\nrule = 3", r"convert\.rule = 3: expected one of center, pil-outline0"),
        ("[convert]\nrule = 'centre'", r"expected one of center, .*; did you mean center\?"),
        ("[convert]\nworkers = -1", r"workers = -1: expected a whole number of at least 0"),
        ("[convert]\nworkers = 1.5", r"workers = 1\.5: expected a whole number"),
        ("[convert]\nworkers = true", r"workers = True: expected a whole number"),
        ("[convert]\nstrict = 1", r"strict = 1: expected true or false"),
        ("[convert]\nzarr = 1", r"zarr = 1: expected a text"),
        ("[convert]\nmemory_limit = '2 loaves'", r"'2 loaves': expected a number of bytes"),
        ("[convert]\nmemory_limit = '-1 GB'", r"'-1 GB': expected a number of bytes"),
        ("[convert]\nscheduler = 'thread'", r"expected one of sync.*; did you mean threads\?"),
        ("[convert]\ncontour_origin = 0.25", r"0\.25: expected one of 0\.0, 0\.5, 1\.0"),
        ("[convert.checks]\nmax_mask_fraction = 1.01", r"expected a number from 0 to 1"),
        ("[convert.checks]\nmax_mask_fraction = nan", r"expected a number from 0 to 1"),
        ("[scan]\nstructures = 'i'", r"structures = 'i': expected a list of different names"),
        ("[scan]\nstructures = ['i', 3]", r"expected a list of different names"),
        ("[scan]\nstructures = ['i', 'i']", r"different names; one of them stands there twice"),
    ],
)
def test_a_wrong_file_is_told_with_key_value_and_what_was_expected(text: str, message: str) -> None:
    """Each mistake in a configuration file gives one sentence that says what to change."""
    with pytest.raises(ConfigurationError, match=message):
        read_config(write("c.toml", text))


def test_a_file_that_cannot_be_read_is_named() -> None:
    """A missing file, a folder and a file of other bytes are configuration errors."""
    Path("folder.toml").mkdir()
    Path("bytes.toml").write_bytes(b"a = '\xff'")

    with pytest.raises(ConfigurationError, match=r"none\.toml: cannot be read: No such file"):
        load_settings(config="none.toml")
    with pytest.raises(ConfigurationError, match=r"folder\.toml: cannot be read: Is a directory"):
        load_settings(config="folder.toml")
    with pytest.raises(ConfigurationError, match=r"bytes\.toml: byte 5 is not UTF-8"):
        load_settings(config="bytes.toml")


def test_an_unknown_key_from_the_command_line_is_refused() -> None:
    """Overrides are checked like a file."""
    with pytest.raises(ConfigurationError, match=r"command line: .*did you mean convert\.rule\?"):
        load_settings({"convert.rul": "center"})


@pytest.mark.parametrize(
    ("written", "count"),
    [("2GiB", 2 * 2**30), ("500 MB", 500_000_000), ("1.5kB", 1500), ("7", 7), (8, 8)],
)
def test_memory_sizes_may_have_units(written: str | int, count: int) -> None:
    """A size is a number of bytes or a text with a decimal or binary unit."""
    assert count == load_settings({"convert.memory_limit": written}).convert.memory_limit


@pytest.mark.parametrize("scheduler", ["distributed", "tcp://10.0.0.1:8786", "host:8786", "s.json"])
def test_schedulers_are_names_addresses_or_files(scheduler: str) -> None:
    """A scheduler may be a name, an address, or a scheduler file that exists."""
    write("s.json", "{}")

    assert scheduler == load_settings({"convert.scheduler": scheduler}).convert.scheduler


def test_the_original_config_is_read() -> None:
    """All keys of the original script's config.ini arrive in the record."""
    expected = LegacyConfig("somewhere/", "/o-contours/", "links.csv", "out.h5", 4, 7)

    assert expected == read_legacy_config(write("config.ini", LEGACY))


def test_missing_keys_of_the_original_config_get_the_documented_defaults() -> None:
    """A config.ini with an empty section gives the defaults."""
    assert LegacyConfig() == read_legacy_config(write("config.ini", "[local]\n"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[other]\na = 1", r"config\.ini: there is no section \[local\]"),
        ("BATCH_SIZE = 1", r"config\.ini: not a valid config\.ini: .*no section headers"),
        ("[local]\nBATCH_SIZE = many", r"local\.BATCH_SIZE = 'many': expected a whole number"),
        (f"[local]\nBATCH_SIZE = {'9' * 5000}", r"expected a whole number of at least 1"),
        ("[local]\nNUM_EPOCHS = 0", r"local\.NUM_EPOCHS = '0': expected .* at least 1"),
        ("[local]\nLINK_FILE_NAME =", r"local\.LINK_FILE_NAME = '': expected a text"),
        ("[local]\nDATA_DIR = x", r"there is no such setting; did you mean data_dir_base\?"),
        ("[local]\nBATCH_SIZE = 1\nBATCH_SIZE = 2", r"already exists"),
    ],
)
def test_a_wrong_original_config_is_told(text: str, message: str) -> None:
    """Each mistake in a config.ini gives one sentence with the file and the key."""
    with pytest.raises(ConfigurationError, match=message):
        read_legacy_config(write("config.ini", text))


@pytest.mark.parametrize(
    "content",
    [
        b"no = section",
        b"[local]\na = 1\na = 2\n",
        b"[local]\na = \xff\n",
        b"[[x",
        b"[other]\na = 1",
    ],
)
def test_an_ini_of_somebody_else_is_in_nobodys_way(content: bytes) -> None:
    """A config.ini that was not named and is not ours is ignored; named, it is an error."""
    Path("config.ini").write_bytes(content)

    assert load_settings() == resolve(check_layer("command line", {}))
    with pytest.raises(ConfigurationError, match=r"^config\.ini: "):
        load_settings(config="config.ini")


def test_a_byte_order_mark_does_no_harm() -> None:
    """Files as Windows editors save them are read."""
    mark = "\ufeff"
    write("config.ini", mark + LEGACY.lstrip())
    legacy = load_settings()
    write("parallel_dicomseg.toml", mark + CONFIG)

    assert legacy.file == "config.ini"
    assert load_settings().scan.structures == ("o", "i")


def test_percent_signs_in_the_original_config_are_plain() -> None:
    """Paths may contain '%'."""
    file = write("config.ini", "[local]\nDATA_DIR_BASE = 100%/x\n")

    assert read_legacy_config(file).data_dir_base == "100%/x"


def test_the_original_config_sets_what_to_scan() -> None:
    """Its outline folder (without slashes) and link table become settings of the scan."""
    write("config.ini", LEGACY)
    settings = load_settings()

    assert settings.scan == ScanOptions(contours_sub_dir="o-contours", link_file_name="links.csv")
    assert settings.origins["scan.link_file_name"] == "config.ini"


def test_the_own_file_is_preferred_and_foreign_ini_files_are_left_alone() -> None:
    """Of the files that lie about, parallel_dicomseg.toml wins; only [local] makes an ini ours."""
    assert find_config(Path()) is None
    write("config.ini", "[somebody else]\na = 1\n")
    assert find_config(Path()) is None
    write("config.ini", LEGACY)
    assert find_config(Path()) == Path("config.ini")
    write("parallel_dicomseg.toml", CONFIG)
    assert find_config(Path()) == Path("parallel_dicomseg.toml")


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("convert.spacing", 1.4, (1.4,)),
        ("convert.spacing", [1, 2.5], (1.0, 2.5)),
        ("convert.size", ["256", "128"], (256, 128)),
        ("scan.split", ("0.8", "0.2"), (0.8, 0.2)),
    ],
)
def test_lists_of_numbers_are_read_from_numbers_and_texts(
    key: str, value: Any, expected: tuple[float, ...]
) -> None:
    """One number or several, as a file or the command line gives them."""
    assert load_settings({key: value}).values[key] == expected


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("convert.spacing", [1, 2, 3]),
        ("convert.spacing", True),
        ("convert.spacing", "wide"),
        ("convert.size", [1.5]),
        ("convert.size", ["-3"]),
        ("convert.size", (0, 256)),
        ("convert.spacing", (1.0, 0.0)),
        ("scan.split", [float("inf")]),
    ],
)
def test_lists_of_other_things_are_refused(key: str, value: Any) -> None:
    """The message says what the setting takes."""
    with pytest.raises(ConfigurationError, match=f"{key} = .*: expected (one or )?two"):
        load_settings({key: value})


def test_limits_are_one_table_for_scan_and_conversion() -> None:
    """[limits] reaches both records, and the command line goes before it."""
    write("parallel_dicomseg.toml", "[limits]\nfile_bytes = '2GiB'\nframes = 7\n")
    settings = load_settings({"limits.frames": 9})
    expected = Limits(file_bytes=2**31, frames=9)

    assert (expected, expected) == (settings.scan.limits, settings.convert.limits)
    assert settings.origins["limits.frames"] == "command line"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--limit", "frames=3", "--limit", "decode_seconds=2.5"], ["limits.frames", "3"]),
        (["--limit", "file_bytes=1MiB"], ["limits.file_bytes", "1048576"]),
        (["--limit", "frame=3"], ["limits.frame: there is no such setting", "frames"]),
        (["--limit", "frames=many"], ["limits.frames = 'many'", "whole number"]),
        (["--limit", "frames"], ["limits.frames = ''", "whole number"]),
    ],
)
def test_limits_on_the_command_line(arguments: list[str], expected: list[str]) -> None:
    """name=value, checked as in a file."""
    from click.testing import CliRunner

    from parallel_dicomseg.cli import main

    done = CliRunner().invoke(main, ["scan", "--show-config", *arguments])

    assert all(word in done.output for word in expected)
