"""Where the settings come from: command line, then configuration file, then the records' defaults.

A setting is a field of `ScanOptions`, `ConvertOptions`, `Checks` or `Limits`: the records are the
only place that defines its name, type and default. This module adds what a person needs to set it
(a line of help, the values that make sense) and remembers where each value came from.
"""

from __future__ import annotations

import configparser
import difflib
import math
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from parallel_dicomseg.errors import ConfigurationError
from parallel_dicomseg.records import ConvertOptions, Limits, ScanOptions

Record = TypeVar("Record")

CONFIG_FILE = "parallel_dicomseg.toml"
LEGACY_CONFIG_FILE = "config.ini"
LEGACY_SECTION = "local"
COMMAND_LINE = "command line"
DEFAULT = "default"

#: The records that can be set, by the name of their table in a configuration file.
TABLES: dict[str, type] = {"scan": ScanOptions, "convert": ConvertOptions, "limits": Limits}

#: Names of schedulers; anything else must look like an address or a scheduler file.
SCHEDULERS = ("synchronous", "threads", "processes", "distributed")

_HELP = {
    "scan.source": "Where annotations come from: auto, sunnybrook, dicom, rtstruct, seg, lidc, or"
    " an installed source's name.",
    "scan.structures": "Structures to convert, in bit order (i,o or repeated): names, new=old,"
    " /regular expression/; none: all.",
    "scan.include_unannotated": "Also take images without any annotation, with empty masks.",
    "scan.link_file_name": "Table that links image folders to outline folders.",
    "scan.contours_sub_dir": "Only this folder of outlines under each patient.",
    "scan.allow_burned_in": "Also take images that may have names in their pixels: those with"
    " BurnedInAnnotation YES, and secondary captures.",
    "scan.aliases": "TOML file: [structures] heart = ['Heart', 'coeur', '/hrt.*/'].",
    "scan.case_sensitive": "Whether 'Heart' and 'heart' are two structures.",
    "scan.several": "Where several names in one file match one structure.",
    "scan.readers": "Several readers of one image (LIDC).",
    "scan.agreement": "For --readers consensus: fraction of the readers who must agree.",
    "scan.fractional_threshold": "A pixel of a fractional SEG is in above this fraction.",
    "scan.split": "Fractions of the patients for train, validation and test.",
    "scan.seed": "Of the split.",
    "scan.stratify": "Spread every structure over the parts of the split evenly.",
    "scan.workers": "Threads that read headers; 0: one per core.",
    "convert.rule": "When a pixel belongs to a mask.",
    "convert.contour_origin": "Contour coordinate of the centre of the first pixel.",
    "convert.spacing": "Bring all images to this spacing: mm between rows and between columns.",
    "convert.size": "Rows and columns of the output; none: the largest image's.",
    "convert.fit": "What a smaller --size is centred on.",
    "convert.pad_value": "What lies outside the source image: a number, or 'minimum', the slice's"
    " own.",
    "convert.color": "Colour images as one luminance or as red, green and blue.",
    "convert.invert_monochrome1": "Turn MONOCHROME1 round: the highest value is white everywhere.",
    "convert.partial_overlap": "What two rings of one structure that partly overlap give.",
    "convert.key_file": "Names are hashes keyed by this file, the same in every run; made if"
    " missing, readable by you alone.",
    "convert.dates": "Dates are dropped, or shifted by the key file, per patient.",
    "convert.hash_paths": "Name files by hashes of their paths in the rejected list.",
    "convert.codec": "How chunks are compressed; lz4 and zstd need hdf5plugin to read.",
    "convert.keep_identity": "Keep patient keys and UIDs instead of running numbers.",
    "convert.scheduler": "synchronous, threads, processes, distributed, or a scheduler's address.",
    "convert.workers": "Workers; on the command line also threads that read headers; 0: one per"
    " core.",
    "convert.memory_limit": "What one worker may use, e.g. 2GiB or '500 MB'; 0: 256 MiB.",
    "convert.slices_per_task": "Slices in one task; 0: chosen from the memory limit.",
    "convert.strict": "Stop at the first rejected slice.",
    "convert.max_rejected": "More rejected than this give exit status 1.",
    "convert.zarr": "Also write a zarr v3 mirror into this folder.",
    "convert.overwrite": "Replace an existing output, and what an unfinished run has left.",
    "convert.resume": "Go on with what an unfinished run has left, if there is any.",
    "convert.update": "Take over what has not changed since OUT.h5 was made with --update, convert"
    " the rest; the first time, everything.",
    "convert.compare": "What tells --update that a file is unchanged: its time and size, or its"
    " content.",
    "convert.ignore_space": "Begin even where the disk will probably not hold the output.",
    "convert.task_timeout": "Seconds until a task in a worker process is tried elsewhere; 0:"
    " never.",
    "convert.window_limit": "Results that may be under way or wait to be written, e.g. 2GiB; 0:"
    " 2 GiB.",
    "convert.tls_ca_file": "Certificate of the cluster's authority (PEM).",
    "convert.tls_cert": "Certificate shown to the cluster (PEM).",
    "convert.tls_key": "Private key of --tls-cert (PEM).",
    "convert.allow_insecure_cluster": "Use a cluster beyond this machine without encryption.",
    "convert.checks.max_mask_fraction": "Flag a mask that covers more of the image than this.",
    "convert.checks.max_ellipse_residual": "Flag a ring further than this from its ellipse"
    " (RMS, in mean radii).",
    "convert.checks.max_outside_fraction": "Flag an inner structure with more of its pixels than"
    " this outside its outer one.",
    "limits.file_bytes": "Larger files are not read.",
    "limits.header_bytes": "Bytes of a DICOM header.",
    "limits.header_elements": "Elements of a SEG's, RTSTRUCT's or lookup table's sequences.",
    "limits.header_depth": "Sequences inside one another.",
    "limits.inflated_bytes": "Bytes that a deflated data set may inflate to.",
    "limits.image_pixels": "Rows x columns of a frame.",
    "limits.frames": "Frames of one file.",
    "limits.expansion": "How many times as large as its file a frame above 32 MiB may be.",
    "limits.structure_set_bytes": "Bytes of an RTSTRUCT file.",
    "limits.contour_bytes": "Bytes of a text file with one outline.",
    "limits.contour_points": "Points of one outline.",
    "limits.contours_per_slice": "Contours of one structure of an RTSTRUCT on a slice.",
    "limits.table_bytes": "Bytes of link.csv and the like.",
    "limits.xml_bytes": "Bytes of an XML file.",
    "limits.xml_elements": "Tags of an XML file.",
    "limits.decode_seconds": "Seconds for one compressed frame, and one more per 4 MiB of it.",
    "limits.decoder_bytes": "Address space of the process that decodes compressed frames.",
}

