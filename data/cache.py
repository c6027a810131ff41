"""A folder of verified copies, shared by the processes of a node and bounded in bytes.

An entry is named by its content, so it is never out of date; it is written under another name and
renamed, and its hash is checked when it is written and when a process first uses it. One that is
damaged or was half written (a power cut) is removed and made again. There is no lock: whoever makes
the part file of an entry first fetches it, the others wait; when the part has not changed for a
minute its writer is taken for dead, and one of the others begins the next part. An entry is handed
out as an open file, so removing it harms nobody.
What was used longest ago makes room. The folder is cut into groups of about 4 GiB that keep their
bounds one by one, so that making room looks at a few thousand files: 5 ms. The sum stays within
`max_bytes`; while several processes claim room at one moment it may be over by what they claim.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import xxhash

from data.config import AccessError, DataError

log = logging.getLogger(__name__)

GROUP_BYTES = 2**32
_STALLED_SECONDS = 60.0
_ABANDONED_SECONDS = 600.0
"""Age of a part file after which it may be removed."""
_WRONG_ATTEMPTS = 4
"""How often content of another hash is fetched before it is called damaged."""
_FIRST_PAUSE = 0.25
_READ_BYTES = 2**22
_FOLDERS = 256

Fetch = Callable[[], Iterable[bytes]]
Wrong = Callable[[], DataError]


@dataclass(frozen=True)
class Content:
    """What an entry holds, and by which name it is found."""

    key: str
    """Begins with two hex digits of a hash; unique for the content."""
    num_bytes: int | None
    """None where only the hash is known."""
    algorithm: Literal["sha256", "xxh3"]
    digest: str

    def hasher(self) -> Any:
        """A fresh hash of the algorithm."""
        return hashlib.sha256() if self.algorithm == "sha256" else xxhash.xxh3_64()

    def is_in(self, file: int) -> bool:
        """Whether an open file holds it."""
        size = os.fstat(file).st_size
        if self.num_bytes not in (None, size):
            return False
        hasher = self.hasher()
        for offset in range(0, size, _READ_BYTES):
            hasher.update(os.pread(file, _READ_BYTES, offset))
        return bool(hasher.hexdigest() == self.digest)


class Cache:
    """The folder. AccessError when its disk refuses."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder = folder
        self._num_groups = max(1, min(_FOLDERS, max_bytes // GROUP_BYTES))
        self._group_bytes = max_bytes // self._num_groups
        self.bytes_fetched = 0
        """Bytes that were not there and were fetched by this process."""

    def open(self, content: Content, fetch: Fetch, wrong: Wrong, *, trusted: bool = False) -> int:
        """A descriptor of an entry, which `fetch` brings in pieces when it is not there.

        `trusted` leaves out the check of an entry that this process has checked before. When what
        is fetched is other content, again and again, the error that `wrong` makes is raised.
        """
        with _storing(self.folder):
            return self._open(content, fetch, wrong, trusted)

    def path(self, content: Content) -> Path:
        """Where an entry is, if it is there."""
        return self.folder / content.key[:2] / content.key

    def _open(self, content: Content, fetch: Fetch, wrong: Wrong, trusted: bool) -> int:
        path = self.path(content)
        generation, watch = 0, _Watch()
        while True:
            file = self._existing(path, content, trusted)
            if file is not None:
                return file
            path.parent.mkdir(parents=True, exist_ok=True)
            part = _part(path, generation)
            try:
                file = os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
            except FileExistsError:
                # Somebody fetches it, or died in the attempt.
                if watch.is_stalled(part):
                    generation, watch = generation + 1, _Watch()
                else:
                    time.sleep(0.02)
                continue
            ready = self._existing(path, content, trusted)
            if ready is not None:
                # Finished between the look and the claim.
                os.close(file)
                part.unlink(missing_ok=True)
                return ready
            self._fill(file, part, path, content, fetch, wrong)
            for dead in range(generation):
                _part(path, dead).unlink(missing_ok=True)
            return file

    def _existing(self, path: Path, content: Content, trusted: bool) -> int | None:
        try:
            file = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            return None
        if not trusted and not content.is_in(file):
            os.close(file)
            log.warning("%s in the cache is damaged; it is fetched again", path)
            path.unlink(missing_ok=True)
            return None
        # Another user's entry serves as well; then its age is that of its making.
        with suppress(OSError):
            os.utime(file)
        return file

    def _fill(
        self, file: int, part: Path, path: Path, content: Content, fetch: Fetch, wrong: Wrong
    ) -> None:
        """Fetch an entry into its part file, which was just made, and give it its name."""
        try:
            if content.num_bytes is not None:
                # Its room is taken before another process looks for room.
                os.ftruncate(file, content.num_bytes)
            self._make_room(path)
            for attempt in range(_WRONG_ATTEMPTS):
                if self._write(file, content, fetch):
                    break
                # A cut or mixed-up answer may pass.
                time.sleep(_FIRST_PAUSE * 2**attempt)
            else:
                raise wrong()
            _publish(file, part, path)
            self._make_room(path)
        except BaseException:
            os.close(file)
            part.unlink(missing_ok=True)
            raise

    def _write(self, file: int, content: Content, fetch: Fetch) -> bool:
        """Whether what was fetched is the content."""
        hasher, size = content.hasher(), 0
        for piece in fetch():
            if content.num_bytes is not None and size + len(piece) > content.num_bytes:
                return False
            hasher.update(piece)
            _write_all(file, piece, size)
            size += len(piece)
            self.bytes_fetched += len(piece)
        os.ftruncate(file, size)
        return content.num_bytes in (None, size) and hasher.hexdigest() == content.digest

    def _make_room(self, path: Path) -> None:
        """Remove what was used longest ago from the group of an entry, until it keeps its bound."""
        found = sorted(self._group(int(path.parent.name, 16) % self._num_groups))
        total = sum(size for _, size, _ in found)
        now = time.time()
        for used, size, name in found:
            if total <= self._group_bytes:
                return
            if ".part." in name and now - used < _ABANDONED_SECONDS:
                continue
            # Another user's entry may have to stay.
            with suppress(OSError):
                os.unlink(name)
                total -= size

    def _group(self, group: int) -> Iterator[tuple[float, int, str]]:
        """Last use, size and path of every file of a group."""
        for number in range(group, _FOLDERS, self._num_groups):
            with suppress(FileNotFoundError), os.scandir(self.folder / f"{number:02x}") as entries:
                for entry in entries:
                    with suppress(FileNotFoundError):
                        stat = entry.stat(follow_symlinks=False)
                        yield stat.st_mtime, stat.st_size, entry.path


@contextmanager
def _storing(folder: Path) -> Iterator[None]:
    """Around work on the cache: a disk that refuses is named with what can be done."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        cure = "make room there, lower data.cache_bytes" if full else "mend that disk or its rights"
        raise AccessError(
            f"the cache {folder} cannot be used: {os.strerror(error.errno or 0)}; {cure}, or name "
            "another folder: data.cache_dir=FOLDER"
        ) from error


class _Watch:
    """Notices when a part file of another process has not changed for long, by this one's clock."""

    def __init__(self) -> None:
        self._seen: tuple[int, int] | None = None
        self._since = time.monotonic()

    def is_stalled(self, part: Path) -> bool:
        try:
            stat = part.stat()
        except FileNotFoundError:
            return False
        state = (stat.st_size, stat.st_mtime_ns)
        if state != self._seen:
            self._seen, self._since = state, time.monotonic()
        return time.monotonic() - self._since > _STALLED_SECONDS


def _publish(file: int, part: Path, path: Path) -> None:
    """Give a part its name as an entry, if it is still the file that this writer has open.

    A writer so slow that it was taken for dead has lost its part, and another, half written, may
    stand under the name by now. So the part first gets a second name that only this writer knows,
    and is then looked at. It keeps the first one until the entry is there: others who look between
    would find neither, and fetch it again.
    """
    own = os.fstat(file)
    taken = path.with_name(f"{path.name}.part.of-{own.st_ino}")
    with suppress(FileNotFoundError):
        _name_again(part, taken)
        if not os.path.samestat(own, os.stat(taken)):
            os.unlink(taken)
            return
        os.replace(taken, path)
        if os.path.samestat(own, os.stat(part)):
            os.unlink(part)


def _name_again(part: Path, taken: Path) -> None:
    try:
        os.link(part, taken)
    except FileNotFoundError:
        raise
    except OSError:
        # A file system without links: at worst an entry is fetched twice.
        os.rename(part, taken)


def _write_all(file: int, piece: bytes, offset: int) -> None:
    rest = memoryview(piece)
    while rest:
        written = os.pwrite(file, rest, offset)
        rest, offset = rest[written:], offset + written


def _part(path: Path, generation: int) -> Path:
    return path.with_name(f"{path.name}.part.{generation}")
