"""HDF5 files from elsewhere: refused with a reason, before a byte of another file is read."""

import json
import os
import pickle
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import h5py
import numpy as np
import pytest
import written

from parallel_dicomseg.errors import LayoutError, ParallelDicomSegError
from parallel_dicomseg.export import export_nifti
from parallel_dicomseg.loader import BatchLoader
from parallel_dicomseg.report.inspection import inspect_file
from parallel_dicomseg.store import mirror_to_zarr, open_dataset, verify_file

CANARY = 77
SHAPE = (10, 40, 56)


# --- attacks: what takes the place of a dataset -------------------------------------------------


def external_link(file, name, target):
    """The object is in another file."""
    file[name] = h5py.ExternalLink(target, "/canary")


def soft_link_out(file, name, target):
    """A link within the file to a link out of it."""
    file["door"] = h5py.ExternalLink(target, "/canary")
    file[name] = h5py.SoftLink("/door")


def group_link(file, name, target):
    """The group is in another file."""
    if "/" in name:
        del file[name.split("/")[0]]
        file[name.split("/")[0]] = h5py.ExternalLink(target, "/")
    else:
        external_link(file, name, target)


def external_storage(file, name, target):
    """The values are bytes of another file."""
    file.create_dataset(name, SHAPE, "u1", external=[(target, 0, h5py.h5f.UNLIMITED)])


def view_elsewhere(file, name, target):
    """A view of a dataset of another file."""
    layout = h5py.VirtualLayout(SHAPE, "u1")
    layout[:] = h5py.VirtualSource(target, "canary", SHAPE, "u1")
    file.create_virtual_dataset(name, layout)


def growing_view(file, name, target):
    """A view without a limit: its shape is looked up in the other file."""
    created = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    space = h5py.h5s.create_simple(SHAPE, (h5py.h5s.UNLIMITED, *SHAPE[1:]))
    space.select_hyperslab((0, 0, 0), (h5py.h5s.UNLIMITED, 1, 1), block=(1, *SHAPE[1:]))
    created.set_virtual(space, target.encode(), b"canary", space)
    h5py.h5d.create(file.id, name.encode(), h5py.h5t.NATIVE_UINT8, space, created)


def view_of_a_view(file, name, _):
    """A view whose source has a source."""
    file["pixels"] = np.zeros(SHAPE, "u1")
    for here, source in (("between", "pixels"), (name, "between")):
        layout = h5py.VirtualLayout(SHAPE, "u1")
        layout[:] = h5py.VirtualSource(".", source, SHAPE, "u1")
        file.create_virtual_dataset(here, layout)


def texts_of_any_length(file, name, _):
    """Objects where numbers are expected."""
    file.create_dataset(name, (10,), h5py.string_dtype())


def arrays_of_any_length(file, name, _):
    """Objects where numbers are expected."""
    file.create_dataset(name, (10,), h5py.vlen_dtype(np.int32))


def references(file, name, _):
    """Pointers where numbers are expected."""
    file.create_dataset(name, (10,), h5py.ref_dtype)


def compounds(file, name, _):
    """Records where numbers are expected."""
    file.create_dataset(name, SHAPE, [("a", "i4"), ("b", "i4")])


def opaque(file, name, _):
    """Bytes that only another program knows."""
    file.create_dataset(name, SHAPE, "V8")


def unknown_filter(file, name, _):
    """A filter for which HDF5 would look for a plug-in."""
    created = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    created.set_chunk((1, *SHAPE[1:]))
    created.set_filter(307, h5py.h5z.FLAG_OPTIONAL, ())
    h5py.h5d.create(
        file.id, name.encode(), h5py.h5t.NATIVE_UINT8, h5py.h5s.create_simple(SHAPE), created
    )


def shape_bomb(file, name, _):
    """A million million slices, none of them there."""
    file.create_dataset(name, (1 << 40, *SHAPE[1:]), "u1", chunks=(1, *SHAPE[1:]))


