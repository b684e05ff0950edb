"""Disks for tests of what survives: one that records, one that fails, one that is full.

They stand in the place of `store.disk.Disk` and do the same real calls.
"""

import errno
import os
import threading

from parallel_dicomseg.store.disk import Disk

#: Calls that a disk may refuse.
WRITING = ("open", "write", "sync", "sync_directory", "truncate", "replace")


class RecordingDisk(Disk):
    """Notes all calls that change something, in their order: (call, path or paths, arguments)."""

    def __init__(self):
        self.log = []
        self._paths = {}
        self._lock = threading.Lock()

    def note(self, *entry):
        """Anything that the log shall hold besides, such as what was acknowledged."""
        with self._lock:
            self.log.append(entry)

    def open(self, path, *, fresh):
        existed = path.exists()
        descriptor = super().open(path, fresh=fresh)
        self._paths[descriptor] = path.name
        self.note("open", path.name, fresh or not existed)
        return descriptor

    def write(self, descriptor, buffers, offset):
        count = super().write(descriptor, buffers, offset)
        content = b"".join(bytes(buffer) for buffer in buffers)[:count]
        self.note("write", self._paths[descriptor], offset, content)
        return count

    def sync(self, descriptor):
        super().sync(descriptor)
        self.note("sync", self._paths[descriptor])

    def sync_directory(self, directory):
        super().sync_directory(directory)
        self.note("sync_directory")

    def truncate(self, descriptor, size):
        super().truncate(descriptor, size)
        self.note("truncate", self._paths[descriptor], size)

    def replace(self, source, target):
        super().replace(source, target)
        for descriptor, name in self._paths.items():
            if name == source.name:
                self._paths[descriptor] = target.name
        self.note("replace", source.name, target.name)

    def remove(self, path):
        if path.exists():
            self.note("remove", path.name)
        super().remove(path)


class FailingDisk(Disk):
    """The n-th of these calls fails, or (`short`) is cut short."""

    def __init__(self, n, fault, calls=WRITING):
        self.left = n
        self.fault = fault
        self.calls = calls
        self.failed = 0
        self._lock = threading.Lock()

    def _is_due(self, call):
        with self._lock:
            self.left -= call in self.calls
            due = self.left == 0 and call in self.calls and not self.failed
            self.failed += due
            return due

    def _fail(self, call):
        if self._is_due(call):
            raise OSError(self.fault, os.strerror(self.fault))

    def write(self, descriptor, buffers, offset):
        if self.fault == "short":
            if self._is_due("write"):
                buffers = [buffers[0][: max(1, len(buffers[0]) // 2)]]
        else:
            self._fail("write")
        return super().write(descriptor, buffers, offset)

    def open(self, path, *, fresh):
        self._fail("open")
        return super().open(path, fresh=fresh)

    def sync(self, descriptor):
        self._fail("sync")
        super().sync(descriptor)

    def sync_directory(self, directory):
        self._fail("sync_directory")
        super().sync_directory(directory)

    def truncate(self, descriptor, size):
        self._fail("truncate")
        super().truncate(descriptor, size)

    def replace(self, source, target):
        self._fail("replace")
        super().replace(source, target)


class FullDisk(Disk):
    """Takes so many bytes; the write that meets the end is cut short, and the next one fails."""

    def __init__(self, room):
        self.room = room

    def write(self, descriptor, buffers, offset):
        size = sum(len(buffer) for buffer in buffers)
        if self.room >= size:
            self.room -= size
            return super().write(descriptor, buffers, offset)
        if not self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        piece, self.room = buffers[0][: self.room], self.room - len(buffers[0][: self.room])
        return super().write(descriptor, [piece], offset)
