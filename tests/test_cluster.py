"""Conversion on a Dask cluster of separate processes, started as cluster/ starts it.

Everything runs on this machine and listens on loopback only. Workers are lost, blind or without
the package in the ways in which real ones are.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from parallel_dicomseg.cohort import scan_cohort
from parallel_dicomseg.convert import convert_cohort, warm_up
from parallel_dicomseg.errors import ConfigurationError, ConversionError, ResumableError
from parallel_dicomseg.records import Cohort, ConvertOptions, Progress
from parallel_dicomseg.schedulers import cluster as cluster_room
from parallel_dicomseg.synthetic import make_sunnybrook_cohort

dask = pytest.importorskip("dask")
distributed = pytest.importorskip("distributed")
psutil = pytest.importorskip("psutil")
yaml = pytest.importorskip("yaml")

CLUSTER = Path(__file__).resolve().parents[1] / "cluster"
START_SECONDS = 60
END_SECONDS = 5
# What is said of a cluster without workers, by the converter or, where it is faster, by Dask.
GONE = "no worker for 1 s|all workers of the Dask cluster were lost"

# A worker that was not given the package: importing it fails as if it were not installed.
WITHOUT_PACKAGE = (
    "import sys; sys.modules['parallel_dicomseg'] = None; "
    "from distributed.cli.dask_worker import main; main()"
)

# The command line, where a second is long enough for an answer.
IMPATIENT_CONVERT = """
import sys
from parallel_dicomseg import cli
from parallel_dicomseg.schedulers import cluster
cluster.WORKERS_TIMEOUT_S = 1
cli.main(["convert", sys.argv[1], "-o", "stranger.h5", "--scheduler", *sys.argv[2:]])
"""


class Processes:
    """Processes that end with the test, whatever happens."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._started: list[tuple[subprocess.Popen[bytes], Path]] = []

    def start(self, *command: str | Path, **environment: str) -> subprocess.Popen[bytes]:
        """Start a command in a process group of its own; its output goes to a file."""
        log = self.folder / f"{len(self._started)}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [str(word) for word in command],
                cwd=self.folder,
                env={**os.environ, "PYTHON": sys.executable, **environment},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._started.append((process, log))
        return process

    def wait_for(self, what: str, happened: Callable[[], bool]) -> None:
        """Wait until something has happened; fail with the output of all processes if it never."""
        give_up = time.monotonic() + START_SECONDS
        while not happened():
            ended = [process.args for process, _ in self._started if process.poll() is not None]
            if ended or time.monotonic() > give_up:
                logs = "\n".join(log.read_text() for _, log in self._started)
                pytest.fail(f"{what}: not in {START_SECONDS} s, or ended: {ended}\n{logs}")
            time.sleep(0.02)

    def scheduler(self, *options: str, **environment: str) -> str:
        """Start a scheduler; its address. Its file is scheduler.json in the folder."""
        file = self.folder / "scheduler.json"
        script = CLUSTER / "scheduler.sh"
        self.start(script, "--port", "0", "--scheduler-file", file, *options, **environment)
        return self.address()

    def address(self) -> str:
        """The address in the scheduler's file, when it has been written."""
        file = self.folder / "scheduler.json"
        # it is there before it is written
        self.wait_for("scheduler file", lambda: file.is_file() and file.stat().st_size > 0)
        address: str = json.loads(file.read_text())["address"]
        return address

    def worker(self, address: str, *options: str, **environment: str) -> subprocess.Popen[bytes]:
        """Start a worker of one thread."""
        return self.start(
            CLUSTER / "worker.sh", address, "--nthreads", "1", *options, **environment
        )

    def end(self) -> None:
        """End every process that was started, and those that it has started.

        The last first: a worker whose scheduler ends at the same time may hang for ever.
        """
        for process, _ in reversed(self._started):
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(END_SECONDS)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@contextlib.contextmanager
def processes_in(folder: Path) -> Iterator[Processes]:
    """Processes that end with the block."""
    processes = Processes(folder)
    try:
        yield processes
    finally:
        processes.end()


def wait_for_workers(address: str, count: int, **options: Any) -> None:
    """Wait until the scheduler has so many workers."""
    with distributed.Client(address, timeout=START_SECONDS, **options) as client:
        client.wait_for_workers(count, timeout=START_SECONDS)


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Processes]:
    """Processes that end with the test."""
    with processes_in(tmp_path) as started:
        yield started


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Cohort:
    """48 slices of four patients; kernels are compiled before any worker needs them."""
    warm_up()
    root = tmp_path_factory.mktemp("cluster") / "cohort"
    make_sunnybrook_cohort(root, patients=4, slices=12, rows=64, columns=64)
    return scan_cohort(root)