def chunk_bomb(file, name, _):
    """One byte needs a chunk of two gigabytes."""
    file.create_dataset(name, (1 << 31,), "u1", chunks=((1 << 31) - 1,), compression="gzip")


def row_bomb(file, name, _):
    """One slice needs memory for two gigabytes."""
    file.create_dataset(name, (1, 1 << 16, 1 << 15), "u1", chunks=(1, 1 << 10, 1 << 10))


def deflate_bomb(file, name, _):
    """A chunk that says 2,240 bytes and inflates to 64 million, as HDF5 would."""
    dataset = file.create_dataset(name, SHAPE, "u1", chunks=(1, *SHAPE[1:]), compression="gzip")
    dataset.id.write_direct_chunk((0, 0, 0), zlib.compress(bytes(1 << 26)))


ATTACKS = {
    external_link: "an external link, which leads into another file",
    soft_link_out: "/door is an external link",
    group_link: "an external link",
    external_storage: "has its values in another file",
    view_elsewhere: "is a view of another file",
    growing_view: "is a view of another file",
    view_of_a_view: "is a view of the view /between",
    texts_of_any_length: "holds texts of any length",
    arrays_of_any_length: "holds values of any length",
    references: "holds references",
    compounds: "holds compounds",
    opaque: "holds opaque bytes",
    unknown_filter: "is filtered by 307",
    shape_bomb: "claims shape (1099511627776, 40, 56)",
    chunk_bomb: "has chunks of 2147483647 bytes",
    row_bomb: "has rows of 2147483648 bytes",
    deflate_bomb: "has a chunk of",
}
#: Those that make plain h5py read the other file.
READING = (external_link, soft_link_out, external_storage, view_elsewhere, growing_view)
#: Those that our own decoder meets in arrays of our files: it never inflates more than a slice.
HARMLESS = {"images": {deflate_bomb}, "masks": {deflate_bomb}}


def own(path, attack, name, target):
    """One of our files with an attack in the place of a dataset, sealed as if nothing was."""
    written.write(path, plan=written.layout(codec="none"), marks=written.marks())
    with h5py.File(path, "r+") as file:
        told = dict(file[name].attrs.items()) if name == "masks" else {}
        del file[name]
        attack(file, name, target)
        if told and isinstance(file.get(name, getlink=True), h5py.HardLink):
            masks = h5py.h5d.open(file.id, name.encode())
            for key in ("structures", "nested", "encoding", "long_name"):
                h5py.AttributeManager(h5py.Dataset(masks))[key] = told[key]


def pair(path, attack, name, target):
    """Somebody's file of images and masks, one of which is an attack."""
    with h5py.File(path, "w", libver=("v110", "v110")) as file:
        for each in ("images", "masks"):
            if each == name:
                attack(file, each, target)
            else:
                file[each] = np.zeros(SHAPE, "u1")


def read_all(path):
    """Open with our reader and read everything that it gives."""
    with open_dataset(path) as dataset:
        for group in ("table", "series", "volumes", "headers", "marks", "rejected"):
            for column in dataset.columns(group):
                dataset.column(column, group)
        return [int(dataset.masks[k].max()) for k in range(len(dataset))]


def verified(path):
    """Every problem that verify finds is one too many."""
    problems = verify_file(path).problems
    if problems:
        raise LayoutError("; ".join(problems))


def batches(path):
    """One epoch."""
    with BatchLoader(path, 4) as loader:
        return [int(batch.mask.max()) for batch in loader]


def batches_with_a_column(path):
    """One epoch with a column of the table."""
    with BatchLoader(path, 4, columns=("area",)) as loader:
        return [int(batch.mask.max()) for batch in loader]


def exported(path):
    """As NIfTI."""
    with open_dataset(path) as dataset:
        export_nifti(dataset, path.with_suffix(".nifti"))


