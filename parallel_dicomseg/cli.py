"""The command line: reads words, calls the rooms below, prints results and ends with a status.

Standard output carries results only; progress, announcements and errors go to standard error.
Everything heavy is imported by the command that needs it, so that ``--help`` is instant.
"""

from __future__ import annotations

import errno
import json
import math
import random
import re
import signal
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
import numpy as np

from parallel_dicomseg.cli_batches import (
    BATCHES_EPILOG,
    ORIGINAL_EPILOG,
    batches,
    original_batch_loader,
)
from parallel_dicomseg.config import (
    COMMAND_LINE,
    LEGACY_CONFIG_FILE,
    SETTINGS,
    LegacyConfig,
    Setting,
    Settings,
    is_legacy,
    legacy_values,
    load_settings,
    read_legacy_config,
)
from parallel_dicomseg.errors import (
    ConfigurationError,
    ConversionError,
    LayoutError,
    ParallelDicomSegError,
    ResumableError,
    VerificationError,
)
from parallel_dicomseg.records import Cohort, ConvertOptions, ScanOptions
from parallel_dicomseg.report.inspection import LISTED_PROBLEMS, printable
from parallel_dicomseg.terminal import (
    Watch,
    columns_of_text,
    print_json,
    render_inventory,
    render_summary,
    summarize,
    take_inventory,
    undecodable,
    watching,
)

if TYPE_CHECKING:
    from parallel_dicomseg.export import ExportReport

Function = TypeVar("Function", bound=Callable[..., Any])

# A /regular expression/, maybe with 'new=' before it, or a name without a comma.
_BETWEEN_COMMAS = re.compile(r"\s*(?:[^,/=]*=)?/.*?/\s*(?=,|$)|[^,]+")

FINISHED_SHORT = 1
"""Exit status of a run that ended, but not with everything that it should have made."""
CANNOT_START = 2
RESUMABLE = 3
"""Exit status of a run that machines, not its input, ended: `convert --resume` goes on."""
INTERRUPTED = 130
TERMINATED = 143


@contextmanager
def _exit_statuses() -> Iterator[None]:
    """End a user's mistake with one line on standard error and the status that it stands for."""
    try:
        yield
    except ResumableError as error:
        message, status = _with_notes(f"error: {error}", error), RESUMABLE
    except (ConversionError, VerificationError) as error:
        message, status = f"error: {error}", FINISHED_SHORT
    except ParallelDicomSegError as error:
        message, status = f"error: {error}", CANNOT_START
    except Terminated as error:
        message, status = _with_notes("terminated", error), TERMINATED
    except KeyboardInterrupt as error:
        message, status = _with_notes("interrupted", error), INTERRUPTED
    except OSError as error:
        message, status = f"error: {_refusal(error)}", CANNOT_START
    else:
        return
    click.echo(printable(" ".join(message.split())), err=True)
    raise click.exceptions.Exit(status)


def _with_notes(message: str, error: BaseException) -> str:
    """What the writer has added: how much is kept, and how to go on."""
    return "; ".join([message, *getattr(error, "__notes__", ())])


class Terminated(KeyboardInterrupt):
    """SIGTERM, as batch systems send it some seconds before they kill."""


def _raise_terminated(*_: object) -> None:
    raise Terminated


@contextmanager
def _converting() -> Iterator[None]:
    """From here on a run has started: what the system refuses now leaves it unfinished."""
    before = signal.signal(signal.SIGTERM, _raise_terminated) if _in_main_thread() else None
    try:
        yield
    except (OSError, MemoryError) as error:
        reason = _refusal(error) if isinstance(error, OSError) else "the memory does not suffice"
        resumable = ResumableError(reason)
        for note in getattr(error, "__notes__", ()):
            resumable.add_note(note)
        raise resumable from error
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _refusal(error: OSError) -> str:
    """What the system, or the HDF5 library on it, says; a closed pipe is for click to end."""
    if error.errno == errno.EPIPE:
        raise error
    where = f": {error.filename}" if error.filename else ""
    return f"{error.strerror}{where}" if error.strerror else str(error)