@pytest.fixture(scope="module")
def expected(cohort: Cohort, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The bytes of the output without any cluster."""
    return converted(cohort, tmp_path_factory.mktemp("expected"), "synchronous")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, cohort: Cohort) -> Iterator[Processes]:
    """A scheduler and two workers, as the scripts start them."""
    with processes_in(tmp_path_factory.mktemp("processes")) as started:
        address = started.scheduler()
        for _ in range(2):
            started.worker(address)
        wait_for_workers(address, 2)
        yield started


def converted(
    cohort: Cohort,
    folder: Path,
    scheduler: str,
    progress: Callable[[Progress], None] | None = None,
) -> bytes:
    """The bytes of the output that a scheduler makes."""
    output = folder / "out.h5"
    options = ConvertOptions(scheduler=scheduler, slices_per_task=1, workers=2)
    convert_cohort(cohort, output, options=options, progress=progress)
    return output.read_bytes()


def kill_at(done: int, *victims: subprocess.Popen[bytes]) -> Callable[[Progress], None]:
    """A progress callback that kills processes when so many slices are done."""

    def progress(event: Progress) -> None:
        if event.stage == "convert" and event.done == done:
            for victim in victims:
                victim.kill()
                victim.wait()

    return progress


# --- a healthy cluster


@pytest.mark.parametrize("by", ["address", "file"])
def test_cluster_makes_the_same_bytes(
    cluster: Processes, cohort: Cohort, expected: bytes, tmp_path: Path, by: str
) -> None:
    """Through an address or a scheduler file, the output equals that of one thread."""
    scheduler = cluster.address() if by == "address" else str(cluster.folder / "scheduler.json")

    assert converted(cohort, tmp_path, scheduler) == expected


def test_command_line_converts_on_a_cluster(
    cluster: Processes, cohort: Cohort, expected: bytes, tmp_path: Path
) -> None:
    """`convert --scheduler FILE` finds the cluster and makes the same bytes."""
    program = "from parallel_dicomseg.cli import main; main()"
    command = [sys.executable, "-c", program, "convert", cohort.root, "-o", "out.h5"]
    scheduler = f"--scheduler={cluster.folder / 'scheduler.json'}"

    done = subprocess.run(
        [*command, scheduler], cwd=tmp_path, capture_output=True, text=True, check=False
    )

    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out.h5").read_bytes() == expected


def test_nothing_listens_beyond_loopback(cluster: Processes) -> None:
    """Neither scheduler nor workers nor their dashboards can be reached from another machine."""
    with distributed.Client(cluster.address()) as client:
        pids = {client.run_on_scheduler(os.getpid), *client.run(os.getpid).values()}
    families = [psutil.Process(pid) for pid in pids]
    families += [process.parent() for process in families]

    listening = {
        connection.laddr.ip
        for process in families
        if process.pid != os.getpid()
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }

    assert listening == {"127.0.0.1"}


# --- clusters that are not as they should be


def test_killed_worker_changes_nothing(
    processes: Processes, cohort: Cohort, expected: bytes, tmp_path: Path
) -> None:
    """The tasks of a worker that is killed are done by the other one; the bytes are the same."""
    address = processes.scheduler()
    victim = processes.worker(address, "--no-nanny")
    processes.worker(address, "--no-nanny")
    wait_for_workers(address, 2)

    made = converted(cohort, tmp_path, address, kill_at(5, victim))

    assert victim.returncode == -signal.SIGKILL
    assert made == expected


def test_loss_of_all_workers_ends_the_run(
    processes: Processes, cohort: Cohort, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where every worker is gone for good, the run says so instead of waiting for ever."""
    monkeypatch.setattr(cluster_room, "WORKERS_TIMEOUT_S", 1)
    address = processes.scheduler()
    worker = processes.worker(address, "--no-nanny")
    wait_for_workers(address, 1)

    with pytest.raises(ResumableError, match=GONE):
        converted(cohort, tmp_path, address, kill_at(5, worker))

    assert not (tmp_path / "out.h5").exists()


def test_loss_of_the_scheduler_ends_the_run(
    processes: Processes, cohort: Cohort, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the scheduler is gone, the run says so."""
    monkeypatch.setattr(cluster_room, "WORKERS_TIMEOUT_S", 2)
    address = processes.scheduler()
    scheduler, _ = processes._started[0]
    processes.worker(address, "--no-nanny")
    wait_for_workers(address, 1)

    with pytest.raises(ResumableError, match="scheduler was lost"):
        converted(cohort, tmp_path, address, kill_at(5, scheduler))


def test_cluster_without_workers_is_refused(
    processes: Processes, cohort: Cohort, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A scheduler that no worker joins ends the run after the time that is allowed for it."""
    monkeypatch.setattr(cluster_room, "WORKERS_TIMEOUT_S", 1)
    address = processes.scheduler()
    start = time.monotonic()

    with pytest.raises(ResumableError, match="no worker for 1 s"):
        converted(cohort, tmp_path, address)

    assert time.monotonic() - start < 10


def test_worker_without_the_package_is_refused(
    processes: Processes, cohort: Cohort, tmp_path: Path
) -> None:
    """A worker that cannot import the package is found before the first task."""
    address = processes.scheduler()
    options = ("--no-nanny", "--nthreads", "1", "--dashboard-address", "127.0.0.1:0")
    processes.start(sys.executable, "-c", WITHOUT_PACKAGE, address, *options)
    wait_for_workers(address, 1)

    with pytest.raises(ConversionError, match="cannot import parallel_dicomseg"):
        converted(cohort, tmp_path, address)


def test_worker_with_another_version_is_refused(
    processes: Processes, cohort: Cohort, tmp_path: Path
) -> None:
    """A worker whose installed package has another version is found before the first task."""
    metadata = tmp_path / "old" / "parallel_dicomseg-0.0.1.dist-info" / "METADATA"
    metadata.parent.mkdir(parents=True)
    metadata.write_text("Metadata-Version: 2.1\nName: parallel_dicomseg\nVersion: 0.0.1\n")
    path = f"{metadata.parents[1]}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    address = processes.scheduler()
    processes.worker(address, "--no-nanny", PYTHONPATH=path)
    wait_for_workers(address, 1)

    with pytest.raises(ConversionError, match=r"have parallel_dicomseg 0\.0\.1, here it is"):
        converted(cohort, tmp_path, address)


def test_worker_that_does_not_see_the_data_is_refused(
    cluster: Processes, cohort: Cohort, tmp_path: Path
) -> None:
    """A data directory that is not there on the workers is found before the first task."""
    moved = tmp_path / "elsewhere"
    Path(cohort.root).rename(moved)
    try:
        with pytest.raises(ConversionError, match="2 of 2 workers do not see the data directory"):
            converted(cohort, tmp_path, cluster.address())
    finally:
        moved.rename(cohort.root)


def test_address_where_nobody_answers_is_refused(
    cohort: Cohort, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A port on which nothing listens is a mistake of the user, told in one sentence."""
    monkeypatch.setattr(cluster_room, "SCHEDULER_TIMEOUT_S", 1)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"

        with pytest.raises(ConfigurationError, match=f"no Dask scheduler answers at {address}"):
            converted(cohort, tmp_path, address)


@pytest.mark.parametrize("scheduler", ["nonsense", "tcp:/host:8786", "http://127.0.0.1:1", "a:b:c"])
def test_malformed_address_is_refused(cohort: Cohort, tmp_path: Path, scheduler: str) -> None:
    """What is neither a scheduler's name nor an address nor a file is refused with its text."""
    with pytest.raises(ConfigurationError, match=scheduler):
        converted(cohort, tmp_path, scheduler)


def test_file_that_is_no_scheduler_file_is_refused(cohort: Cohort, tmp_path: Path) -> None:
    """A file given as the scheduler that Dask did not write is refused with its name."""
    wrong = tmp_path / "cohort.json"
    wrong.write_text("{}")

    with pytest.raises(ConfigurationError, match=r"cohort\.json"):
        converted(cohort, tmp_path, str(wrong))


# --- encryption and ssh


def test_certificate_keeps_strangers_out(
    processes: Processes, cohort: Cohort, expected: bytes, tmp_path: Path
) -> None:
    """With the configuration that certificate.sh writes all talk TLS; without it nobody gets in."""
    if shutil.which("openssl") is None:
        pytest.skip("no openssl here")
    subprocess.run([CLUSTER / "certificate.sh", tmp_path / "tls"], check=True, capture_output=True)
    config = str(tmp_path / "tls" / "dask.yaml")
    address = processes.scheduler("--protocol", "tls", DASK_CONFIG=config)
    processes.worker(address, "--no-nanny", DASK_CONFIG=config)

    assert address.startswith("tls://127.0.0.1:")
    written = yaml.safe_load(Path(config).read_text())
    with dask.config.set(dask.config.merge(dask.config.config, written)):
        assert converted(cohort, tmp_path, address) == expected
    other = tmp_path / "other"
    subprocess.run([CLUSTER / "certificate.sh", other], check=True, capture_output=True)
    files = {"--tls-ca-file": "ca.pem", "--tls-cert": "client.pem", "--tls-key": "client.key"}
    theirs = [word for flag, name in files.items() for word in (flag, str(other / name))]
    for stranger, shown in ((address, theirs), (address.replace("tls://", "tcp://"), [])):
        # in a process of its own, for a Dask client that is turned away leaves a thread behind
        command = [sys.executable, "-c", IMPATIENT_CONVERT, cohort.root, stranger, *shown]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 2, done.stderr
        assert f"error: no Dask scheduler answers at {stranger}" in done.stderr


def test_certificates_can_be_given_as_options(
    processes: Processes, cohort: Cohort, expected: bytes, tmp_path: Path
) -> None:
    """--tls-ca-file, --tls-cert and --tls-key do what Dask's configuration does."""
    if shutil.which("openssl") is None:
        pytest.skip("no openssl here")
    tls = tmp_path / "tls"
    subprocess.run([CLUSTER / "certificate.sh", tls], check=True, capture_output=True)
    address = processes.scheduler("--protocol", "tls", DASK_CONFIG=str(tls / "dask.yaml"))
    processes.worker(address, "--no-nanny", DASK_CONFIG=str(tls / "dask.yaml"))
    options = ConvertOptions(
        scheduler=address,
        workers=2,
        tls_ca_file=str(tls / "ca.pem"),
        tls_cert=str(tls / "client.pem"),
        tls_key=str(tls / "client.key"),
    )

    convert_cohort(cohort, tmp_path / "out.h5", options=options)

    assert (tmp_path / "out.h5").read_bytes() == expected
    assert {path.stat().st_mode & 0o077 for path in tls.iterdir()} == {0}
    assert not (tls / "ca.key").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "beyond this machine and not encrypted.*--allow-insecure-cluster"),
        ({"scheduler": "host.invalid:8786"}, "host.invalid:8786 is beyond this machine"),
        ({"scheduler": "tls://192.0.2.1:8786"}, "wants a certificate: give --tls-ca-file"),
        ({"tls_cert": __file__}, "--tls-ca-file, --tls-key is missing"),
        ({"tls_ca_file": "a", "tls_cert": "b", "tls_key": "c"}, "tls_ca_file is 'a'; there is no"),
        (dict.fromkeys(("tls_ca_file", "tls_cert", "tls_key"), __file__), "not encrypted; use tls"),
        (
            {
                "scheduler": "tls://192.0.2.1:8786",
                **dict.fromkeys(("tls_ca_file", "tls_cert", "tls_key"), __file__),
            },
            "the certificates cannot be used",
        ),
    ],
)
def test_open_network_is_refused(
    cohort: Cohort, tmp_path: Path, changes: dict[str, str], message: str
) -> None:
    """A cluster that others can reach needs certificates, before anybody is talked to."""
    options = ConvertOptions(**{"scheduler": "tcp://192.0.2.1:8786"} | changes)

    with pytest.raises(ConfigurationError, match=message):
        convert_cohort(cohort, tmp_path / "out.h5", options=options)