_CHOICES: dict[str, tuple[str | float, ...]] = {
    "scan.several": ("merge", "first", "separate"),
    "scan.readers": ("each", "consensus"),
    "convert.fit": ("center", "structure"),
    "convert.color": ("luminance", "samples"),
    "convert.partial_overlap": ("xor", "union", "refuse"),
    "convert.dates": ("drop", "shift"),
    "convert.compare": ("time", "content"),
    "convert.rule": ("center", "pil-outline0", "pil-outline1"),
    "convert.contour_origin": (0.0, 0.5, 1.0),
    "convert.codec": ("deflate", "lz4", "zstd", "none"),
}

#: Upper bounds; every number must also be at least 0.
_MAXIMA = {
    "scan.agreement": 1.0,
    "scan.fractional_threshold": 1.0,
    "convert.checks.max_mask_fraction": 1.0,
    "convert.checks.max_outside_fraction": 1.0,
}

#: Numbers of bytes, which may be written with a unit.
_SIZES = frozenset(
    {
        "convert.memory_limit",
        "convert.window_limit",
        *(f"limits.{field.name}" for field in fields(Limits) if field.name.endswith("_bytes")),
    }
)


#: What these take is not said by their type.
_EXPECTED = {
    "convert.scheduler": f"one of {', '.join(SCHEDULERS)}, an address such as tcp://host:8786,"
    " or a scheduler file",
    **dict.fromkeys(_SIZES, "a number of bytes, or a text such as '2GiB' or '500 MB'"),
    "scan.structures": "a list of different names",
    "scan.split": "two or three fractions that make 1",
    "convert.spacing": "one or two numbers above 0",
    "convert.size": "one or two whole numbers above 0",
}

#: How many numbers a list of numbers may have.
_MOST_NUMBERS = {"scan.split": 3, "convert.spacing": 2, "convert.size": 2}

#: What a configuration file or the command line may give for a field of this type.
_ACCEPTED: dict[Any, tuple[type, ...]] = {
    str: (str,),
    bool: (bool,),
    int: (int,),
    float: (int, float),
    tuple[str, ...]: (list, tuple),
    tuple[float, ...]: (list, tuple, int, float),
    tuple[int, ...]: (list, tuple, int),
}
_NUMBERS = {tuple[float, ...]: float, tuple[int, ...]: int}


