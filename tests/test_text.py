"""Numbers out of text against Python's own float and NumPy's loadtxt, and the files they lie in."""

from __future__ import annotations

import csv
import math
import os
import random
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallel_dicomseg import posix, text
from parallel_dicomseg.records import Limits
from parallel_dicomseg.text import (
    ContourFiles,
    digest_bytes,
    parse_contour,
    parse_decimal_lists,
    parse_decimals,
    read_contour_files,
)

TRIANGLE = "1 2\n3.5 4\n5 6.25\n"
TRIANGLE_POINTS = [[1.0, 2.0], [3.5, 4.0], [5.0, 6.25]]

SPELLINGS = ("%r", "%.2f", "%.17g", "%.12e", "%+.6f", "%.0f", "%.3E", "%g", "%.25f")

finite = st.floats(allow_nan=False, allow_infinity=False)
coordinates = st.floats(-1e4, 1e4)


def spellings_of(values: st.SearchStrategy[float]) -> st.SearchStrategy[bytes]:
    """Values as text; rounding may go beyond the largest float64, such texts are left out."""
    spelled = st.builds(
        lambda value, spelling: spelling % value, values, st.sampled_from(SPELLINGS)
    )
    return spelled.filter(lambda token: math.isfinite(float(token))).map(str.encode)


spelled = spellings_of(st.one_of(finite, coordinates))


def as_bytes(raw: bytes) -> np.ndarray:
    """Bytes as kernels take them."""
    return np.frombuffer(raw, dtype=np.uint8)


def plain_decimals(raw: bytes) -> list[float]:
    """The obvious way to read decimals: split, check each character, call float."""
    values = []
    for part in re.split(rb"[,\\]", raw) if raw.split() else []:
        if not part.split():
            raise ValueError("empty")
        for token in part.split():
            if not set(token) <= set(b"0123456789+-.eE"):
                raise ValueError("a character of no number")
            values.append(float(token))
            if not math.isfinite(values[-1]):
                raise ValueError("not finite")
    return values


def plain_contour(raw: bytes) -> tuple[list[list[float]], str]:
    """Points and error of a contour file by the plain twin."""
    try:
        return parse_contour(raw).tolist(), ""
    except ValueError as error:
        return [], str(error)


def bits(values: object) -> list[int]:
    """The bit patterns of float64 values: -0.0 is not 0.0."""
    return np.asarray(values, dtype=np.float64).view(np.uint64).tolist()


def write(path: Path, content: str | bytes) -> str:
    """Write a file and give its path as the functions take it."""
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def ring(files: ContourFiles, index: int) -> list[list[float]]:
    """The points of one file."""
    start, stop = files.offsets[index : index + 2]
    return files.points_column_row[start:stop].tolist()


# ------------------------------------------------------------------------------------- decimals


@given(st.lists(spelled, max_size=30), st.sampled_from([b" ", b"\\", b",", b"\r\n", b" , ", b"\t"]))
def test_decimals_equal_python_float_bit_for_bit(tokens: list[bytes], separator: bytes) -> None:
    """Any spelling of any finite float64 is read as Python reads it."""
    raw = separator.join(tokens)

    assert bits(parse_decimals(as_bytes(raw))) == bits([float(token) for token in tokens])


@given(st.text("0123456789+-.eE, \\\n_nai", max_size=24))
def test_junk_is_refused_exactly_where_the_plain_reader_refuses_it(junk: str) -> None:
    """The kernel accepts and rejects the same texts as the obvious reader, with equal values."""
    raw = junk.encode()
    try:
        expected = plain_decimals(raw)
    except ValueError:
        with pytest.raises(ValueError, match=r"^value \d+ \(line \d+\): "):
            parse_decimals(as_bytes(raw))
    else:
        assert bits(parse_decimals(as_bytes(raw))) == bits(expected)


@given(
    st.one_of(st.integers(0, 10**20), st.integers(2**53, 2**54), st.integers(0, 2**53)),
    st.integers(-30, 30),
)
def test_integers_times_powers_of_ten_are_correctly_rounded(mantissa: int, exponent: int) -> None:
    """On either side of every limit of the fast paths: 2**53, 18 digits, 10**22, 10**-26."""
    token = f"{mantissa}e{exponent}"

    assert bits(parse_decimals(as_bytes(token.encode()))) == bits([float(token)])


