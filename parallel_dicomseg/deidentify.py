"""What of a patient's identity the output holds. Pure, but for the key file.

After DICOM PS3.15 Annex E, as an allow-list: an attribute that is not named is not kept, and of
one that is named only values that are numbers or code strings. Names and UIDs become pseudonyms,
equal ones equal ones (E.1.1: UIDs are replaced consistently); dates are dropped, or moved by as
many days for all of a patient ("Retain Longitudinal Temporal Information With Modified Dates").
docs/deidentification.md says it for users.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
import stat
from base64 import b32encode
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import date, timedelta
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from parallel_dicomseg.errors import ConfigurationError
from parallel_dicomseg.private import open_private
from parallel_dicomseg.records import (
    Bytes,
    ConvertOptions,
    HeaderColumn,
    Int64,
    Problem,
)

#: Columns of the SliceTable that name a person or an examination, and what their pseudonyms say.
IDENTITIES = {
    "patient_id": "patient",
    "study_instance_uid": "study",
    "series_instance_uid": "series",
    "sop_instance_uid": "instance",
    "frame_of_reference_uid": "frame-of-reference",
}

DATES = ("drop", "shift")

KEY_BYTES = 32
_KEY_COMMENT = (
    "# Key of the pseudonyms in files made by parallel_dicomseg. "
    "Whoever has it can tell who is who: keep it apart from them."
)
# A key file is two short lines; more is another file.
_LONGEST_KEY_FILE = 4096

# 80 bits: no two of a million million names are likely to be equal.
_NAME_CHARACTERS = 16
_PATH_CHARACTERS = 12
# Dates move back by one day to about ten years, never into the future.
_LONGEST_SHIFT = 3650

# Ends of file names that say what a file is, not whose it is.
_SUFFIXES = frozenset(
    {".csv", ".dcm", ".dicom", ".gz", ".h5", ".ima", ".json", ".nii", ".nrrd", ".txt", ".xml"}
)
_WORD = re.compile(r"\w+")
# Of four letters or more: shorter names are words and numbers that mean something else.
_NAME = re.compile(r"\w.{2,}\w", re.DOTALL)

# Names of folders that say nothing of anybody, and are words of the sentences.
# fmt: off
_PLAIN_WORDS = frozenset(
    {
        "annotation", "annotations", "contour", "contours", "data", "dicom", "file", "files",
        "folder", "frame", "frames", "header", "image", "images", "mask", "masks", "number",
        "outline", "outlines", "patient", "patients", "pixel", "pixels", "position", "segment",
        "segments", "series", "slice", "slices", "structure", "structures", "study",
    }
)
# fmt: on

_NUMBER = re.compile(rb"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
_INTEGER = re.compile(rb"[+-]?\d+")
# PS3.5 table 6.2-1, of one value.
_CODE_STRING = re.compile(rb"[A-Z0-9_ ]{0,16}")
_CLASS_UID = re.compile(r"1\.2\.840\.10008\.[0-9.]+|[0-9.]{0,24}")
_FORM = {
    "CS": _CODE_STRING,
    **dict.fromkeys(("DS", "FL", "FD"), _NUMBER),
    **dict.fromkeys(("IS", "US", "SS", "UL", "SL", "UV", "SV"), _INTEGER),
}


@dataclass(frozen=True, slots=True)
class Policy:
    """What the output may hold; by default running numbers and no dates."""

    keep_identity: bool = False
    """Everything passes as it is in the input."""
    key: bytes | None = field(default=None, repr=False)
    """Names become hashes with this key, the same in every run; None: running numbers."""
    shift_dates: bool = False
    """Dates of a patient move by a number of days that the key decides; else they are dropped."""
    hash_paths: bool = False
    """Paths of files in lists and messages become hashes."""

    @property
    def pseudonyms(self) -> str:
        """'kept', 'keyed-hash' or 'running-number'."""
        if self.keep_identity:
            return "kept"
        return "running-number" if self.key is None else "keyed-hash"

    @property
    def dates(self) -> str:
        """'kept', 'shifted' or 'dropped'."""
        if self.keep_identity:
            return "kept"
        return "shifted" if self.shift_dates else "dropped"


def policy_of(options: ConvertOptions, *, apart_from: Iterable[Path] = ()) -> Policy:
    """The policy that the options ask for; makes the key file where it is missing.

    Parameters
    ----------
    options
        `keep_identity`, `key_file`, `dates` and `hash_paths` count.
    apart_from
        Directories that the key file must not lie in, such as that of the data.

    Raises
    ------
    ConfigurationError
        The options contradict each other, or the key file is refused (`read_or_make_key`).
    """
    if options.dates not in DATES:
        raise ConfigurationError(f"dates is {options.dates!r}, it can be {', '.join(DATES)}")
    if options.keep_identity and (options.key_file or options.dates == "shift"):
        raise ConfigurationError(
            "keep_identity leaves names and dates as they are; "
            "it goes neither with key_file nor with dates = 'shift'"
        )
    if options.dates == "shift" and not options.key_file:
        raise ConfigurationError("dates = 'shift' needs a key_file, which decides by how many days")
    key = read_or_make_key(options.key_file, apart_from=apart_from) if options.key_file else None
    return Policy(
        keep_identity=options.keep_identity,
        key=key,
        shift_dates=options.dates == "shift",
        hash_paths=options.hash_paths,
    )


# --- the key -------------------------------------------------------------------------------------


def read_or_make_key(path: str | Path, *, apart_from: Iterable[Path] = ()) -> bytes:
    """The 32 bytes of a key file, which is made, for its owner alone, where there is none.

    Parameters
    ----------
    path
        One line of 64 hexadecimal digits, beside comments that start with '#'.
    apart_from
        Directories that it must not lie in.

    Raises
    ------
    ConfigurationError
        Others may read it, it is no key, it lies in one of `apart_from`, or it can be neither
        read nor made.
    """
    path = Path(path)
    inside = next((d for d in apart_from if path.resolve().is_relative_to(d.resolve())), None)
    if inside is not None:
        raise ConfigurationError(
            f"key file {path} lies in {inside}, whose names it uncovers: keep it elsewhere"
        )
    try:
        return _make_key(path)
    except FileExistsError:
        pass
    except OSError as error:
        raise ConfigurationError(f"key file {path} cannot be made: {error.strerror}") from error
    try:
        return _read_key(path)
    except OSError as error:
        raise ConfigurationError(f"key file {path} cannot be read: {error.strerror}") from error


def _make_key(path: Path) -> bytes:
    key = secrets.token_bytes(KEY_BYTES)
    descriptor = open_private(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    with os.fdopen(descriptor, "w", encoding="ascii") as file:
        file.write(f"{_KEY_COMMENT}\n{key.hex()}\n")
    return key


def _read_key(path: Path) -> bytes:
    # a pipe would wait for somebody to write into it
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise ConfigurationError(f"key file {path} is no regular file")
        if os.name == "posix" and status.st_mode & 0o077:
            raise ConfigurationError(
                f"key file {path} has mode {stat.S_IMODE(status.st_mode):03o}, others may use it: "
                f"chmod 600"
            )
        lines = os.read(descriptor, _LONGEST_KEY_FILE).splitlines()
    finally:
        os.close(descriptor)
    keys = [line.strip() for line in lines if line.strip() and not line.startswith(b"#")]
    if len(keys) != 1 or not re.fullmatch(rb"[0-9a-fA-F]{%d}" % (2 * KEY_BYTES), keys[0]):
        raise ConfigurationError(
            f"key file {path} is no key: one line of {2 * KEY_BYTES} hexadecimal digits is needed"
        )
    return bytes.fromhex(keys[0].decode())


# --- names ---------------------------------------------------------------------------------------


def pseudonyms(names: Bytes, kind: str, policy: Policy) -> Bytes:
    """What stands in the place of names or UIDs: equal ones stay equal, '' stays ''.

    Parameters
    ----------
    names
        (n,) in the order of the output, in which running numbers count.
    kind
        What the names are of, e.g. 'patient'.
    """
    if policy.keep_identity:
        return names
    rank, first = ranks(names)
    distinct = names[first]
    if policy.key is None:
        new = _numbered(distinct, kind)
    else:
        key = policy.key
        new = [keyed_name(name, kind, key) if name else b"" for name in distinct.tolist()]
    renamed: Bytes = np.array(new, np.bytes_)[rank] if new else np.empty(0, "S1")
    return renamed


def ranks(values: Bytes) -> tuple[Int64, Int64]:
    """(n,) the rank of each value by first appearance, and (k,) where each first appears."""
    _, first, inverse = np.unique(values, return_index=True, return_inverse=True)
    rank = np.empty(len(first), np.int64)
    rank[np.argsort(first)] = np.arange(len(first))
    return rank[inverse], np.sort(first)


def _numbered(distinct: Bytes, kind: str) -> list[bytes]:
    number = np.cumsum(distinct != b"")
    digits = len(str(number[-1])) if len(number) else 0
    return [
        f"{kind}-{k:0{digits}d}".encode() if name else b""
        for name, k in zip(distinct.tolist(), number.tolist(), strict=True)
    ]


def keyed_name(name: bytes, kind: str, key: bytes) -> bytes:
    """A pseudonym that only the holder of the key can make from the name: 'patient-…'.

    The first 80 bits of HMAC-SHA-256 (RFC 2104) of kind, a zero byte and name, as base32 (RFC
    4648) in lower case.
    """
    return f"{kind}-{_base32(_keyed(key, kind, name), _NAME_CHARACTERS)}".encode()


def _keyed(key: bytes, kind: str, value: bytes) -> bytes:
    return hmac.digest(key, kind.encode() + b"\0" + value, "sha256")


def _base32(digest: bytes, characters: int) -> str:
    return b32encode(digest).decode().lower()[:characters]


# --- dates ---------------------------------------------------------------------------------------


def shift_days(patient_id: bytes, key: bytes) -> int:
    """By how many days all dates of a patient move: -1 to -3650, the same in every run."""
    digest = _keyed(key, "days", patient_id)
    return -1 - int.from_bytes(digest[:8], "big") % _LONGEST_SHIFT


def shift_date(text: bytes, days: int) -> bytes:
    """A DICOM date (YYYYMMDD) some days later; b'' for what is no date, and for years before 1."""
    if not re.fullmatch(rb"\d{8}", text):
        return b""
    try:
        day = date(int(text[:4]), int(text[4:6]), int(text[6:])) + timedelta(days)
    except (ValueError, OverflowError):
        return b""
    return f"{day.year:04d}{day.month:02d}{day.day:02d}".encode()


# --- attributes ----------------------------------------------------------------------------------


def public_headers(
    headers: Iterable[tuple[str, HeaderColumn]],
    patient_id: Bytes,
    representations: Mapping[str, str],
    policy: Policy,
) -> Iterator[tuple[str, HeaderColumn]]:
    """The attributes that the output may hold, one by one, with the values that it may hold.

    Parameters
    ----------
    headers
        Keywords and their columns of n rows.
    patient_id
        (n,) whose image each row is.
    representations
        The allow-list: value representation by keyword. 'DA' is a date.

    Yields
    ------
    Keyword and column, in the order of `headers`; equal values have equal codes.
    """
    for keyword, column in headers:
        vr = representations.get(keyword, "")
        if policy.keep_identity:
            yield keyword, column
        elif vr == "DA" and policy.shift_dates and policy.key is not None:
            yield keyword, _shifted(column, patient_id, policy.key)
        elif vr in _FORM:
            yield keyword, _recoded([cleaned(v, vr) for v in column.values.tolist()], column.code)


def cleaned(text: bytes, vr: str) -> bytes:
    """A value as it may be kept, without padding: b'' where a part is not what its VR says.

    A name that somebody typed where a code or a number belongs is so dropped, unless it looks
    like a code.
    """
    form = _FORM.get(vr)
    if form is None:
        return b""
    parts = [part.strip() for part in text.split(b"\\")]
    return b"\\".join(parts) if all(not p or form.fullmatch(p) for p in parts) else b""


def class_uid(uid: str) -> str:
    """The UID of a SOP class or transfer syntax as messages may show it: 'private' where it is
    neither registered by the standard (PS3.6 A) nor as short as makers' classes are and UIDs of
    somebody's images are not.
    """
    return uid if _CLASS_UID.fullmatch(uid) else "private"


def _shifted(column: HeaderColumn, patient_id: Bytes, key: bytes) -> HeaderColumn:
    """Dates moved by each patient's own number of days."""
    patient, first = ranks(patient_id)
    days = [shift_days(name, key) for name in patient_id[first].tolist()]
    pairs, code = np.unique(patient * len(column.values) + column.code, return_inverse=True)
    values = column.values.tolist()
    moved = [
        shift_date(values[pair % len(values)].strip(), days[pair // len(values)])
        for pair in pairs.tolist()
    ]
    return _recoded(moved, code)


def _recoded(values: list[bytes], code: NDArray[np.integer[Any]]) -> HeaderColumn:
    """A column of these values, of which equal ones become one."""
    if not values:
        return HeaderColumn(np.empty(0, "S1"), np.asarray(code, np.int32))
    distinct, new = np.unique(np.array(values, np.bytes_), return_inverse=True)
    return HeaderColumn(distinct, new.astype(np.int32)[code])


# --- paths ---------------------------------------------------------------------------------------


def hashed_path(path: str, key: bytes | None) -> str:
    """'path-' and 12 characters in the place of a path; a suffix that says no more than the kind
    of file is kept.

    With a key as `keyed_name`; without one SHA-256 of the path, which is the same everywhere, so
    that whoever guesses a path can confirm it.
    """
    raw = os.fsencode(path)
    digest = hashlib.sha256(raw).digest() if key is None else _keyed(key, "path", raw)
    suffix = PurePosixPath(path).suffix.lower()
    known = suffix if suffix in _SUFFIXES else ""
    return f"path-{_base32(digest, _PATH_CHARACTERS)}{known}"


def conceal_paths(
    problems: Iterable[Problem], paths: Iterable[bytes], policy: Policy
) -> tuple[Problem, ...]:
    """Problems that name files by hashes, in their sentences too; as they are without `hash_paths`.

    Parameters
    ----------
    problems
        Their own paths, and the folders above, are looked for in all sentences.
    paths
        Further paths that sentences may name, os.fsencode-d.
    """
    problems = tuple(problems)
    if not problems or not policy.hash_paths or policy.keep_identity:
        return problems
    names = _Names((*map(os.fsdecode, paths), *(p.path for p in problems)))
    return tuple(
        replace(
            problem,
            path=hashed_path(problem.path, policy.key),
            detail=names.concealed(problem.detail, policy.key),
        )
        for problem in problems
    )


class _Names:
    """Paths, the folders above them and the parts of both, to be found in sentences."""

    def __init__(self, paths: Iterable[str]) -> None:
        self._names: dict[str, str] = {}
        """From the first to the last letter or digit of a name -> the name."""
        seen: set[str] = set()
        for path in paths:
            self._add(path, seen)
        self._first_words = {_WORD.match(name)[0] for name in self._names}  # type: ignore[index]

    def _add(self, path: str, seen: set[str]) -> None:
        while path and path not in seen:
            seen.add(path)
            folder, _, part = path.rpartition("/")
            for name in (path, part):
                core = _NAME.search(name)
                if core and core[0].casefold() not in _PLAIN_WORDS:
                    self._names.setdefault(core[0], name)
            path = folder

    def concealed(self, sentence: str, key: bytes | None) -> str:
        """The sentence with a hash for each name in it, the longest where several begin."""
        words = list(_WORD.finditer(sentence))
        parts: list[str] = []
        at = 0
        for k, word in enumerate(words):
            start = word.start()
            if start < at or word[0] not in self._first_words:
                continue
            pieces = (sentence[start : last.end()] for last in reversed(words[k:]))
            if core := next((piece for piece in pieces if piece in self._names), ""):
                name = self._names[core]
                rest = name[name.index(core) :]
                whole = rest if sentence.startswith(rest, start) else core
                parts += [sentence[at:start], hashed_path(name, key)]
                at = start + len(whole)
        return "".join([*parts, sentence[at:]])
