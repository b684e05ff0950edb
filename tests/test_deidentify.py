"""De-identification: what may pass, what stands in its place, and that nothing else is there."""

import base64
import hashlib
import hmac
import json
import os
import re
import stat
from datetime import date, timedelta

import h5py
import numpy as np
import pydicom
import pytest
import written
import zarr
from hypothesis import given
from hypothesis import strategies as st
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset
from pydicom.filewriter import write_file_meta_info
from pydicom.sequence import Sequence
from pydicom.uid import DeflatedExplicitVRLittleEndian

from parallel_dicomseg.deidentify import (
    Policy,
    class_uid,
    cleaned,
    conceal_paths,
    hashed_path,
    keyed_name,
    policy_of,
    pseudonyms,
    public_headers,
    read_or_make_key,
    shift_date,
    shift_days,
)
from parallel_dicomseg.errors import ConfigurationError
from parallel_dicomseg.records import ConvertOptions, HeaderColumn, Problem, Reason
from parallel_dicomseg.store import mirror_to_zarr, open_dataset, verify_file
from parallel_dicomseg.store.headers import full_header, plain_header

KEY = bytes(range(32))
OTHER_KEY = bytes(32)

names = st.lists(st.sampled_from([b"", b"a", b"b", b"A", b"JOHN", b"1.2.3", b"zz"]), max_size=12)


# --- names ---------------------------------------------------------------------------------------


@given(names)
def test_running_numbers_count_by_first_appearance(some):
    """As a dictionary that is filled while reading gives them; what is empty stays empty."""
    seen = {}
    for name in some:
        if name:
            seen.setdefault(name, len(seen) + 1)
    width = len(str(len(seen)))

    found = pseudonyms(np.array(some, "S8"), "study", Policy())

    assert found.tolist() == [f"study-{seen[n]:0{width}d}".encode() if n else b"" for n in some]


@given(names)
def test_keyed_names_are_hmacs(some):
    """RFC 2104 and RFC 4648 by the standard library, name by name, in any order of the names."""

    def expected(name):
        digest = hmac.new(KEY, b"patient\0" + name, hashlib.sha256).digest()
        return b"patient-" + base64.b32encode(digest)[:16].lower() if name else b""

    found = pseudonyms(np.array(some, "S8"), "patient", Policy(key=KEY))

    assert found.tolist() == [expected(name) for name in some]


def test_keyed_names_depend_on_the_key_and_on_what_they_name():
    """Nobody without the key can make them, and a study is not its patient."""
    made = {
        keyed_name(b"x", kind, key) for kind in ("patient", "study") for key in (KEY, OTHER_KEY)
    }

    assert len({name.split(b"-")[1] for name in made}) == 4
    assert all(re.fullmatch(rb"(patient|study)-[a-z2-7]{16}", name) for name in made)


def test_kept_names_are_kept():
    """Not even copied."""
    some = np.array([b"DOE", b"ROE"])

    assert pseudonyms(some, "patient", Policy(keep_identity=True)) is some


# --- dates ---------------------------------------------------------------------------------------

days = st.dates(date(1900, 1, 1), date(2100, 12, 31))


@given(days, days, st.binary(max_size=8))
def test_dates_of_a_patient_keep_their_distance(one, other, patient):
    """Both move by as many days, back by at least one, and stay dates."""
    shift = shift_days(patient, KEY)
    moved = [shift_date(day.strftime("%Y%m%d").encode(), shift).decode() for day in (one, other)]
    found = [date.fromisoformat(text) for text in moved]

    assert -3650 <= shift <= -1
    assert found[1] - found[0] == other - one
    assert found[0] == one + timedelta(shift)


def test_patients_and_keys_shift_differently():
    """A known date of one patient uncovers no other patient."""
    assert len({shift_days(b"%d" % k, KEY) for k in range(50)}) > 40
    assert shift_days(b"1", KEY) != shift_days(b"1", OTHER_KEY)


@pytest.mark.parametrize(
    "text",
    [b"00000000", b"20010229", b"2001", b"2001.02.03", b"", b"JOHN", b"00010101", b"\xb2" * 8],
)
def test_what_is_no_date_is_dropped(text):
    """Also dates that would be before the year 1."""
    assert shift_date(text, -400) == b""