class Command(click.Command):
    """A command that never ends a user's mistake with a traceback."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Let options of several numbers take them one after another: --size 256 256."""
        return super().parse_args(ctx, _join_numbers(args))

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; errors become a line and an exit status."""
        with _exit_statuses():
            return super().invoke(ctx)


def _join_numbers(args: Sequence[str]) -> list[str]:
    """'--size 256 256' becomes '--size 256,256', up to as many numbers as the setting takes."""
    joined: list[str] = []
    most = {f"--{setting.name}": setting.most for setting in SETTINGS.values() if setting.most}
    room = 0
    for arg in args:
        if room and _is_number(arg):
            starts = joined[-1] in most
            joined[len(joined) - (not starts) :] = [arg if starts else f"{joined[-1]},{arg}"]
            room -= 1
        else:
            joined.append(arg)
            room = most.get(arg, 0)
    return joined


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


class Group(click.Group):
    """A group of such commands, listed in the order in which they are used."""

    command_class = Command

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002  # click's signature
        """Names in the order of definition."""
        return list(self.commands)


def setting_options(*tables: str) -> Callable[[Function], Function]:
    """Give a command one option for each setting of these tables; equal names share one."""
    by_name: dict[str, Setting] = {}
    for setting in SETTINGS.values():
        if setting.key.partition(".")[0] in tables:
            by_name[setting.name] = setting

    def decorate(function: Function) -> Function:
        for setting in reversed(by_name.values()):
            function = _option(setting)(function)
        return function

    return decorate


def _option(setting: Setting) -> Callable[[Function], Function]:
    """The command line's option for a setting; None where it is not given."""
    flag = f"--{setting.name.replace('_', '-')}"
    says_so = setting.choices or setting.default not in ("", (), 0, False)
    if setting.most:
        metavar = "N [N [N]]" if setting.most > 2 else "N [N]"
        return click.option(flag, setting.name, metavar=metavar, multiple=True, help=setting.help)
    default = f"{setting.default:g}" if setting.type is float else setting.default
    shown = f"  [default: {default}]" if says_so else ""
    how: dict[str, Any] = {"default": None, "help": setting.help + shown}
    if setting.type is bool:
        flag = f"{flag}/--no-{flag[2:]}"
    elif setting.type is str and setting.choices:
        how["type"] = click.Choice([str(choice) for choice in setting.choices])
    elif setting.choices:
        how |= {"type": float, "metavar": f"[{'|'.join(f'{c:g}' for c in setting.choices)}]"}
    elif setting.is_size:
        how |= {"type": str, "metavar": "SIZE"}
    elif setting.type in (int, float):
        how |= {"type": setting.type, "metavar": "N" if setting.type is int else "F"}
    else:
        how |= {"type": str, "metavar": "DIR" if setting.key == "convert.zarr" else "NAME"}
        how["multiple"] = setting.type is not str
    return click.option(flag, setting.name, **how)


def config_options(function: Function) -> Function:
    """Give a command --config and --show-config."""
    show = click.option(
        "--show-config", is_flag=True, help="Print every setting and where it came from, and end."
    )
    file = click.option(
        "--config",
        metavar="FILE",
        help="TOML file with [scan], [convert], [convert.checks], [limits], or the original"
        " config.ini."
        "  [default: ./parallel_dicomseg.toml or ./config.ini, if there]",
    )
    limit = click.option(
        "--limit",
        "limits",
        metavar="NAME=VALUE",
        multiple=True,
        help="A limit on the input, such as decode_seconds=30 or file_bytes=2GiB; may be repeated."
        " --show-config lists them.",
    )
    return file(limit(show(function)))


json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")


@click.group(
    cls=Group,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="""\b
Exit status:
  0    everything that was found is in the output
  1    finished, but more was rejected than --max-rejected allows,
       or a file does not hold what it should
  2    cannot start: usage, configuration or input
  3    ended by the machine (disk, memory, workers), not by the input: resume it
  130  interrupted (143: terminated); what is finished is kept

\b
Example:
  parallel-dicomseg demo
  parallel-dicomseg scan final_data
  parallel-dicomseg convert final_data -o cohort.h5""",
)
@click.version_option(package_name="parallel_dicomseg")
def main() -> None:
    """From a folder of DICOM images and somebody's outlines to one HDF5 training set."""