@pytest.mark.parametrize(
    ("token", "value"),
    [
        # Halfway between two float64, and just beside it: the classical traps of fast paths.
        (b"9007199254740993", 9007199254740992.0),
        (b"9007199254740993.1", 9007199254740994.0),
        (b"9045139995783513e-15", 9.045139995783513),
        (b"9999999999999999999", 1e19),
        (b"9223372036854775808e-5", 92233720368547.77),
        (b"123456789012345678e-26", 1.2345678901234568e-09),
        (b"123456789012345678e-27", 1.2345678901234568e-10),
        (b"9007199254740993.0000000001", 9007199254740994.0),
        (b"2.2250738585072012e-308", 2.2250738585072014e-308),
        (b"4.9406564584124654e-324", 5e-324),
        (b"1.7976931348623157e308", 1.7976931348623157e308),
        (b"0.500000000000000166533453693773481063544750213623046875", 0.5000000000000002),
        (b"-0", -0.0),
        (b"+.5", 0.5),
        (b"5.", 5.0),
        (b"0e99999", 0.0),
        (b"00000000000000000000000012.5", 12.5),
    ],
)
def test_hard_decimals(token: bytes, value: float) -> None:
    """Values at the edge of rounding, of the range and of the grammar."""
    assert bits(parse_decimals(as_bytes(token))) == bits([value])


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"1 2 three", "value 3 (line 1): not a number"),
        (b"1\n2\nx", "value 3 (line 3): not a number"),
        (b"1\\\\3", "value 2 (line 1): empty, a number is needed"),
        (b"1,2,", "value 3 (line 1): empty, a number is needed"),
        (b"\\1", "value 1 (line 1): empty, a number is needed"),
        (b"nan", "value 1 (line 1): not finite"),
        (b"-Infinity", "value 1 (line 1): not finite"),
        (b"1e999", "value 1 (line 1): not finite"),
        (b"1_0", "value 1 (line 1): not a number"),
        (b"0x1F", "value 1 (line 1): not a number"),
        (b"1.2.3", "value 1 (line 1): not a number"),
        (b"1e", "value 1 (line 1): not a number"),
        (b"1\x002", "value 1 (line 1): not a number"),
        (b"\xff\xfe", "value 1 (line 1): not a number"),
        (b"z" * 100, "value 1 (line 1): not a number"),
    ],
)
def test_what_is_no_number_is_named(raw: bytes, message: str) -> None:
    """Place, line and kind of the offending value are the message; its text is not in it."""
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        parse_decimals(as_bytes(raw))


def plain_list(part: bytes) -> list[float] | None:
    """The numbers between single backslashes; None where it is no such list, or one is too far."""
    values = []
    for item in part.rstrip(b" \0").split(b"\\"):
        token = item.strip(b" \t\v\f")
        if not re.fullmatch(rb"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", token):
            return None
        values.append(float(token))
    return values if max(map(abs, values)) <= 2**31 else None


separated = st.lists(
    st.tuples(spelled, st.sampled_from([b"", b"", b" "])).map(b"".join), min_size=1, max_size=9
).map(b"\\".join)
junk_lists = st.text("0123456789+-.eE \\\0,\n", max_size=24).map(str.encode)


@given(
    st.lists(
        st.tuples(st.one_of(separated, junk_lists), st.sampled_from([b"", b" ", b"\0"])), max_size=6
    )
)
def test_lists_that_are_known_are_those_of_the_obvious_reader(
    padded: list[tuple[bytes, bytes]],
) -> None:
    """Each string on its own: its numbers bit for bit, or not known and no numbers at all."""
    parts = [b"".join(pair) for pair in padded]
    offsets = np.cumsum([0, *map(len, parts)])
    values, starts, known = parse_decimal_lists(as_bytes(bytearray(b"".join(parts))), offsets)

    assert len(values) == starts[-1]
    for k, part in enumerate(parts):
        found = values[starts[k] : starts[k + 1]]
        expected = plain_list(part)
        if known[k]:
            assert expected is not None
            assert bits(found) == bits(expected)
        else:
            assert len(found) == 0
            # what every file has is known
            assert not re.fullmatch(rb"-?\d{1,8}\.\d{1,7}(\\-?\d{1,8}\.\d{1,7})*[ \0]*", part)