# --- attributes ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "vr", "kept"),
    [
        (b"ORIGINAL\\PRIMARY\\ AXIAL ", "CS", b"ORIGINAL\\PRIMARY\\AXIAL"),
        (b"FAST_CARD 3D", "CS", b"FAST_CARD 3D"),
        (b"Doe^John", "CS", b""),
        (b"A" * 17, "CS", b""),
        (b" 2.50 ", "DS", b"2.50"),
        (b"-1.5e-3\\\\7", "DS", b"-1.5e-3\\\\7"),
        (b"0,5", "DS", b""),
        (b"nan", "DS", b""),
        (b"DOE", "DS", b""),
        (b"+3", "IS", b"+3"),
        (b"3.0", "IS", b""),
        (b"12\\DOE", "IS", b""),
        (b"20010203", "DA", b""),
        (b"DOE", "LO", b""),
        (b"1.2.3", "UI", b""),
        (b"", "CS", b""),
    ],
)
def test_only_values_that_are_what_their_vr_says_are_kept(text, vr, kept):
    """A name in the place of a number or a code is dropped."""
    assert cleaned(text, vr) == kept


def test_only_listed_attributes_pass():
    """Without a key no dates; kept identity lets everything through."""
    columns = written.headers()
    patient = written.slices().patient_id
    allowed = {"EchoTime": "DS", "ImageType": "CS", "StudyDate": "DA", "PatientName": "PN"}

    def passed(policy):
        return [k for k, _ in public_headers(columns.items(), patient, allowed, policy)]

    assert passed(Policy()) == ["ImageType", "EchoTime"]
    assert passed(Policy(key=KEY)) == ["ImageType", "EchoTime"]
    assert passed(Policy(key=KEY, shift_dates=True)) == ["StudyDate", "ImageType", "EchoTime"]
    assert passed(Policy(keep_identity=True)) == list(columns)


rows = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3)), min_size=1, max_size=10)


@given(rows)
def test_dates_are_shifted_row_by_row(cases):
    """The column of shifted dates equals a loop over its rows."""
    values = [b"20010203", b"", b"19991231", b"garbage"]
    patients = [b"a", b"b", b"c"]
    column = HeaderColumn(np.array(values), np.array([v for _, v in cases], np.int32))
    patient = np.array([patients[p] for p, _ in cases])
    policy = Policy(key=KEY, shift_dates=True)

    ((_, found),) = public_headers([("StudyDate", column)], patient, {"StudyDate": "DA"}, policy)

    expected = [shift_date(values[v], shift_days(patients[p], KEY)) for p, v in cases]
    assert found.values[found.code].tolist() == expected


# --- the key -------------------------------------------------------------------------------------


def test_a_key_is_made_once_for_its_owner_alone(tmp_path):
    """Mode 600 whatever the umask, a comment for whoever finds it, 32 bytes, the same again."""
    path = tmp_path / "key"
    before = os.umask(0)
    try:
        key = read_or_make_key(path)
    finally:
        os.umask(before)

    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert len(key) == 32
    assert read_or_make_key(path) == key
    assert path.read_text().startswith("# ")
    assert read_or_make_key(tmp_path / "other") != key


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o622])
def test_a_key_that_others_may_use_is_refused(tmp_path, mode):
    """The message says how to mend it."""
    path = tmp_path / "key"
    read_or_make_key(path)
    path.chmod(mode)

    with pytest.raises(ConfigurationError, match=rf"mode {mode:o}, .* chmod 600"):
        read_or_make_key(path)


@pytest.mark.parametrize(
    "text", ["", "# comment only\n", "0123\n", "x" * 64, f"{'0' * 64}\n{'1' * 64}\n", "0" * 66]
)
def test_what_is_no_key_is_refused(tmp_path, text):
    """Another file, or one that was cut short."""
    path = tmp_path / "key"
    path.write_text(text)
    path.chmod(0o600)

    with pytest.raises(ConfigurationError, match="is no key: one line of 64 hexadecimal digits"):
        read_or_make_key(path)


def test_a_key_is_a_file_apart_from_the_data(tmp_path):
    """No directory, no pipe, not below the data, not below a folder that is not there."""
    data = tmp_path / "data"
    data.mkdir()
    os.mkfifo(tmp_path / "pipe", 0o600)
    link = tmp_path / "link"
    link.symlink_to(data)

    for path, words in (
        (data, "no regular file"),
        (tmp_path / "pipe", "no regular file"),
        (tmp_path / "gone" / "key", "cannot be made: No such file"),
        (data / "key", "lies in .*data"),
        (link / "key", "lies in .*data"),
    ):
        with pytest.raises(ConfigurationError, match=f"key file .*{words}"):
            read_or_make_key(
                path, apart_from=[tmp_path / "data" / "."] if "key" in path.name else ()
            )
    assert not list(data.iterdir())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (ConvertOptions(dates="shift"), "needs a key_file"),
        (ConvertOptions(dates="keep"), "dates is 'keep', it can be drop, shift"),
        (ConvertOptions(keep_identity=True, key_file="key"), "keep_identity leaves names"),
        (ConvertOptions(keep_identity=True, dates="shift"), "keep_identity leaves names"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options, words):
    """Before any key is made."""
    with pytest.raises(ConfigurationError, match=words):
        policy_of(options)