@dataclass(frozen=True, slots=True)
class Setting:
    """One thing that can be set, and how."""

    key: str
    """Dotted, as in a configuration file: 'convert.checks.max_mask_fraction'."""
    type: Any
    """str, int, float, bool or tuple[str, ...]."""
    default: Any
    help: str
    expected: str
    """What a value must be, in words."""
    choices: tuple[str | float, ...] = ()
    """The only values allowed; empty: no such list."""
    maximum: float | None = None
    is_size: bool = False
    """A number of bytes, also written '2GiB'."""
    most: int = 0
    """How many numbers it takes at most; 0: it is no list of numbers."""

    @property
    def name(self) -> str:
        """The last part of the key: the name of the record's field."""
        return self.key.rpartition(".")[2]


@dataclass(frozen=True, slots=True)
class Layer:
    """Values from one origin, checked."""

    origin: str
    """'command line' or the path of a configuration file."""
    values: Mapping[str, Any]
    """By dotted key; only what this origin sets."""


@dataclass(frozen=True, slots=True)
class Settings:
    """The settings of a run, and where each came from."""

    scan: ScanOptions
    convert: ConvertOptions
    values: Mapping[str, Any]
    """Every setting by its dotted key."""
    origins: Mapping[str, str]
    """By dotted key: 'command line', the path of a file, or 'default'."""
    file: str
    """The configuration file that was read, or ''."""


@dataclass(frozen=True, slots=True)
class LegacyConfig:
    """The original script's config.ini, section [local]; the defaults stand for missing keys."""

    data_dir_base: str = "final_data/"
    """Folder with link.csv, dicoms/ and contourfiles/, relative to the working directory."""
    contours_sub_dir: str = "/i-contours/"
    """Folder of outlines under each patient's folder."""
    link_file_name: str = "link.csv"
    hdf5_filename: str = "dicom_data.h5"
    """The output."""
    batch_size: int = 16
    num_epochs: int = 3


def _declare(record: Any, prefix: str) -> Iterable[Setting]:
    """The settings of one record; a field that is a record itself becomes a sub-table."""
    hints = get_type_hints(record)
    defaults = record()
    for field in fields(record):
        key, hint = f"{prefix}.{field.name}", hints[field.name]
        if hint is Limits:  # a table of their own, common to all records that have them
            continue
        if is_dataclass(hint):
            yield from _declare(hint, key)
            continue
        yield Setting(
            key=key,
            type=hint,
            default=getattr(defaults, field.name),
            help=_HELP[key],
            expected=_expected(key, hint),
            choices=_CHOICES.get(key, ()),
            maximum=_MAXIMA.get(key),
            is_size=key in _SIZES,
            most=_MOST_NUMBERS.get(key, 0),
        )


def _expected(key: str, kind: Any) -> str:
    """What a setting takes, in words."""
    if key in _EXPECTED:
        return _EXPECTED[key]
    if key in _CHOICES:
        return f"one of {', '.join(map(str, _CHOICES[key]))}"
    if kind in (int, float):
        bounds = f"from 0 to {_MAXIMA[key]:g}" if key in _MAXIMA else "of at least 0"
        return f"{'a whole number' if kind is int else 'a number'} {bounds}"
    return {bool: "true or false", str: "a text"}.get(kind, "a list of texts")


#: Every setting by its dotted key, in the order of the records.
SETTINGS: dict[str, Setting] = {
    setting.key: setting for table, record in TABLES.items() for setting in _declare(record, table)
}


def load_settings(
    overrides: Mapping[str, Any] | None = None, config: str | Path | None = None
) -> Settings:
    """The settings of a run in the working directory.

    Parameters
    ----------
    overrides
        What the command line sets, by dotted key (``{"convert.rule": "pil-outline0"}``).
    config
        A TOML file with the tables [scan], [convert], [convert.checks] and [limits], or the
        original script's config.ini; None: whichever `find_config` finds, or none.

    Raises
    ------
    ConfigurationError
        A file cannot be read, a key is unknown or a value is not what the setting takes.
    """
    path = find_config(Path()) if config is None else Path(config)
    file = read_config(path) if path else None
    return resolve(check_layer(COMMAND_LINE, overrides or {}), file)