@main.command(
    epilog="""\b
Example:
  parallel-dicomseg demo
  parallel-dicomseg demo somewhere"""
)
@click.argument("directory", default="parallel_dicomseg_demo", type=click.Path())
@json_option
def demo(directory: str, as_json: bool) -> None:
    """Make a small cohort with known truth, convert it, check it and read it.

    DIRECTORY is made anew each time [default: ./parallel_dicomseg_demo]; a folder that this
    command did not make is never touched.
    """
    from parallel_dicomseg.demo import render_demo, run_demo

    with watching() as watch:
        result = run_demo(directory, progress=watch)
    if as_json:
        print_json(summarize(result) | {"summary": summarize(result.summary)})
    else:
        click.echo(render_demo(result))
    click.get_current_context().exit(0 if result.sound else FINISHED_SHORT)


@main.command(
    epilog="""\b
Example:
  parallel-dicomseg scan final_data
  parallel-dicomseg scan final_data --structures i --json
  parallel-dicomseg scan archive --save scanned
  parallel-dicomseg convert scanned -o cohort.h5"""
)
@click.argument("data_directory", metavar="[SOURCE]", required=False, type=click.Path())
@click.option(
    "--save",
    metavar="DIR",
    help="Also write what was found into tables (CSV) that may be edited and converted.",
)
@click.option("--overwrite", is_flag=True, help="Replace the tables of an earlier --save.")
@setting_options("scan")
@config_options
@json_option
def scan(
    data_directory: str | None,
    save: str | None,
    overwrite: bool,
    config: str | None,
    show_config: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """List what is in a folder of images and annotations, and what does not belong together.

    Reads headers only, and writes nothing but the tables of --save. SOURCE may be left out where a
    config.ini names it. It may also be what --save wrote: then its tables are listed as they are.
    """
    settings = _settings("scan", options, config)
    if show_config:
        _show_config(settings, ("scan", "limits"), as_json)
        return
    from parallel_dicomseg.saved import check_target, save_scan

    source = data_directory or _legacy_default(settings, "data_dir_base", "SOURCE")
    if save:
        check_target(save, overwrite=overwrite)
    with watching() as watch:
        cohort = _find_cohort(source, settings, watch)
    if save:
        save_scan(cohort, save, overwrite=overwrite)
        click.echo(f"tables with names and UIDs in {save}, readable by you alone", err=True)
    inventory = take_inventory(cohort)
    if as_json:
        print_json(inventory)
    else:
        click.echo(render_inventory(inventory))


@main.command(
    epilog="""\b
Example:
  parallel-dicomseg convert final_data -o cohort.h5
  parallel-dicomseg convert final_data -o cohort.h5 \\
      --structures i,o --codec lz4 --zarr cohort.zarr
  parallel-dicomseg convert archive -o cohort.h5 \\
      --structures /gtv.*/ --spacing 1.0 --size 256 256 --split 0.8 0.1 0.1
  parallel-dicomseg convert final_data -o cohort.h5 \\
      --scheduler tcp://127.0.0.1:8786
  parallel-dicomseg convert final_data -o cohort.h5 --resume
  parallel-dicomseg convert final_data -o growing.h5 --update"""
)
@click.argument("data_directory", metavar="[SOURCE]", required=False, type=click.Path())
@click.option("-o", "--output", metavar="OUT.h5", help="The file to write.")
@setting_options("scan", "convert")
@config_options
@json_option
def convert(
    data_directory: str | None,
    output: str | None,
    config: str | None,
    show_config: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Convert a folder of images and annotations to one HDF5 file of images and masks.

    SOURCE may also be what `scan --save` wrote; then the options of the scan (--source to
    --stratify) were its own and are refused here. The exit status is 1 when more was rejected than
    --max-rejected allows; the file is complete without it and says what and why. SOURCE and -o may
    be left out where a config.ini names them.

    OUT.h5 appears when it is whole. A run that is killed, terminated, or meets a full disk leaves
    OUT.h5.partial, and `--resume` goes on with it: nothing that is finished is decoded again.
    """
    settings = _settings("convert", options, config)
    if show_config:
        _show_config(settings, ("",), as_json)
        return
    from parallel_dicomseg.convert import check_output, convert_cohort, is_whole

    source = data_directory or _legacy_default(settings, "data_dir_base", "SOURCE")
    target = output or _legacy_default(settings, "hdf5_filename", "-o OUT.h5")
    if settings.convert.resume and is_whole(Path(target), settings.convert):
        click.echo(printable(f"{target} is whole, there is nothing to resume"), err=True)
        _finish(target, settings.convert)
        return
    check_output(Path(target), settings.convert)
    with watching() as watch:
        cohort = _find_cohort(source, settings, watch)
        for name, what in undecodable(cohort.slices).items():
            click.echo(printable(f"not decodable here: {name}: {what}"), err=True)
        with _converting():
            summary = convert_cohort(cohort, target, options=settings.convert, progress=watch)
    if as_json:
        print_json(summarize(summary))
    else:
        click.echo(render_summary(summary))
    click.get_current_context().exit(summary.exit_status)


def _finish(output: str, options: ConvertOptions) -> None:
    """Do what is left where a run ended between giving an output its name and its own end."""
    from parallel_dicomseg.store import mirror_to_zarr, open_dataset, settle

    settle(Path(output))
    if options.zarr and not Path(options.zarr).exists():
        with watching() as watch, _converting(), open_dataset(output) as dataset:
            mirror_to_zarr(dataset, options.zarr, progress=watch)


@main.command(
    epilog="""\b
Example:
  parallel-dicomseg inspect cohort.h5
  parallel-dicomseg inspect cohort.h5 --tag EchoTime --tag 0018,0087
  parallel-dicomseg inspect cohort.h5 --json"""
)
@click.argument("file", type=click.Path())
@click.option(
    "--tag",
    "tags",
    multiple=True,
    metavar="TAG",
    help="Values of a DICOM attribute per series: a keyword, or gggg,eeee; may be repeated.",
)
@json_option
def inspect(file: str, tags: tuple[str, ...], as_json: bool) -> None:
    """Say what a finished file holds, how it was made, and what was flagged or rejected."""
    from rich.console import Console

    from parallel_dicomseg.report.inspection import (
        inspect_file,
        render,
        render_tag,
        tag_values,
    )

    if tags:
        found = [tag_values(file, tag) for tag in tags]
        if as_json:
            print_json(found)
        else:
            for values in found:
                render_tag(values, Console())
        return
    inspection = inspect_file(file)
    if as_json:
        print_json(inspection)
    else:
        render(inspection, Console())


@main.command(
    epilog="""\b
Example:
  parallel-dicomseg verify cohort.h5"""
)
@click.argument("file", type=click.Path())
@click.option(
    "--checksums-only",
    is_flag=True,
    help="Compare every byte with its checksum, and decode nothing.",
)
@json_option
def verify(file: str, checksums_only: bool, as_json: bool) -> None:
    """Read a finished file in full and compare it with its seal and its own table.

    The exit status is 1 when something is not as it should be.
    """
    from parallel_dicomseg.store import verify_file

    with watching() as watch:
        found = verify_file(file, checksums_only=checksums_only, progress=watch)
    if as_json:
        print_json(
            {
                "file": file,
                "slices": found.slices,
                "problems": found.problems,
                "notes": found.notes,
            }
        )
    else:
        verdict = f"{len(found.problems)} problems" if found.problems else "sound"
        click.echo(printable(f"{file}: {found.slices} slices read, {verdict}"))
        for text in (*found.problems, *found.notes):
            click.echo(printable(f"  {text}"))
    click.get_current_context().exit(FINISHED_SHORT if found.problems else 0)


main.command(epilog=BATCHES_EPILOG)(batches)


@main.group(
    cls=Group,
    epilog="""\b
Example:
  parallel-dicomseg export nifti cohort.h5 nifti""",
)
def export() -> None:
    """Write a finished file's volumes as files of other programs."""


def export_options(function: Function) -> Function:
    """Give a command the arguments that all exports share."""
    for decorate in reversed(
        (
            click.argument("file", type=click.Path()),
            click.argument("directory", type=click.Path()),
            click.option(
                "--structures",
                multiple=True,
                metavar="NAME",
                help="Only these (i,o or repeated); none: all.",
            ),
            click.option(
                "--strict", is_flag=True, help="Refuse volumes whose slices no affine describes."
            ),
            click.option("--overwrite", is_flag=True, help="Replace an earlier export."),
            json_option,
        )
    ):
        function = decorate(function)
    return function


@export.command(
    epilog="""\b
Example:
  parallel-dicomseg export nifti cohort.h5 nifti
  parallel-dicomseg export nifti cohort.h5 nifti \\
      --masks labels --structures heart,lung"""
)
@export_options
@click.option(
    "--masks",
    type=click.Choice(["separate", "labels"]),
    default="separate",
    show_default=True,
    help="A file for each structure, or one label map where none overlap.",
)
def nifti(**arguments: Any) -> None:
    """Write an image and its masks per volume of FILE as NIfTI into the folder DIRECTORY."""
    from parallel_dicomseg.export import export_nifti

    _export(export_nifti, **arguments)


@export.command(
    epilog="""\b
Example:
  parallel-dicomseg export nnunet cohort.h5 nnUNet_raw \\
      --dataset-id 1 --name Heart"""
)
@export_options
@click.option("--dataset-id", type=int, required=True, metavar="N", help="1 to 999.")
@click.option("--name", required=True, metavar="NAME", help="Of the dataset: DatasetNNN_NAME.")
@click.option("--modality", default="", metavar="CS", help="Only volumes of this one.")
@click.option(
    "--overlap",
    type=click.Choice(["priority", "regions"]),
    default="priority",
    show_default=True,
    help="A voxel of several structures: the last one's label, or regions that may overlap.",
)
@click.option(
    "--incomplete",
    type=click.Choice(["ignore", "background", "leave-out"]),
    default="ignore",
    show_default=True,
    help="Slices on which a structure was not annotated.",
)
def nnunet(**arguments: Any) -> None:
    """Write FILE as a dataset of nnU-Net's raw layout into DIRECTORY, a folder that is there."""
    from parallel_dicomseg.export import export_nnunet

    _export(export_nnunet, **arguments)


def _export(
    write: Callable[..., ExportReport],
    file: str,
    directory: str,
    structures: tuple[str, ...],
    as_json: bool,
    **options: Any,
) -> None:
    """Run an export of a finished file and tell what it wrote."""
    from parallel_dicomseg.store import open_dataset

    with open_dataset(file) as dataset, watching() as watch:
        chosen = _split(structures) or None
        report = write(dataset, directory, structures=chosen, progress=watch, **options)
    _tell_export(report, as_json)


def _tell_export(report: ExportReport, as_json: bool) -> None:
    """Print what an export wrote, and what it could not carry over."""
    if as_json:
        print_json(summarize(report) | {"files": report.files})
        return
    lines = [f"{report.directory}: {len(report.files)} files of {len(report.cases)} volumes"]
    for kind, count in Counter(note.kind for note in report.notes).most_common():
        lines.append(f"  {kind}: {count:,}")
        same = (note for note in report.notes if note.kind == kind)
        lines += [
            f"    {note.case or 'all'}: {note.detail}" for note in islice(same, LISTED_PROBLEMS)
        ]
        if count > LISTED_PROBLEMS:
            lines.append(f"    and {count - LISTED_PROBLEMS:,} more, see export.json there")
    click.echo("\n".join(map(printable, lines)))


@click.command(
    cls=Command,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="""\b
Example:
  process_dicom_to_hdf5 --data_directory final_data --output_filename cohort.h5
  process_dicom_to_hdf5 --print_random_image --seed 7""",
)
@click.option(
    "--print_random_image",
    is_flag=True,
    help="Convert nothing; save a figure of one random image with its outlines' mask.",
)
@click.option(
    "--data_directory",
    metavar="D",
    help="Folder with the link table, dicoms/ and contourfiles/.  [default: from ./config.ini]",
)
@click.option("--output_filename", metavar="F", help="Output.  [default: from ./config.ini]")
@click.option("--seed", type=int, help="Makes the choice of the random image repeatable.")
def process_dicom_to_hdf5(
    print_random_image: bool,
    data_directory: str | None,
    output_filename: str | None,
    seed: int | None,
) -> None:
    """Convert the images that have outlines in CONTOURS_SUB_DIR, as the original script did.

    Settings come from ./config.ini (section [local]: DATA_DIR_BASE, CONTOURS_SUB_DIR,
    LINK_FILE_NAME, HDF5_FILENAME) where there is one. An existing output is replaced. Masks follow
    the rule `center`; the original's own masks are `parallel-dicomseg convert --rule
    pil-outline0`.
    """
    from parallel_dicomseg.cohort import scan_cohort
    from parallel_dicomseg.convert import check_output, convert_cohort

    legacy = _legacy_config(data_directory)
    base = data_directory or legacy.data_dir_base
    target = output_filename or legacy.hdf5_filename
    options = ConvertOptions(overwrite=True)
    if not print_random_image:
        check_output(Path(target), options)
    click.echo(printable(f"Reading from {legacy.link_file_name} file"))
    click.echo(printable(f"Base data directory is {base}"))
    with watching() as watch:
        cohort = scan_cohort(base, options=_legacy_scan_options(legacy), progress=watch)
        if not print_random_image:
            with _converting():
                summary = convert_cohort(cohort, target, options=options, progress=watch)
    if print_random_image:
        click.echo(draw_random_image(cohort, seed))
    else:
        click.echo(render_summary(summary))
        click.echo("Finished.")
        click.get_current_context().exit(summary.exit_status)


hdf5_batch_loader = click.command(
    name="hdf5_batch_loader",
    cls=Command,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=ORIGINAL_EPILOG,
)(original_batch_loader)


# --- settings


def _settings(command: str, options: Mapping[str, Any], config: str | None) -> Settings:
    """The settings of a command whose options were generated from them."""
    tables = ("scan",) if command == "scan" else ("scan", "convert")
    overrides = {
        key: _split(value) if isinstance(value, tuple) else value
        for key, setting in SETTINGS.items()
        if key.partition(".")[0] in tables and (value := options[setting.name]) not in (None, ())
    }
    overrides |= dict(map(_limit, options["limits"]))
    settings = load_settings(overrides, config)
    if settings.file and not config:
        click.echo(f"settings from {settings.file}", err=True)
    return settings


def _limit(text: str) -> tuple[str, Any]:
    """'frames=100' as the setting's key and value."""
    name, _, value = text.partition("=")
    with suppress(ValueError):
        return f"limits.{name}", int(value)
    with suppress(ValueError):
        return f"limits.{name}", float(value)
    return f"limits.{name}", value


def _split(values: Iterable[str]) -> tuple[str, ...]:
    """Names that were given one by one, with commas between them, or both.

    A comma inside a /regular expression/ belongs to it.
    """
    parts = (part for value in values for part in _BETWEEN_COMMAS.findall(value) or [""])
    return tuple(part.strip() for part in parts)


def _find_cohort(source: str, settings: Settings, watch: Watch) -> Cohort:
    """Scan a folder of images, or read what an earlier scan saved.

    Raises
    ------
    ConfigurationError
        Options of the scan are given, but it was made before.
    LayoutError
        The data of a saved scan is no longer where it was; or as the scan raises it.
    """
    from parallel_dicomseg.cohort import scan_cohort
    from parallel_dicomseg.saved import SETTINGS as SCAN_SETTINGS
    from parallel_dicomseg.saved import is_saved_scan, load_scan

    if not is_saved_scan(source):
        return scan_cohort(source, options=settings.scan, progress=watch)
    given = [
        f"--{setting.name.replace('_', '-')}"
        for key, setting in SETTINGS.items()
        if settings.origins[key] == COMMAND_LINE and key.startswith("scan.")
        if setting.name != "workers"
    ]
    if given:
        raise ConfigurationError(
            f"{source} is a saved scan, to which {', '.join(given)} belonged: edit its tables, or "
            "scan the images again"
        )
    cohort = load_scan(source)
    if not Path(cohort.root).is_dir():
        place = Path(source, SCAN_SETTINGS)
        raise LayoutError(f"{place}: root: there is no directory {cohort.root}; say where it is")
    return cohort


def _show_config(settings: Settings, tables: tuple[str, ...], as_json: bool) -> None:
    """Print each setting, its value and where it came from."""
    rows = [
        (key, value, settings.origins[key])
        for key, value in settings.values.items()
        if key.startswith(tables)
    ]
    if as_json:
        print_json({key: {"value": value, "origin": origin} for key, value, origin in rows})
    else:
        click.echo(
            columns_of_text([(key, json.dumps(value), origin) for key, value, origin in rows])
        )


def _legacy_default(settings: Settings, name: str, missing: str) -> str:
    """A path that the original script's config.ini gives, or a usage error."""
    if not (settings.file and is_legacy(Path(settings.file))):
        raise click.UsageError(f"Missing argument {missing}.")
    return str(getattr(read_legacy_config(settings.file), name))


def _legacy_config(data_directory: str | None) -> LegacyConfig:
    """./config.ini, or the defaults where there is none and they, with the flags, suffice."""
    file = Path(LEGACY_CONFIG_FILE)
    if file.is_file():
        return read_legacy_config(file)
    legacy = LegacyConfig()
    if data_directory is None and not Path(legacy.data_dir_base).is_dir():
        raise ConfigurationError(
            f"there is neither a {file} nor a folder {legacy.data_dir_base} here; "
            f"say where the data is with --data_directory"
        )
    return legacy


def _legacy_scan_options(legacy: LegacyConfig) -> ScanOptions:
    values = legacy_values(legacy)
    return ScanOptions(**{key.removeprefix("scan."): value for key, value in values.items()})


# --- the original's --print_random_image


def draw_random_image(cohort: Cohort, seed: int | None) -> str:
    """Save a figure of one random annotated slice in the working directory; what to print of it.

    The slice goes through the real conversion, into a temporary file.
    """
    from parallel_dicomseg.convert import convert_cohort
    from parallel_dicomseg.report.figures import image_and_mask_figure
    from parallel_dicomseg.store import open_dataset

    annotated = np.unique(cohort.annotations.slice)
    if not len(annotated):
        raise LayoutError(f"{cohort.root}: no image has an outline, there is nothing to draw")
    chosen = int(random.Random(seed).choice(annotated))  # noqa: S311  # a picture, not a secret
    patient = _patient_numbers(cohort)[chosen]
    spacing = cohort.slices.pixel_spacing[chosen]
    figure = _next_free("random_image_{}.png")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "slice.h5")
        options = ConvertOptions(scheduler="synchronous", strict=True)
        convert_cohort(only_slice(cohort, chosen), file, options=options)
        with open_dataset(file) as dataset:
            image_and_mask_figure(
                dataset.images[0],
                dataset.masks[0],
                dataset.structures,
                figure,
                title=f"patient {patient}, slice {chosen}",
                pixel_spacing=spacing,
            )
    return "\n".join(
        [
            f"Figure is {figure}",
            f"Patient number is {patient}",
            f"Pixel dimensions are {spacing[0]:.3f} x {spacing[1]:.3f} mm",
            f"Slice thickness is {cohort.slices.slice_thickness[chosen]:.3f} mm",
        ]
    )


def only_slice(cohort: Cohort, index: int) -> Cohort:
    """The cohort of one slice with its outlines."""
    only = np.array([index])
    mine = cohort.annotations.take(cohort.annotations.slice == index)
    return replace(
        cohort,
        slices=cohort.slices.take(only),
        headers={name: column.take(only) for name, column in cohort.headers.items()},
        annotations=replace(mine, slice=np.zeros(len(mine), np.int64)),
        marks=cohort.marks.on_slices(only),
        problems=(),
    )


def _patient_numbers(cohort: Cohort) -> list[int]:
    """(n,) the patients' running numbers in the order of the output, as in the file's table."""
    numbers: dict[bytes, int] = {}
    return [numbers.setdefault(key, len(numbers) + 1) for key in cohort.slices.patient_id.tolist()]


def _next_free(pattern: str) -> Path:
    """The first file name of a numbered series that is not taken."""
    number = 1
    while Path(pattern.format(number)).exists():
        number += 1
    return Path(pattern.format(number))