def test_options_become_a_policy_that_does_not_show_its_key(tmp_path):
    """Its words for the file follow from it."""
    options = ConvertOptions(key_file=str(tmp_path / "key"), dates="shift", hash_paths=True)
    policy = policy_of(options)

    assert policy.key == read_or_make_key(tmp_path / "key")
    assert policy.key.hex() not in repr(policy)
    assert repr(policy.key) not in repr(policy)
    assert (policy.pseudonyms, policy.dates) == ("keyed-hash", "shifted")
    assert (Policy().pseudonyms, Policy().dates) == ("running-number", "dropped")
    kept = policy_of(ConvertOptions(keep_identity=True))
    assert (kept.pseudonyms, kept.dates) == ("kept", "kept")


# --- paths ---------------------------------------------------------------------------------------


def test_paths_become_hashes_that_say_only_the_kind_of_file():
    """The same path has the same hash; a name behind a point is no kind of file."""
    made = hashed_path("DOE_JOHN/1.DCM", None)

    assert re.fullmatch(r"path-[a-z2-7]{12}\.dcm", made)
    assert made[5:17] == (
        base64.b32encode(hashlib.sha256(b"DOE_JOHN/1.DCM").digest())[:12].decode().lower()
    )
    assert hashed_path("DOE_JOHN/1.DCM", KEY) not in {
        made,
        hashed_path("DOE_JOHN/1.DCM", OTHER_KEY),
    }
    for path in ("scans/IM.JOHN", "1.2.3.19700101", "DOE", "."):
        assert re.fullmatch(r"path-[a-z2-7]{12}", hashed_path(path, KEY))
    assert hashed_path("caf\udce9.txt", None).endswith(".txt")


def test_sentences_name_no_path_either():
    """Other files, folders and parts of paths are replaced, the longest first; words stay."""
    problems = [
        Problem(
            "DOE/a (1)/IM-1.dcm", Reason.BAD_CONTOUR, "of 12 x 13; see ROE JANE/IM-2.dcm, IM-2.dcm"
        ),
        Problem("DOE", Reason.STRAY_FILE, "'a (1)' of DOE/a (1) is stray-file 1.dcm"),
        Problem("x/12/y", Reason.STRAY_FILE, "12 files of 12345 bytes; (ROE JANE) again"),
    ]

    found = conceal_paths(problems, [b"ROE JANE/IM-2.dcm"], Policy(hash_paths=True))
    plain = conceal_paths(problems, [b"ROE JANE/IM-2.dcm"], Policy())

    def h(path):
        return hashed_path(path, None)

    assert [problem.path for problem in found] == [h(problem.path) for problem in problems]
    assert found[0].detail == f"of 12 x 13; see {h('ROE JANE/IM-2.dcm')}, {h('IM-2.dcm')}"
    assert found[1].detail == f"'{h('a (1)')}' of {h('DOE/a (1)')} is stray-file 1.dcm"
    assert found[2].detail == f"12 files of 12345 bytes; ({h('ROE JANE')}) again"
    assert plain == tuple(problems)


def test_words_of_the_sentences_stay_though_a_folder_is_named_so():
    """A folder `image` must not turn every sentence about an image into a riddle."""
    problem = Problem("DOE/image/1.dcm", Reason.STRAY_FILE, "no image; see DOE/image/1.dcm")

    (found,) = conceal_paths([problem], (), Policy(hash_paths=True))

    assert found.detail == f"no image; see {hashed_path('DOE/image/1.dcm', None)}"


@given(st.lists(st.text("aB/ .(-ü1", max_size=9), max_size=5), st.text("aB/ .(-ü1", max_size=40))
def test_no_known_path_is_left_in_any_sentence(paths, sentence):
    """Whatever letters and marks a path is made of, as far as it has four from end to end."""
    problems = [Problem(path, Reason.STRAY_FILE, sentence) for path in paths]

    for problem in conceal_paths(problems, (), Policy(hash_paths=True)):
        words = re.sub(r"path-[a-z2-7]{12}", "#", problem.detail)
        for path in paths:
            core = re.search(r"\w.{2,}\w", path)
            found = core and re.search(rf"(?<!\w){re.escape(core[0])}(?!\w)", words)
            assert not found


# --- the file ------------------------------------------------------------------------------------