@pytest.mark.parametrize("raw", [b"", b" \r\n\t"])
def test_nothing_but_white_space_holds_no_decimals(raw: bytes) -> None:
    """An empty value field is no error but no values."""
    assert parse_decimals(as_bytes(raw)).shape == (0,)


# -------------------------------------------------------------------------------- contour files


@pytest.fixture
def no_plain_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make sure that the kernel needs no help from Python."""

    def refuse(path: str) -> None:
        raise AssertionError(f"the kernel left {path} to Python")

    monkeypatch.setattr(text, "_read_outline", refuse)


@pytest.mark.parametrize(
    "content",
    [
        TRIANGLE,
        "1 2\n3.5 4\n5 6.25",
        "\ufeff1 2\n3.5 4\n5 6.25\n",
        "1 2\r\n3.5 4\r\n5 6.25\r\n",
        "1 2\r3.5 4\r5 6.25\r",
        "\n\n 1\t2 \n \n3.5,4\n5 , 6.25\n\n\n",
        "1 2\n3.5 4\n5 6.25\n1.0 2.00\n",
        "1 2\n3.5000000000000000000000 4\n5 6.25\n",
    ],
)
def test_usual_and_odd_spellings_give_the_same_outline(tmp_path: Path, content: str) -> None:
    """Line ends, blanks, commas, a byte order mark and an explicitly closed ring are tolerated."""
    files = read_contour_files([write(tmp_path / "a.txt", content)])

    assert files.errors == ()
    assert ring(files, 0) == TRIANGLE_POINTS
    assert files.digest[0] != 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "the file is empty"),
        (" \n\n", "the file is empty"),
        ("1 2\n3 4\n", "2 point(s), a closed outline needs 3"),
        ("1 2\n3 4\n1 2\n", "2 point(s), a closed outline needs 3"),
        ("1 2\n", "1 point(s), a closed outline needs 3"),
        ("1 2\n3\n5 6\n", "line 2: 1 value(s), 2 are needed (column row)"),
        ("1 2 3 4\n5 6\n7 8\n", "line 1: 4 value(s), 2 are needed (column row)"),
        ("1,50 2,50\n", "line 1: 4 value(s), 2 are needed (column row)"),
        ("1,,2\n3 4\n", "line 1: 3 value(s), 2 are needed (column row)"),
        ("1 2\n\nx y\n", "line 3: value 1 is not a number"),
        ("1 2\r\n3 4\r\n5 b\r\n", "line 3: value 2 is not a number"),
        ("1 2\n3 nan\n5 6\n", "line 2: value 2 is not finite"),
        ("1 2\n3 4\ninf 6\n", "line 3: value 1 is not finite"),
        ("1 2\n3 4\n1e999 6\n", "line 3: value 1 is not finite"),
        ("1, 2,\n", "line 1: 3 value(s), 2 are needed (column row)"),
        ("1,\n", "line 1: value 2 is empty, a number is needed"),
        ("1\\2\n", "line 1: 1 value(s), 2 are needed (column row)"),
        ("\0\0", "line 1: 1 value(s), 2 are needed (column row)"),
        ("1 2\n3 -2147483649\n5 6\n", "line 2: value 2 is beyond any image (limit 2147483648)"),
        ("1 2\n8e307 4\n5 6\n", "line 2: value 1 is beyond any image (limit 2147483648)"),
        ("1 2\n3 4\nDOE JOHN\n", "line 3: value 1 is not a number"),
    ],
)
def test_a_bad_outline_is_an_error_with_its_line(
    tmp_path: Path, content: str, message: str
) -> None:
    """The error of a file says what is wrong and where; the file gives no points but a digest."""
    files = read_contour_files([write(tmp_path / "a.txt", content)])

    assert files.errors == ((0, message),)
    assert files.offsets.tolist() == [0, 0]
    assert files.digest[0] != 0


@pytest.mark.usefixtures("no_plain_reader")
def test_the_largest_coordinates_are_read(tmp_path: Path) -> None:
    """Up to the limit, of either sign, the kernel takes the outline itself."""
    files = read_contour_files([write(tmp_path / "a.txt", "-2147483648 2147483648\n1 2\n3 5\n")])

    assert ring(files, 0) == [[-(2.0**31), 2.0**31], [1.0, 2.0], [3.0, 5.0]]


@given(st.text("DOE 19.,\n\\x", max_size=30))
def test_an_error_says_nothing_of_what_the_file_says(junk: str) -> None:
    """Every message is one of a few sentences; numbers in it are counts and places."""
    sentence = (
        r"the file is empty|\d+ point\(s\), a closed outline needs 3"
        r"|line \d+: \d+ value\(s\), 2 are needed \(column row\)"
        r"|line \d+: value [12] is (not a number|not finite|empty, a number is needed"
        r"|beyond any image \(limit 2147483648\))"
    )
    _, error = plain_contour(junk.encode())

    assert not error or re.fullmatch(sentence, error)


def test_what_cannot_be_read_is_an_error_without_a_path(tmp_path: Path) -> None:
    """A missing file, a folder, a pipe (which must not hang) and a huge file are refused."""
    huge = tmp_path / "huge.txt"
    with huge.open("wb") as file:
        file.truncate(Limits().contour_bytes + 1)
    os.mkfifo(tmp_path / "pipe.txt")
    paths = [str(tmp_path / "gone.txt"), str(tmp_path), str(tmp_path / "pipe.txt"), str(huge)]
    files = read_contour_files(paths)

    assert files.errors == (
        (0, "cannot be read: No such file or directory"),
        (1, "not a regular file"),
        (2, "not a regular file"),
        (3, "too large for a contour file: 16777217 bytes, limit 16777216"),
    )
    assert files.digest.tolist() == [0, 0, 0, 0]
    assert files.offsets.tolist() == [0, 0, 0, 0, 0]


def test_errors_do_not_disturb_their_neighbours(tmp_path: Path) -> None:
    """Points, digests and errors of a mixed batch stay with their files."""
    contents = [
        TRIANGLE,
        "1 2\n",
        "0 0\n0 9\n9 9\n9 0\n",
        "word",
        "7 7\n8 7\n8 8.123456789012345678901\n",
    ]
    paths = [write(tmp_path / f"{k}.txt", content) for k, content in enumerate(contents)]
    files = read_contour_files([*paths, str(tmp_path / "gone.txt"), paths[0]])

    assert [index for index, _ in files.errors] == [1, 3, 5]
    assert files.offsets.tolist() == [0, 3, 3, 7, 7, 10, 10, 13]
    assert ring(files, 2) == [[0.0, 0.0], [0.0, 9.0], [9.0, 9.0], [9.0, 0.0]]
    assert ring(files, 4)[2] == [8.0, 8.123456789012345678901]
    assert ring(files, 6) == TRIANGLE_POINTS
    assert files.digest[0] == files.digest[6]
    assert len(set(files.digest.tolist())) == 6


def test_no_files_are_no_rings() -> None:
    """An empty batch is possible."""
    files = read_contour_files([])

    assert files.points_column_row.shape == (0, 2)
    assert files.offsets.tolist() == [0]
    assert files.errors == ()


@pytest.mark.usefixtures("no_plain_reader")
def test_large_files_grow_the_buffers(tmp_path: Path) -> None:
    """Files beyond the first buffers come out whole, and without help from Python."""
    rng = np.random.default_rng(0)
    points = rng.uniform(0, 512, (40_000, 2)).round(2)
    lines = [f"{x} {y}\n" for x, y in points.tolist()]
    paths = [
        write(tmp_path / f"{k}.txt", "".join(lines[start:stop]))
        for k, (start, stop) in enumerate([(0, 9_000), (9_000, 9_003), (9_003, 40_000)])
    ]
    files = read_contour_files(paths)

    assert files.errors == ()
    assert files.offsets.tolist() == [0, 9_000, 9_003, 40_000]
    assert np.array_equal(files.points_column_row, points)


good_lines = st.builds(
    lambda x, y, separator: x + separator + y,
    spellings_of(st.floats(-(2.0**31), 2.0**31)),
    spellings_of(coordinates),
    st.sampled_from([b" ", b"\t", b",", b" , ", b"  "]),
)
odd_lines = st.sampled_from(
    [
        b"",
        b" ",
        b"1 2 3",
        b"nan 1",
        b"x",
        b"1,",
        b"1 2 ",
        b",1 2",
        b"1;2",
        b"1 2,",
        b"1 1e400",
        b"1 -3e9",
    ]
)


@given(
    st.lists(
        st.tuples(
            st.booleans(),
            st.lists(st.one_of(good_lines, good_lines, good_lines, odd_lines), max_size=8),
            st.sampled_from([b"\n", b"\r\n", b"\r"]),
            st.booleans(),
        ),
        min_size=1,
        max_size=4,
    )
)
def test_kernel_and_plain_twin_agree_on_any_file(
    tmp_path_factory: pytest.TempPathFactory,
    contents: list[tuple[bool, list[bytes], bytes, bool]],
) -> None:
    """Points, digests and errors are those of the plain reader, whatever the files hold."""
    folder = tmp_path_factory.getbasetemp()
    raws = [
        (b"\xef\xbb\xbf" if mark else b"") + end.join(lines) + (end if ended else b"")
        for mark, lines, end, ended in contents
    ]
    paths = [write(folder / f"twin{k}.txt", raw) for k, raw in enumerate(raws)]
    files = read_contour_files(paths)
    expected = [plain_contour(raw) for raw in raws]

    assert files.errors == tuple((k, error) for k, (_, error) in enumerate(expected) if error)
    for k, (points, _) in enumerate(expected):
        assert bits(ring(files, k)) == bits(points)


@given(st.lists(st.tuples(coordinates, coordinates), min_size=3, max_size=20, unique=True))
def test_plain_twin_reads_what_was_written(points: list[tuple[float, float]]) -> None:
    """The plain reader gives back the floats that repr wrote."""
    raw = "".join(f"{x!r} {y!r}\n" for x, y in points).encode()

    assert bits(parse_contour(raw)) == bits(points)


def test_without_posix_everything_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the C library cannot be called, plain Python gives equal results."""
    contents = [TRIANGLE, "1 2\n", "", "3 4\n5 6\n7 8\n3 4\n"]
    paths = [write(tmp_path / f"{k}.txt", content) for k, content in enumerate(contents)]
    paths.append(str(tmp_path / "gone.txt"))
    fast = read_contour_files(paths)
    monkeypatch.setattr(posix, "AVAILABLE", False)
    slow = read_contour_files(paths)

    assert np.array_equal(fast.points_column_row, slow.points_column_row)
    assert np.array_equal(fast.offsets, slow.offsets)
    assert np.array_equal(fast.digest, slow.digest)
    assert fast.errors == slow.errors