def cases(folder):
    """All attacked files: (file, how to make it, attack, dataset, who is to refuse it)."""
    for attack in ATTACKS:
        for name in ("images", "masks", "table/area"):
            readers = [read_all, verified, inspect_file]
            readers += [batches_with_a_column] if "/" in name else [batches, exported]
            path = folder / f"own-{attack.__name__}-{name.replace('/', '-')}.h5"
            if attack not in HARMLESS.get(name, ()):
                yield path, own, attack, name, readers
        for name in ("images", "masks"):
            yield folder / f"pair-{attack.__name__}-{name}.h5", pair, attack, name, [batches]


def look(folder):
    """What each reader says of each file, printed as JSON; run in a process of its own."""
    said = {}
    for path, _, attack, _, readers in cases(Path(folder)):
        for reader in readers:
            try:
                found = f"READ {reader(path)}"
            except ParallelDicomSegError as error:
                found = str(error)
            said[f"{path.name} {reader.__name__}"] = found, ATTACKS[attack]
    sys.stdout.write(json.dumps(said))


def run_look(folder, *prefix):
    """Let `look` run in a child, which hangs if it opens the FIFO that stands for the secret."""
    target = folder / "canary"
    for path, make, attack, name, _ in cases(folder):
        make(path, attack, name, str(target))
    os.mkfifo(target)
    here = Path(__file__).parent
    ran = subprocess.run(
        [*prefix, sys.executable, "-c", f"import test_foreign; test_foreign.look({str(folder)!r})"],
        cwd=here,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(here), str(here.parent)])},
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    return json.loads(ran.stdout.splitlines()[-1])


@pytest.mark.timeout(180)
def test_hostile_files_are_refused_before_another_file_is_opened(tmp_path):
    """Each attack by each reader; opening the other file, a FIFO, would block for ever."""
    said = run_look(tmp_path)

    assert len(said) > 150
    wrong = {who: told for who, (told, words) in said.items() if words not in told}
    assert wrong == {}


@pytest.mark.timeout(400)
@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
def test_no_system_call_names_the_other_file(tmp_path):
    """The same, as the system saw it."""
    log = tmp_path / "calls"
    try:
        run_look(tmp_path, "strace", "-f", "-qq", "-e", "trace=%file", "-o", str(log))
    except AssertionError as error:
        if "ptrace" in str(error):
            pytest.skip("strace is not allowed here")
        raise

    calls = log.read_text()
    assert "own-external_link-images.h5" in calls
    assert "canary" not in calls


@pytest.mark.parametrize("attack", READING)
def test_plain_h5py_reads_the_other_file(tmp_path, attack):
    """So these are attacks, and the tests above can fail."""
    target = tmp_path / "canary"
    if attack is external_storage:
        target.write_bytes(bytes([CANARY]) * int(np.prod(SHAPE)))
    else:
        with h5py.File(target, "w") as file:
            file.create_dataset(
                "canary", data=np.full(SHAPE, CANARY, "u1"), maxshape=(None, *SHAPE[1:])
            )

    pair(tmp_path / "evil.h5", attack, "images", str(target))

    with h5py.File(tmp_path / "evil.h5") as file:
        assert file["images"][3, 2, 1] == CANARY
    with pytest.raises(LayoutError, match=r"evil.h5: .* another file"):
        batches(tmp_path / "evil.h5")


def test_links_do_not_lead_out_of_a_mirror(tmp_path):
    """Neither metadata, nor shards, nor columns; a mirror that is a link itself is one."""
    written.write(tmp_path / "a.h5")
    with open_dataset(tmp_path / "a.h5") as dataset:
        mirror_to_zarr(dataset, tmp_path / "a.zarr")
    (tmp_path / "b.zarr").symlink_to(tmp_path / "a.zarr")
    assert batches_with_a_column(tmp_path / "b.zarr") == [1, 1, 1]

    for name in ("masks/zarr.json", "images/c/0/0/0", "table/area/zarr.json", "table/area/c/0/0"):
        evil = tmp_path / "evil.zarr"
        shutil.copytree(tmp_path / "a.zarr", evil)
        (tmp_path / "secret").unlink(missing_ok=True)
        (evil / name).rename(tmp_path / "secret")
        (evil / name).symlink_to(tmp_path / "secret")
        with pytest.raises(LayoutError, match=rf"evil.zarr.*{name} leads out of the mirror"):
            batches_with_a_column(evil)
        shutil.rmtree(evil)