PROBLEMS = (Problem("DOE_folder/7.dcm", Reason.STRAY_FILE, "beside DOE_folder/8.dcm"),)
POLICIES = {
    "numbers": Policy(hash_paths=True),
    "keyed": Policy(key=KEY, hash_paths=True),
    "shifted": Policy(key=KEY, shift_dates=True, hash_paths=True),
}


def everything_in(path):
    """All names, attributes and values of an HDF5 file, as one text."""
    found = []

    def look(name, item):
        found.append(name)
        found.extend(f"{key} {np.asarray(value).tolist()}" for key, value in item.attrs.items())
        if isinstance(item, h5py.Dataset) and item.dtype.kind in "SO":
            found.append(str(np.asarray(item).tolist()))

    with h5py.File(path) as file:
        look("/", file)
        file.visititems(look)
    return "\n".join(found)


def everything_in_mirror(path):
    """The same of a zarr group, and the bytes of its files."""
    group = zarr.open_group(str(path), mode="r")
    values = [str(a[...].tolist()) for _, g in group.groups() for _, a in g.arrays()]
    raw = [file.read_bytes().decode("latin-1") for file in path.rglob("*") if file.is_file()]
    return "\n".join([*values, *raw, *map(str, path.rglob("*"))])


@pytest.mark.parametrize("policy", POLICIES)
def test_no_identity_of_the_input_is_in_the_output(policy, tmp_path):
    """Neither in names, attributes and values nor in the bytes, of the file and of its mirror."""
    path, mirror = tmp_path / "x.h5", tmp_path / "x.zarr"
    summary = written.write(
        path,
        headers=written.headers(),
        identity=POLICIES[policy],
        problems=PROBLEMS,
        plan=written.layout(codec="none"),
    )
    assert verify_file(path).problems == ()
    with open_dataset(path) as dataset:
        mirror_to_zarr(dataset, mirror)
        shown = [dataset.header(row) for row in range(10)]

    texts = {
        "file": everything_in(path),
        "bytes": path.read_bytes().decode("latin-1"),
        "mirror": everything_in_mirror(mirror),
        "headers": str(shown),
        "summary": str(summary).replace(str(tmp_path), ""),
    }
    left = [(k, i) for k, text in texts.items() for i in written.IDENTITIES if i in text]
    assert left == []


def test_kept_identity_is_all_there(tmp_path):
    """The same scan finds each of them, so it can find one."""
    path = tmp_path / "x.h5"
    summary = written.write(
        path,
        headers=written.headers(),
        plan=written.layout(keep_identity=True),
        root=str(tmp_path),
        problems=PROBLEMS,
    )

    text = everything_in(path)
    assert [identity for identity in written.IDENTITIES if identity not in text] == []
    # Nothing is at the paths of the table: what the scan collected is kept, and that is said.
    reasons = [problem.reason for problem in summary.problems]
    assert reasons == [Reason.STRAY_FILE, Reason.UNREADABLE_FILE, Reason.UNREADABLE_FILE]
    assert "cannot be read again" in summary.problems[1].detail
    assert verify_file(path).problems == ()


def test_equal_names_are_equal_in_two_files_with_one_key(tmp_path):
    """Cohorts that were converted at different times fit together; numbers would not."""
    columns = ("patient_id", "study_instance_uid", "series_instance_uid", "sop_instance_uid")
    for name, table in (("a", written.slices()), ("b", written.slices().take(np.arange(4, 9)))):
        policy = Policy(key=KEY, shift_dates=True)
        columns_of_b = {k: v.take(np.arange(4, 9)) for k, v in written.headers().items()}
        headers = written.headers() if name == "a" else columns_of_b
        written.write(tmp_path / name, table=table, identity=policy, headers=headers)

    with open_dataset(tmp_path / "a") as a, open_dataset(tmp_path / "b") as b:
        for column in columns:
            assert a.column(column)[4:9].tolist() == b.column(column).tolist()
        assert [a.header(row)["StudyDate"] for row in range(4, 9)] == [
            b.header(row)["StudyDate"] for row in range(5)
        ]


def test_how_identity_was_removed_is_said(tmp_path):
    """In the attributes of the file, and in every header as PS3.15 E.1.1 asks."""
    said = {}
    for name, policy in POLICIES.items():
        written.write(tmp_path / name, identity=policy)
        with open_dataset(tmp_path / name) as dataset:
            attributes = dataset.attributes
            header = dataset.header(0)
            said[name] = (
                attributes["pseudonyms"],
                attributes["dates"],
                attributes["hashed_paths"],
                header["PatientIdentityRemoved"],
                header["LongitudinalTemporalInformationModified"],
            )

    assert said == {
        "numbers": ("running-number", "dropped", True, "YES", "REMOVED"),
        "keyed": ("keyed-hash", "dropped", True, "YES", "REMOVED"),
        "shifted": ("keyed-hash", "shifted", True, "YES", "MODIFIED"),
    }