@pytest.mark.usefixtures("no_plain_reader")
def test_real_contours_equal_what_numpy_reads(shared_data: Path) -> None:
    """All 142 contours of the real cohort, against loadtxt and the published counts and areas."""
    cohort = shared_data / "sunnybrook_arterys"
    with (cohort / "expected_areas.csv").open(newline="") as file:
        expected = list(csv.DictReader(file))
    paths = [
        str(
            cohort / "final_data" / "contourfiles" / row["original"] / f"{row['kind']}-contours"
            f"/IM-0001-{int(row['image']):04d}-{row['kind']}contour-manual.txt"
        )
        for row in expected
    ]
    files = read_contour_files(paths)

    assert len(paths) == 142
    assert files.errors == ()
    for k, (path, row) in enumerate(zip(paths, expected, strict=True)):
        points = np.array(ring(files, k))
        written = np.loadtxt(path)
        closed = int(row["first_eq_last"])
        assert len(points) == int(row["points"]) - closed
        assert np.array_equal(points, written[: len(written) - closed])
        x, y = points.T
        shoelace = 0.5 * abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1)))
        assert shoelace == float(row["shoelace_px"])
    # Nine outer contours of one patient are byte copies of another's.
    assert len(set(files.digest.tolist())) == 142 - 9