def test_worker_on_an_open_network_is_refused(cohort: Cohort, tmp_path: Path) -> None:
    """A scheduler on loopback does not hide a worker that others can reach, unless allowed."""
    host = socket.gethostbyname(socket.gethostname())
    if host.startswith("127."):
        pytest.skip("this machine has no address beyond loopback")
    with (
        distributed.LocalCluster(n_workers=0, host="127.0.0.1", dashboard_address=None) as cluster,
        processes_in(tmp_path) as started,
    ):
        address = cluster.scheduler_address
        started.worker(address, "--no-nanny", "--host", host)
        wait_for_workers(address, 1)

        with pytest.raises(ConfigurationError, match="is beyond this machine"):
            converted(cohort, tmp_path, address)
        options = ConvertOptions(scheduler=address, allow_insecure_cluster=True)
        summary = convert_cohort(cohort, tmp_path / "out.h5", options=options)

    assert summary.slices == len(cohort.slices)


# Stands in for ssh and the machine at its other end: runs the command here, in a shell, as sshd
# does, and hangs up on it when the connection ends. Options and the host come before the command.
FAKE_SSH = """#!/usr/bin/env bash
echo "${@: -2:1}" >>"$(dirname "$0")/hosts.log"
SSH_CONNECTION="127.0.0.1 1 127.0.0.1 22" bash -c "${@: -1}" &
trap 'kill -HUP $!' TERM
wait
"""