# --- the full header, where identity is kept -----------------------------------------------------


def odd_image(path):
    """An image with a private tag, nested and large values, and one that is no number."""
    dataset = pydicom.dcmread(get_testdata_file("CT_small.dcm"))
    dataset.PatientName = "Müller^Jörg"
    dataset.SpecificCharacterSet = "ISO_IR 100"
    dataset.add_new(0x00091010, "UN", b"private")
    dataset.add_new(0x00091011, "OB", b"x" * 1026)
    item = Dataset()
    item.StudyDescription = "inside"
    item.add_new(0x00091012, "OB", b"y" * 1026)
    dataset.ReferencedImageSequence = Sequence([item])
    dataset.add_new(0x00189087, "FD", float("nan"))
    dataset.save_as(path)
    return dataset


def test_the_full_header_is_what_pydicom_reads(tmp_path):
    """All but pixels, values of more than 1 KiB, and what JSON cannot say; text is UTF-8."""
    path = tmp_path / "DOE_folder" / "0.dcm"
    path.parent.mkdir()
    original = odd_image(path)

    text = full_header(str(path))

    json.loads(text, parse_constant=pytest.fail)
    found = pydicom.Dataset.from_json(text)
    assert str(found.PatientName) == "Müller^Jörg"
    assert found.SpecificCharacterSet == "ISO_IR 192"
    assert found[0x00091010].value == b"private"
    assert found.ReferencedImageSequence[0].StudyDescription == "inside"
    assert found.SliceLocation == original.SliceLocation
    missing = {int(tag) for tag in original.keys() - found.keys()}
    assert {0x00091011, 0x00189087, 0x7FE00010} <= missing
    assert 0x00091012 not in found.ReferencedImageSequence[0]
    header = plain_header(text)
    assert header["PatientName"] == "Müller^Jörg"
    assert header["ReferencedImageSequence"] == [{"StudyDescription": "inside"}]
    assert "00091010" in header


def test_the_full_header_is_in_the_file_when_identity_is_kept(tmp_path):
    """Of the first image of each series; varying attributes come from each slice."""
    (tmp_path / "DOE_folder").mkdir()
    for row in (0, 5):
        odd_image(tmp_path / "DOE_folder" / f"{row}.dcm")
    path = tmp_path / "x.h5"
    summary = written.write(
        path, headers=written.headers(), identity=Policy(keep_identity=True), root=str(tmp_path)
    )

    assert summary.problems == ()
    assert verify_file(path).problems == ()
    with open_dataset(path) as dataset:
        assert dataset.header(7)["PatientName"] == "Müller^Jörg"
        assert dataset.header(7)["SliceLocation"] == 7.5
        assert dataset.column("source_path")[7] == b"DOE_folder/7.dcm"


def test_every_real_header_becomes_json(shared_data):
    """And none of them raises or warns; what is no DICOM file says so."""
    for path in sorted(shared_data.rglob("*.dcm"))[::40]:
        text = full_header(str(path))
        read = pydicom.dcmread(path, stop_before_pixels=True, force=True)
        assert plain_header(text).get("PatientID", "") == read.get("PatientID", "")


def test_a_file_that_is_no_image_any_more_is_an_error(tmp_path):
    """The writer turns it into a problem, whatever pydicom makes of the bytes."""
    meta = pydicom.dcmread(get_testdata_file("CT_small.dcm")).file_meta
    meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    with (tmp_path / "deflated.dcm").open("wb") as file:
        file.write(bytes(128) + b"DICM")
        write_file_meta_info(file, meta)
        file.write(b"this is no deflate stream")

    with pytest.raises(ValueError, match="error"):
        full_header(str(tmp_path / "deflated.dcm"))
    with pytest.raises(OSError, match="No such file"):
        full_header(str(tmp_path / "gone.dcm"))


def test_classes_are_shown_and_instances_are_not():
    """What the standard registers, and makers' own, which are short; nothing that may be of one
    image, and no words.
    """
    shown = ("1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.113619.5.2", "1.2.3.4", "")
    hidden = ("2.25.123456789012345678901234567890", "DOE^JOHN", "1.2.840.10008.DOE")

    assert [class_uid(uid) for uid in shown] == [*shown]
    assert {class_uid(uid) for uid in hidden} == {"private"}