# --------------------------------------------------------------------------------------- digest


@given(st.binary(max_size=40), st.data())
def test_digest_sees_every_changed_byte(raw: bytes, data: st.DataObject) -> None:
    """Equal bytes have equal digests; one changed byte, or one more, changes it."""
    changed = bytearray(raw + b"\0")
    place = data.draw(st.integers(0, len(raw)))
    changed[place] ^= data.draw(st.integers(1, 255))
    values = [
        int(digest_bytes(np.frombuffer(bytearray(b), np.uint8)))
        for b in (raw, raw, raw + b"\0", changed)
    ]

    assert values[0] == values[1] != 0
    assert len(set(values)) == 3


def test_digest_has_no_easy_collisions() -> None:
    """The same bits flipped in two words, and swapped words, do not cancel out."""
    rng = random.Random(0)
    raw = bytes(rng.randrange(256) for _ in range(64))
    variants = {raw}
    for first in range(8):
        for second in range(first):
            words = [raw[8 * k : 8 * k + 8] for k in range(8)]
            words[first], words[second] = words[second], words[first]
            variants.add(b"".join(words))
            for bit in range(64):
                number = int.from_bytes(raw, "little")
                number ^= 1 << (64 * first + bit) ^ 1 << (64 * second + bit)
                variants.add(number.to_bytes(64, "little"))
    digests = {int(digest_bytes(np.frombuffer(bytearray(b), np.uint8))) for b in variants}

    assert len(digests) == len(variants)