def test_ssh_starts_a_cluster_and_ends_it(
    processes: Processes, cohort: Cohort, expected: bytes, tmp_path: Path
) -> None:
    """ssh.sh starts a scheduler on the first host and a worker on each; its end ends them."""
    ssh = tmp_path / "bin" / "ssh"
    ssh.parent.mkdir()
    ssh.write_text(FAKE_SSH)
    ssh.chmod(0o755)
    hosts = tmp_path / "hosts.txt"
    hosts.write_text("# the machines\nfirst\n\nsecond\n")
    path = f"{ssh.parent}{os.pathsep}{os.environ['PATH']}"

    script = processes.start(
        CLUSTER / "ssh.sh", hosts, tmp_path / "scheduler.json", "--nthreads", "1", PATH=path
    )
    address = processes.address()
    wait_for_workers(address, 2)
    made = converted(cohort, tmp_path, str(tmp_path / "scheduler.json"))
    children = psutil.Process(script.pid).children(recursive=True)
    script.terminate()
    script.wait(END_SECONDS)
    _, alive = psutil.wait_procs(children, timeout=END_SECONDS)

    assert made == expected
    assert sorted((ssh.parent / "hosts.log").read_text().split()) == ["first", "first", "second"]
    assert not alive


# --- files that nothing here can run


