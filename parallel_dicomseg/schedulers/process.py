"""One worker process that may crash, hang or run out of memory, and is then started again.

Not `concurrent.futures.ProcessPoolExecutor`: there one death ends all workers, does not tell which
task it was, and when it happens while a result is being sent the pool waits for ever. Here each
worker has a connection of its own, which ends with it.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Executor, Future
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from parallel_dicomseg.errors import ResumableError

_START_SECONDS = 80
# Somebody who kills workers may also kill some that start.
_STARTS = 10
_PAUSE_SECONDS = 0.2
_PROGRAM = "from parallel_dicomseg.schedulers.process import serve; serve({0}, {1})"
# The kernel ends workers, which can be replaced, before the process that writes the file.
_OOM_SCORE = "500"


class DeadProcessError(Exception):
    """The worker process ended, or was ended, before it answered; the message says how."""


class WorkerProcess(Executor):
    """A process that does one thing after another; a pool of one in which `submit` waits.

    It starts with the first call and again with the first call after its death. It never runs the
    main module of the program, prints nothing, leaves no core dump, ends with the program however
    that ends, and is the first to go when the machine's memory runs out.
    """

    #: What Dask asks a pool for.
    _max_workers = 1

    def __init__(self, warm_up: Callable[[], object], memory: int = 0) -> None:
        """Prepare; nothing is started yet.

        Parameters
        ----------
        warm_up
            Called in the process before anything else; can be pickled.
        memory
            Bytes that it may use beyond what it uses after that; 0: any.
        """
        self._prepare = (warm_up, memory)
        self._guard = threading.Lock()
        self._closed = False
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        self._lifeline = -1

    def call(
        self, function: Callable[..., Any], *arguments: Any, timeout: float | None = None
    ) -> Any:
        """What a function gives there.

        Raises
        ------
        DeadProcessError
            The process ended first.
        TimeoutError
            It did not answer in time, and was ended.
        ResumableError
            No process can be started.
        """
        if self._connection is None:
            self._start()
        return self._exchange(function, arguments, timeout)

    def submit(
        self, function: Callable[..., Any], /, *arguments: Any, **keywords: Any
    ) -> Future[Any]:
        """What `call` gives, as a future that is done."""
        if keywords:
            raise TypeError("a worker process takes no keywords")
        done: Future[Any] = Future()
        done.set_result(self.call(function, *arguments))
        return done

    def kill(self) -> None:
        """End the process at once; from any thread. Who waits for it gets DeadProcessError."""
        with self._guard:
            if self._process:
                self._process.kill()

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:  # noqa: ARG002
        """End the process for good."""
        with self._guard:
            self._closed = True
            if self._process:
                self._process.kill()
        if wait:
            self._bury()

    def _start(self) -> None:
        """Start until it answers: a process that dies before its first task tells of the machine.

        Raises
        ------
        DeadProcessError
            It was shut down.
        ResumableError
            It died again and again, or took far too long.
        """
        for _ in range(_STARTS):
            try:
                self._launch()
                self._exchange(prepare, self._prepare, _START_SECONDS)
            except (DeadProcessError, TimeoutError) as error:
                self._bury()
                if self._closed:
                    raise DeadProcessError("was shut down") from None
                reason = str(error)
                if isinstance(error, TimeoutError):
                    break
            except OSError as error:
                self._bury()
                reason = error.strerror or type(error).__name__
            else:
                return
            time.sleep(_PAUSE_SECONDS)
        raise ResumableError(f"no worker process can be started: {reason}")

    def _launch(self) -> None:
        ours, theirs = socket.socketpair()
        end_of_child, lifeline = os.pipe()
        with theirs, os.fdopen(end_of_child, closefd=True) as held:
            descriptors = (theirs.fileno(), held.fileno())
            command = [sys.executable, "-P", "-c", _PROGRAM.format(*descriptors)]
            with self._guard:
                self._connection, self._lifeline = Connection(ours.detach()), lifeline
                if self._closed:
                    raise DeadProcessError("was shut down")
                self._process = subprocess.Popen(  # noqa: S603  # this interpreter
                    command,
                    pass_fds=descriptors,
                    env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
                    stdin=subprocess.DEVNULL,
                    # what decoders print may quote the file
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    process_group=0,  # Ctrl-C is for the program
                )

    def _exchange(
        self, function: Callable[..., Any], arguments: tuple[Any, ...], timeout: float | None
    ) -> Any:
        try:
            if (line := self._connection) is None:
                raise EOFError
            line.send_bytes(pickle.dumps((function, arguments)))
            if timeout is None or line.poll(timeout):
                # from our own child, over a socket that nobody else can open
                return pickle.loads(line.recv_bytes())  # noqa: S301
            self._bury()
            raise TimeoutError(f"no answer for {timeout:g} s")
        except TimeoutError:
            raise
        except (EOFError, OSError):
            raise DeadProcessError(_how(self._bury())) from None

    def _bury(self) -> int | None:
        """End the process and forget it; its exit status."""
        with self._guard:
            process, connection, lifeline = self._process, self._connection, self._lifeline
            self._process, self._connection, self._lifeline = None, None, -1
        if connection:
            connection.close()
        if lifeline >= 0:
            os.close(lifeline)
        if process is None:
            return None
        process.kill()
        return process.wait()


def _how(status: int | None) -> str:
    if status is None or status >= 0:
        return f"ended with status {status}"
    with contextlib.suppress(ValueError):
        return f"was ended by {signal.Signals(-status).name}"
    return f"was ended by signal {-status}"


# --- in the process ------------------------------------------------------------------------------


def serve(connection: int, lifeline: int) -> None:
    """Do what comes through a connection until it ends (descriptors of both)."""
    _end_with(lifeline)
    line = Connection(connection)
    while True:
        try:
            function, arguments = pickle.loads(line.recv_bytes())  # noqa: S301  # our parent's
        except EOFError:
            return
        line.send_bytes(pickle.dumps(function(*arguments), protocol=pickle.HIGHEST_PROTOCOL))


def prepare(warm_up: Callable[[], object], memory: int) -> None:
    """Load the kernels, then keep to so many bytes more (0: any)."""
    with contextlib.suppress(OSError):  # where there is no /proc
        Path("/proc/self/oom_score_adj").write_text(_OOM_SCORE, encoding="ascii")
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core dump is full of images
    warm_up()
    if memory and Path("/proc/self/statm").exists():
        used = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        most = used * resource.getpagesize() + memory
        resource.setrlimit(resource.RLIMIT_AS, (most if hard < 0 else min(most, hard), hard))


def _end_with(lifeline: int) -> None:
    """End when the other end of a pipe is closed, which the system does when its process ends.

    By a signal of the system: a decoder that hangs lets no thread of Python notice.
    """
    import fcntl

    fcntl.fcntl(lifeline, fcntl.F_SETOWN, os.getpid())
    flags = fcntl.fcntl(lifeline, fcntl.F_GETFL)
    signal.signal(signal.SIGIO, signal.SIG_DFL)  # which is to end
    fcntl.fcntl(lifeline, fcntl.F_SETFL, flags | os.O_ASYNC)