# ---------------------------------------------------------------------------------------- posix


def test_posix_kernels_read_files_like_python(tmp_path: Path) -> None:
    """Size and any window of a file, whatever characters its path has."""
    content = bytes(range(256)) * 50
    paths = [write(tmp_path / name, content[k:]) for k, name in enumerate(["a", "ü ñ 漢"])]
    packed, starts = posix.pack_paths(paths)
    for k, start in enumerate(starts.tolist()):
        descriptor = posix.open_read_only(packed, start)
        buffer = np.zeros(len(content) + 10, np.uint8)
        assert posix.file_size(descriptor) == len(content) - k
        assert posix.read_at(descriptor, buffer, len(buffer), 0) == len(content) - k
        assert buffer[: len(content) - k].tobytes() == content[k:]
        assert posix.read_at(descriptor, buffer, 7, 100) == 7
        assert buffer[:7].tobytes() == content[k + 100 : k + 107]
        assert posix.read_at(descriptor, buffer, 7, len(content)) == 0
        assert posix.read_at(descriptor, buffer[:5], 7, 0) == 5
        assert posix.close(descriptor) == 0
        assert posix.read_at(descriptor, buffer, 7, 0) == -1


def test_posix_kernels_refuse_what_is_no_file(tmp_path: Path) -> None:
    """A missing file cannot be opened; a pipe opens without a writer and has no size."""
    os.mkfifo(tmp_path / "pipe")
    packed, starts = posix.pack_paths([str(tmp_path / "gone"), str(tmp_path / "pipe")])
    descriptor = posix.open_read_only(packed, starts[1])

    assert posix.open_read_only(packed, starts[0]) == -1
    assert posix.file_size(descriptor) < 0
    assert posix.close(descriptor) == 0


def test_packed_paths_are_what_was_given() -> None:
    """Paths come back from their offsets; a NUL inside one is refused."""
    paths = ["a", "", "b/ü", "c\udce9d"]
    packed, starts = posix.pack_paths(paths)
    raw = packed.tobytes()

    assert [os.fsdecode(raw[start : raw.index(0, start)]) for start in starts] == paths
    assert posix.pack_paths([])[1].shape == (0,)
    with pytest.raises(ValueError, match="a path holds a NUL character"):
        posix.pack_paths(["a", "b\0c"])
