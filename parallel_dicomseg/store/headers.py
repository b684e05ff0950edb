"""The DICOM dictionary of each series as JSON, and what varies within one as columns.

The JSON is the DICOM JSON Model (PS3.18 Annex F), as `pydicom.Dataset.from_json` reads it:
{"00180081": {"vr": "DS", "Value": [2.5]}, ...}, sorted by tag.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from parallel_dicomseg.deidentify import Policy, public_headers
from parallel_dicomseg.dicom.attributes import ALLOWED_ATTRIBUTES, DATE_ATTRIBUTES
from parallel_dicomseg.dicom.decoders import quiet
from parallel_dicomseg.errors import ConfigurationError
from parallel_dicomseg.records import Bytes, HeaderColumn, Int64

Fragment = tuple[int, str]
"""A tag, and '"ggggeeee":{...}', an attribute in JSON."""

_ATTRIBUTES: Mapping[str, tuple[int, str]] = {**ALLOWED_ATTRIBUTES, **DATE_ATTRIBUTES}

# Values of a full header above this size are left out, in bytes.
_BULK = 1024
_PER_FRAME_GROUPS = 0x52009230
_SPECIFIC_CHARACTER_SET = "00080005"
_PIXEL_GROUP = 0x7FE0
# What pydicom raises about values that are not what their VR says.
_UNREADABLE = (
    ArithmeticError,
    AttributeError,
    LookupError,
    NotImplementedError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)

_INTEGERS = frozenset({"IS", "US", "SS", "UL", "SL", "UV", "SV"})
_REALS = frozenset({"DS", "FL", "FD"})

_TAG = re.compile(r"\(?([0-9a-fA-F]{4}),?\s*([0-9a-fA-F]{4})\)?")


# --- what the writer stores ----------------------------------------------------------------------


def varying_headers(
    headers: Iterable[tuple[str, HeaderColumn]],
    patient_id: Bytes,
    first_slice: Int64,
    identity: Policy,
    constant: list[list[Fragment]],
) -> Iterator[tuple[str, Bytes]]:
    """Part what is the same in all images of a series from what is not, attribute by attribute.

    Parameters
    ----------
    headers
        Keywords and their columns, the n rows of the file.
    patient_id
        (n,) the patients of the input, whose dates move together.
    first_slice
        (k,) the first row of each series.
    constant
        (k,) lists, to which an attribute is added where it is the same in the whole series.

    Yields
    ------
    Keyword and texts (n,) of each attribute that varies within a series.
    """
    representations = {keyword: vr for keyword, (_, vr) in _ATTRIBUTES.items()}
    for keyword, column in public_headers(headers, patient_id, representations, identity):
        if _collect(keyword, column, first_slice, constant):
            yield keyword, column.values[column.code]


def _collect(
    keyword: str, column: HeaderColumn, first_slice: Int64, constant: list[list[Fragment]]
) -> bool:
    """Add an attribute to the series in which it is constant; whether it varies in another."""
    if not len(column.values):
        return False
    known = [_fragment(keyword, value) for value in column.values.tolist()]
    lowest = np.minimum.reduceat(column.code, first_slice)
    highest = np.maximum.reduceat(column.code, first_slice)
    for k in np.flatnonzero(lowest == highest).tolist():
        if fragment := known[lowest[k]]:
            constant[k].append(fragment)
    return bool((lowest != highest).any())


def _fragment(keyword: str, text: bytes) -> Fragment | None:
    if keyword not in _ATTRIBUTES or not text:
        return None
    tag, vr = _ATTRIBUTES[keyword]
    values = [_number(part.strip(), vr) for part in text.decode("utf-8", "replace").split("\\")]
    element = {"vr": vr, "Value": [None if value == "" else value for value in values]}
    return tag, _json_member(tag, element)


def _json_member(tag: int, element: Any) -> str:
    text = json.dumps(element, allow_nan=False, ensure_ascii=False, separators=(",", ":"))
    return f'"{tag:08X}":{text}'


def _number(text: str, vr: str) -> int | float | str:
    """A value as a number where its VR is one of numbers and it is one."""
    try:
        if vr in _INTEGERS:
            return int(text)
        if vr in _REALS and np.isfinite(value := float(text)):
            return value
    except ValueError:
        pass
    return text


def method_of(identity: Policy) -> list[Fragment]:
    """How identity was removed (PS3.3 C.7.1.1, PS3.15 E.1.1); nothing where it is kept."""
    if identity.keep_identity:
        return []
    method = "parallel_dicomseg: allow-list after PS3.15 Annex E"
    dates = "MODIFIED" if identity.shift_dates else "REMOVED"
    said = ((0x00120062, "CS", "YES"), (0x00120063, "LO", method), (0x00280303, "CS", dates))
    return [(tag, _json_member(tag, {"vr": vr, "Value": [value]})) for tag, vr, value in said]


def series_json(constant: list[Fragment]) -> str:
    """One series' attributes as a JSON object, sorted by tag."""
    return "{" + ",".join(text for _, text in sorted(constant)) + "}"


