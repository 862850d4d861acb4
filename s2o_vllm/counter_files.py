"""The files through which workers report their counters to the API process.

Workers count and the API process answers ``/metrics``. A worker's file is written through a memory
map: its space is reserved before, for where a disk is full such a write kills the process.
"""

import fcntl
import os
import shutil
import tempfile
import time
import weakref
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from prometheus_client.mmap_dict import MmapedDict
from prometheus_client.multiprocess import MultiProcessCollector

PREFIX = "s2o-metrics-"
LOCK = "lock"
RESERVED = 1 << 20  # bytes of a worker's file; a time series takes some 400
INFO_RESERVED = 1 << 16  # bytes of the file of `s2o:info`, one time series
GRACE = 60.0  # seconds in which a new folder may have no lock yet


class CounterFolder:
    """A temporary folder that is gone with its process, however that ends.

    The process holds a lock in it. What was killed leaves its folder behind without one; the next
    to make a folder removes it.

    Raises:
        OSError: if there is no place for it.
    """

    def __init__(self) -> None:
        remove_abandoned(Path(tempfile.gettempdir()))
        self.path = Path(tempfile.mkdtemp(prefix=PREFIX))
        self._lock = locked(self.path / LOCK)
        weakref.finalize(self, remove, self.path, os.getpid())

    def ensure(self) -> None:
        """Make the folder again if somebody has removed it.

        Raises:
            OSError: if that cannot be done.
        """
        if not self.path.is_dir():
            self.path.mkdir(mode=0o700)
            self._lock = locked(self.path / LOCK)


def locked(path: Path) -> Any:
    """Return a file that is held by this process.

    Raises:
        OSError: if another process holds it.
    """
    file = path.open("ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise
    return file


def remove(folder: Path, owner: int) -> None:
    """Remove a folder, if this is the process that made it."""
    if os.getpid() != owner:
        return  # a fork
    gone = folder.with_name(f"{folder.name}.gone")  # workers make no new files in it
    with suppress(OSError):
        folder.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


def remove_abandoned(root: Path) -> None:
    """Remove the folders of this user's processes that were killed."""
    for folder in root.glob(PREFIX + "*"):
        with suppress(OSError):
            found = folder.lstat()
            if folder.is_symlink() or found.st_uid != os.getuid():
                continue
            if not (folder / LOCK).exists() and time.time() - found.st_mtime < GRACE:
                continue
            with locked(folder / LOCK):
                shutil.rmtree(folder, ignore_errors=True)


class Collector(MultiProcessCollector):
    """Offers what is in a folder to Prometheus, and makes the folder again if it was removed."""

    def __init__(self, registry: Any, folder: CounterFolder):
        self.folder = folder
        super().__init__(registry, path=str(folder.path))

    def collect(self) -> Iterable[Any]:
        """Return the metrics; none while their files cannot be read."""
        try:
            self.folder.ensure()
            return list(super().collect())
        except OSError:
            return []


class CounterFile:
    """A worker's file, with its space reserved.

    Args:
        folder: an existing folder.
        kind: of its metrics, in prometheus_client's words: "counter", or "gauge_max" for gauges of
            which all workers' maximum is shown.
        reserved: bytes.

    Raises:
        OSError: if there is no space, or no permission.
    """

    def __init__(self, folder: Path, kind: str = "counter", reserved: int = RESERVED):
        self.path = folder / f"{kind}_s2o{os.getpid()}.db"
        fresh = self.path.with_suffix(".new")
        try:
            fresh.write_bytes(bytes(reserved))
            fresh.rename(self.path)  # readers see it whole
        except OSError:
            with suppress(OSError):
                fresh.unlink()
            raise
        self._values = MmapedDict(str(self.path))

    @property
    def removed(self) -> bool:
        """Whether the file is gone while its folder is there (again)."""
        return self.path.parent.is_dir() and not self.path.exists()

    def write(self, key: str, value: float) -> None:
        """Set a time series, named by prometheus_client's key."""
        self._values.write_value(key, value, 0.0)