def test_compose_file_keeps_the_cluster_inside() -> None:
    """No port is published, the network has no way out, the cohort cannot be written."""
    text = (CLUSTER / "compose.yaml").read_text()
    compose = yaml.safe_load(text)
    services = compose["services"]

    assert set(services) == {"certificates", "scheduler", "worker", "convert"}
    assert all(network["internal"] for network in compose["networks"].values())
    for service in services.values():
        assert "ports" not in service
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert set(service["networks"]) <= set(compose["networks"])
        data = [volume for volume in service["volumes"] if ":/data" in volume]
        assert all(volume.endswith(":/data:ro") for volume in data)
        assert bool(data) == (service is not services["certificates"])
        names = {volume.partition(":")[0] for volume in service["volumes"] if volume[0] != "$"}
        assert names <= set(compose["volumes"])
        assert set(service.get("depends_on", ())) <= set(services)
        assert (CLUSTER / service["build"]["context"] / service["build"]["dockerfile"]).is_file()


def test_compose_runs_scripts_and_options_that_exist() -> None:
    """The scripts that containers start are in the image, the converter's options are real."""
    from parallel_dicomseg.cli import main

    services = yaml.safe_load((CLUSTER / "compose.yaml").read_text())["services"]
    names = ("certificates", "scheduler", "worker")
    started = " ".join(word for name in names for word in services[name]["entrypoint"])
    scripts = [word for word in started.split() if word.endswith(".sh")]
    command = main.commands[services["convert"]["entrypoint"][1]]
    options = {name for parameter in command.params for name in parameter.opts}
    used = {word.partition("=")[0] for word in services["convert"]["entrypoint"] if "--" in word}

    assert scripts == [f"cluster/{name}.sh" for name in ("certificate", "scheduler", "worker")]
    assert all(
        service["environment"]["DASK_CONFIG"] == "/tls/dask.yaml"
        for name, service in services.items()
        if name != "certificates"
    )
    assert "--scheduler=tls://scheduler:8786" in services["convert"]["entrypoint"]
    assert all((CLUSTER.parent / script).is_file() for script in scripts)
    assert used <= options


def test_readme_names_files_that_exist() -> None:
    """Every script and file of cluster/ that its README names is there, and is named."""
    text = (CLUSTER / "README.md").read_text()
    named = set(re.findall(r"cluster/([\w.]+)", text))
    there = {path.name for path in CLUSTER.iterdir() if path.suffix != ".dockerignore"}

    assert named <= there
    assert there - {"README.md"} <= named


@pytest.mark.parametrize("script", sorted(CLUSTER.glob("*.sh")), ids=lambda path: path.name)
def test_script_can_be_started(script: Path) -> None:
    """Scripts are executable, stop at errors, and bash can read them."""
    assert os.access(script, os.X_OK)
    assert "set -euo pipefail" in script.read_text()
    assert subprocess.run(["bash", "-n", script], check=False).returncode == 0