def find_config(directory: Path) -> Path | None:
    """The configuration file that is used without being named, or None.

    parallel_dicomseg.toml, else a config.ini with the original script's section [local]; one that
    has none, or cannot be parsed, is somebody else's.
    """
    own, legacy = directory / CONFIG_FILE, directory / LEGACY_CONFIG_FILE
    if own.is_file():
        return own
    return legacy if legacy.is_file() and _is_ours(legacy) else None


def _is_ours(path: Path) -> bool:
    try:
        return _read_ini(path).has_section(LEGACY_SECTION)
    except ConfigurationError:
        return False


def read_config(path: Path) -> Layer:
    """The values that a configuration file sets: config.ini by its suffix, else TOML.

    Raises
    ------
    ConfigurationError
        Naming the file, the key, the value and what was expected.
    """
    if is_legacy(path):
        return check_layer(str(path), legacy_values(read_legacy_config(path)))
    try:
        document = tomllib.loads(_read_text(path))
    except ValueError as error:  # not only TOMLDecodeError: `int` refuses thousands of digits
        raise ConfigurationError(f"{path}: not valid TOML: {error}") from None
    return check_layer(str(path), dict(_flatten(document, "", str(path))))


def is_legacy(path: Path) -> bool:
    """Whether a configuration file is the original script's kind."""
    return path.suffix.lower() == ".ini"


def check_layer(origin: str, values: Mapping[str, Any]) -> Layer:
    """Values of one origin as the records want them.

    Raises
    ------
    ConfigurationError
        A key is unknown, or a value is not what its setting takes.
    """
    return Layer(origin, {key: _convert(origin, key, value) for key, value in values.items()})


def resolve(command_line: Layer, file: Layer | None = None) -> Settings:
    """The command line over a configuration file over the records' defaults."""
    values = {key: setting.default for key, setting in SETTINGS.items()}
    origins = dict.fromkeys(SETTINGS, DEFAULT)
    for layer in (file, command_line):
        if layer is None:
            continue
        values.update(layer.values)
        origins.update(dict.fromkeys(layer.values, layer.origin))
    return Settings(
        scan=_build(ScanOptions, "scan", values),
        convert=_build(ConvertOptions, "convert", values),
        values=values,
        origins=origins,
        file=file.origin if file else "",
    )


def read_legacy_config(path: str | Path) -> LegacyConfig:
    """The original script's config.ini.

    Parameters
    ----------
    path
        The file; keys of its section [local] may be missing (see `LegacyConfig`).

    Raises
    ------
    ConfigurationError
        There is no section [local], a key is unknown, or a number is none.
    """
    parser = _read_ini(Path(path))
    if not parser.has_section(LEGACY_SECTION):
        raise ConfigurationError(f"{path}: there is no section [{LEGACY_SECTION}]")
    hints = get_type_hints(LegacyConfig)
    values: dict[str, Any] = {}
    for name, text in parser.items(LEGACY_SECTION):
        if name not in hints:
            raise _unknown(str(path), f"{LEGACY_SECTION}.{name}", name, hints)
        values[name] = _legacy_value(Path(path), name, text, hints[name])
    return LegacyConfig(**values)


def legacy_values(legacy: LegacyConfig) -> dict[str, Any]:
    """The settings, by dotted key, that a config.ini stands for."""
    return {
        "scan.contours_sub_dir": legacy.contours_sub_dir.strip("/"),
        "scan.link_file_name": legacy.link_file_name,
    }


def _legacy_value(path: Path, name: str, text: str, hint: type) -> str | int:
    where = f"{path}: {LEGACY_SECTION}.{name.upper()} = {text!r}"
    if hint is str:
        if not text:
            raise ConfigurationError(f"{where}: expected a text")
        return text
    if not (text.isdecimal() and len(text) < 10 and int(text) > 0):
        raise ConfigurationError(f"{where}: expected a whole number of at least 1")
    return int(text)


def _read_ini(path: Path) -> configparser.ConfigParser:
    parser = configparser.ConfigParser(interpolation=None)
    try:
        parser.read_string(_read_text(path), source=str(path))
    except configparser.Error as error:
        reason = " ".join(str(error).split())
        raise ConfigurationError(f"{path}: not a valid config.ini: {reason}") from None
    return parser


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigurationError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"{path}: byte {error.start} is not UTF-8") from None