def test_nothing_is_unpickled(tmp_path):
    """A column of zarr version 2 whose filter is pickle, which would run a program."""
    written.write(tmp_path / "a.h5")
    with open_dataset(tmp_path / "a.h5") as dataset:
        mirror_to_zarr(dataset, tmp_path / "a.zarr")
    column = tmp_path / "a.zarr" / "table" / "area"
    shutil.rmtree(column)
    column.mkdir()
    told = {"zarr_format": 2, "shape": [10], "chunks": [10], "dtype": "|O", "fill_value": 0}
    told |= {"order": "C", "filters": [{"id": "pickle", "protocol": 5}], "compressor": None}
    (column / ".zarray").write_text(json.dumps(told))
    (column / "0").write_bytes(pickle.dumps([Trap(tmp_path / "sprung"), "|O", [10]]))

    with pytest.raises(LayoutError, match="/table/area cannot be read"):
        batches_with_a_column(tmp_path / "a.zarr")

    assert not (tmp_path / "sprung").exists()
    pickle.loads((column / "0").read_bytes())  # noqa: S301  the attack is one
    assert (tmp_path / "sprung").exists()


class Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


# --- what is not refused -------------------------------------------------------------------------


def plain(file, name, how):
    """Somebody's masks, all 1, in one of many harmless ways."""
    values = np.ones(SHAPE, "u1")
    if how == "view":
        file["values"] = values
        layout = h5py.VirtualLayout(SHAPE, "u1")
        layout[:] = h5py.VirtualSource(".", "values", SHAPE, "u1")
        file.create_virtual_dataset(name, layout)
    elif how == "soft link":
        file["deep/down/values"] = values
        file["deep/up"] = h5py.SoftLink("down")
        file[name] = h5py.SoftLink("/deep/./up/values")
    elif how == "truth values":
        file[name] = values.astype(bool)
    elif how == "plain":
        file[name] = values
    else:
        file.create_dataset(name, data=values, compression=how, fletcher32=True, shuffle=True)


@pytest.mark.parametrize("how", ["view", "soft link", "truth values", "plain", "gzip", "lzf"])
def test_files_of_others_are_read_where_nothing_leads_out(tmp_path, how):
    """Views and links within the file, and usual filters."""
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["images"] = np.zeros(SHAPE, "f4")
        plain(file, "masks", how)

    assert batches(tmp_path / "other.h5") == [1, 1, 1]


def test_links_that_go_round_end(tmp_path):
    """Soft links are followed here, a few of them."""
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["images"] = np.zeros(SHAPE, "u1")
        file["round"] = h5py.SoftLink("/masks")
        file["masks"] = h5py.SoftLink("round")

    with pytest.raises(LayoutError, match=r"other.h5: .*/round is a soft link|/masks is a soft"):
        batches(tmp_path / "other.h5")


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (np.zeros(3, "V5"), "the attribute 'x' holds opaque bytes"),
        (np.zeros(3, [("a", "i4")]), "the attribute 'x' holds compounds"),
        (np.zeros(70000, "i1"), "the attribute 'x' has 70000 values"),
    ],
)
def test_attributes_are_numbers_and_texts(tmp_path, value, words):
    """Of root and arrays, before any is read."""
    written.write(tmp_path / "a.h5")
    for place in ("/", "masks"):
        with h5py.File(tmp_path / "a.h5", "r+", libver=("v110", "v110")) as file:
            file[place].attrs["x"] = value
        for reader in (read_all, verified, inspect_file, batches):
            with pytest.raises(LayoutError, match=rf"a.h5: .*{words}"):
                reader(tmp_path / "a.h5")
        with h5py.File(tmp_path / "a.h5", "r+") as file:
            del file[place].attrs["x"]