def full_header(path: str) -> str:
    """The whole dictionary of an image as DICOM JSON: all that identifies, private tags too.

    Left out are pixels, the functional groups of single frames, values of more than 1 KiB, and
    what pydicom cannot read.

    Raises
    ------
    OSError, ValueError
        The file cannot be read, or is no DICOM file.
    """
    import pydicom

    with quiet():
        try:
            dataset = pydicom.dcmread(path, stop_before_pixels=True, force=True)
        except OSError:
            raise
        except Exception as error:  # a damaged file can raise anything
            raise ValueError(f"{type(error).__name__}: {error}") from error
        model = _model(dataset)
    if _SPECIFIC_CHARACTER_SET in model:
        model[_SPECIFIC_CHARACTER_SET] = {"vr": "CS", "Value": ["ISO_IR 192"]}
    return json.dumps(model, allow_nan=False, ensure_ascii=False, separators=(",", ":"))


def _model(dataset: Any) -> dict[str, Any]:
    """A data set of pydicom as DICOM JSON, without what is large or unreadable."""
    model: dict[str, Any] = {}
    for tag in sorted(dataset.keys()):
        if tag.group == _PIXEL_GROUP or tag == _PER_FRAME_GROUPS:
            continue
        # whatever is wrong with one value, the others are worth having
        with contextlib.suppress(*_UNREADABLE):
            element = dataset[tag]
            if element.VR == "SQ":
                model[f"{tag:08X}"] = {
                    "vr": "SQ",
                    "Value": [_model(item) for item in element.value],
                }
            elif _size(element.value) <= _BULK:
                plain = element.to_json_dict(None, _BULK)
                json.dumps(plain, allow_nan=False)
                model[f"{tag:08X}"] = plain
    return model


def _size(value: Any) -> int:
    return len(value) if isinstance(value, bytes) else len(str(value))


# --- what readers get ----------------------------------------------------------------------------


def plain_header(text: str) -> dict[str, Any]:
    """Keyword (or 'ggggeeee' of a tag without one) -> number, text, or list of them.

    Raises
    ------
    ValueError
        It is no DICOM JSON object.
    """
    model = json.loads(text)
    if not isinstance(model, dict):
        raise ValueError("the header is no JSON object")
    return {keyword_of(tag): _plain(element) for tag, element in model.items()}


def _plain(element: Any) -> Any:
    if not isinstance(element, dict) or "vr" not in element:
        raise ValueError("an attribute of the header has no vr")
    values = element.get("Value", [element["InlineBinary"]] if "InlineBinary" in element else [])
    plain = [_plain_value(value, element["vr"]) for value in values]
    return plain[0] if len(plain) == 1 and element["vr"] != "SQ" else plain


def _plain_value(value: Any, vr: str) -> Any:
    if vr == "SQ" and isinstance(value, dict):
        return {keyword_of(tag): _plain(element) for tag, element in value.items()}
    if vr == "PN" and isinstance(value, dict):
        return value.get("Alphabetic", "")
    return value


def plain_value(keyword: str, text: bytes) -> Any:
    """A varying attribute of one image: number, text, or list of them; '' where it is absent."""
    vr = _ATTRIBUTES[keyword][1] if keyword in _ATTRIBUTES else ""
    values = [_number(part.strip(), vr) for part in text.decode("utf-8", "replace").split("\\")]
    return values[0] if len(values) == 1 else values


def keyword_of(tag: str) -> str:
    """The keyword of 'ggggeeee', or the tag itself where it has none (private ones).

    Raises
    ------
    ValueError
        It is no tag.
    """
    from pydicom.datadict import keyword_for_tag

    return keyword_for_tag(int(tag, 16)) or tag.upper()


def keyword_from_user(text: str, known: Callable[[], NDArray[Any] | list[str]]) -> str:
    """The keyword that 'EchoTime', 'echotime', '0018,0081' or '(0018, 0081)' means.

    Parameters
    ----------
    known
        The keywords that are there, to suggest close ones.

    Raises
    ------
    ConfigurationError
        DICOM knows no such keyword or tag.
    """
    from pydicom.datadict import keyword_dict

    if match := _TAG.fullmatch(text.strip()):
        return keyword_of("".join(match.groups()))
    by_case = {keyword.casefold(): keyword for keyword in keyword_dict}
    here = {str(keyword).casefold(): str(keyword) for keyword in known()}
    wanted = text.strip().casefold()
    if keyword := here.get(wanted) or by_case.get(wanted):
        return keyword
    close = difflib.get_close_matches(wanted, {**by_case, **here}, n=3)
    hint = ", ".join(here.get(name) or by_case[name] for name in close)
    raise ConfigurationError(
        f"{text!r} is no DICOM keyword and no tag" + (f"; is it {hint}?" if hint else "")
    )