def _flatten(table: Mapping[str, Any], prefix: str, origin: str) -> Iterable[tuple[str, Any]]:
    """(dotted key, value) of nested tables, down to where the settings are."""
    below = {key[len(prefix) :].partition(".")[0] for key in SETTINGS if key.startswith(prefix)}
    for name, value in table.items():
        key = f"{prefix}{name}"
        if name not in below:
            raise _unknown(origin, key, name, below)
        if key in SETTINGS:
            yield key, value
        elif isinstance(value, Mapping):
            yield from _flatten(value, f"{key}.", origin)
        else:
            raise ConfigurationError(f"{origin}: {key} = {value!r}: expected a table [{key}]")


def _convert(origin: str, key: str, value: Any) -> Any:
    """One value as its record wants it."""
    if key not in SETTINGS:
        raise _unknown(origin, key, key, SETTINGS)
    setting = SETTINGS[key]
    try:
        converted = _read(setting, value)
        _check(setting, converted)
    except (TypeError, ValueError) as error:
        hint = f"; {error}" if str(error) else ""
        shown = ", ".join(map(repr, value)) if isinstance(value, tuple) else repr(value)
        raise ConfigurationError(
            f"{origin}: {key} = {shown}: expected {setting.expected}{hint}"
        ) from None
    return converted


def _read(setting: Setting, value: Any) -> Any:
    """A value as the record's type, or TypeError; true and false are no numbers."""
    if setting.is_size and isinstance(value, str):
        value = _parse_size(value)
    number_from_flag = isinstance(value, bool) and setting.type is not bool
    if number_from_flag or not isinstance(value, _ACCEPTED[setting.type]):
        raise TypeError
    if setting.type is float and isinstance(value, int):
        return float(value)
    if setting.most:
        return _read_numbers(setting, value)
    return tuple(value) if isinstance(value, list) else value


def _read_numbers(setting: Setting, value: Any) -> tuple[float, ...]:
    """One number or a list of them, as the record's tuple; texts come from the command line."""
    number = _NUMBERS[setting.type]
    values = value if isinstance(value, list | tuple) else (value,)
    if any(isinstance(item, bool) or not isinstance(item, str | int | float) for item in values):
        raise TypeError
    try:
        numbers = tuple(number(item) for item in values)
    except (ValueError, OverflowError):
        raise ValueError from None
    if any(
        isinstance(item, float) and item != made for item, made in zip(values, numbers, strict=True)
    ):
        raise ValueError
    return numbers


def _check(setting: Setting, value: Any) -> None:
    """ValueError where a value of the right type makes no sense."""
    if setting.choices and value not in setting.choices:
        raise ValueError(_closest(value, setting.choices))
    if setting.key == "convert.scheduler" and not _is_scheduler(value):
        raise ValueError(_closest(value, SCHEDULERS))
    if isinstance(value, int | float):
        ceiling = math.inf if setting.maximum is None else setting.maximum
        if not 0 <= value <= ceiling:
            raise ValueError
    if setting.most:
        low = 0 if setting.key == "scan.split" else math.ulp(0)
        if len(value) > setting.most or not all(low <= item < math.inf for item in value):
            raise ValueError
        return
    if isinstance(value, tuple) and not all(isinstance(item, str) and item for item in value):
        raise ValueError
    if isinstance(value, tuple) and len(set(value)) != len(value):
        raise ValueError("one of them stands there twice")


def _is_scheduler(value: str) -> bool:
    return value in SCHEDULERS or ":" in value or Path(value).is_file()


def _parse_size(text: str) -> int:
    from dask.utils import parse_bytes  # 0.1 s to import, and only this setting needs it

    try:
        return int(parse_bytes(text))
    except (ValueError, OverflowError):
        raise ValueError from None


def _build(record: type[Record], prefix: str, values: Mapping[str, Any]) -> Record:
    """A record of the values under a dotted prefix."""
    hints = get_type_hints(record)
    keys = {name: f"{prefix}.{name}" if hints[name] is not Limits else "limits" for name in hints}
    return record(
        **{
            name: _build(hints[name], key, values) if is_dataclass(hints[name]) else values[key]
            for name, key in keys.items()
        }
    )


def _unknown(origin: str, key: str, name: str, known: Iterable[str]) -> ConfigurationError:
    names = sorted(known)
    hint = _closest(name, names) or f"known are {', '.join(names)}"
    return ConfigurationError(f"{origin}: {key}: there is no such setting; {hint}")


def _closest(value: Any, known: Iterable[Any]) -> str:
    """'did you mean …?', or nothing where no known name comes near."""
    matches = difflib.get_close_matches(str(value), [str(name) for name in known], n=1)
    return f"did you mean {matches[0]}?" if matches else ""
