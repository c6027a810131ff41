"""Loads hostile files through every way in, and sees what they make us do.

`python -m tests.train.attack FOLDER` writes FOLDER/found.json: how many were loaded, and each event
that must not be: unpickling, a program, a connection, code of theirs, a file that is opened outside
of what was named. An audit hook sees what Python does, inotify what compiled libraries open. What
both are there for is done once at the end, and is told under `planted`. A hook cannot be taken
back, so this is a process of its own.
"""

from __future__ import annotations

import ctypes
import io
import json
import os
import pickle
import resource
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

SLOW_SECONDS = 10
FORBIDDEN = ("pickle.find_class", "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn",
             "os.fork", "socket.connect", "socket.getaddrinfo", "ctypes.dlopen")  # fmt: skip
NAMES = ("../secret", "../../secret", "/etc/hostname", "a/../../secret", "", ".", "..", "a\0b",
         "%2e%2e/secret", "secret ", "rank-00000.safetensors/../../secret", "~root/secret",
         "file:///etc/hostname", "pipe:touch ran", "https://127.0.0.1:9/x")  # fmt: skip
NUMBERS = (-1, 2**31, 2**63, 2**64, 10**30, 1.5, None, "7", [], {}, True)
PICKLES = ("weights.bin", "adapter_model.bin")
"""Files inside of folders that nobody may open either."""
LIBRARIES = tuple(
    os.path.realpath(path)
    for path in (sys.prefix, sys.base_prefix, Path(__file__).parents[2], "/proc", "/sys", "/dev")
)
IN_OPEN, IN_ISDIR = 0x20, 0x40000000


class Evil:
    """Leaves a file behind when it is unpickled."""

    def __reduce__(self) -> Any:
        return os.system, ("touch ran",)


def pickled() -> bytes:
    """An Evil."""
    return pickle.dumps(Evil())


BOMBS = (b"[" * 100_000, b'{"a":' * 50_000, b'{"text": ' + b"9" * 100_000 + b"}",
         b'{"text": "\\ud800"}', b'{"text": NaN}', b'{"text": 1e999}', b"\xff\xfe{}",
         b'{"text": "a", "text": {"b": 1}}', b'{"text": "\\u0000"}', b'"', b"null",
         pickled())  # fmt: skip
"""Text that is deep, long, or none."""


@dataclass(frozen=True)
class Case:
    """Something that is loaded once."""

    name: str
    load: Callable[[], Any]
    roots: tuple[Path, ...]
    """What was named: nothing outside is opened, libraries apart."""
    is_good: bool = False
    """As we write it: what does not load such a one would refuse the hostile ones for nothing."""
    before: Callable[[], Any] = lambda: None
    """Makes it; nobody looks."""


class Watch:
    """What happens while it is armed."""

    def __init__(self, *folders: Path) -> None:
        """Opens of files right in these folders, and of /etc/hostname, are seen in any library."""
        self._roots: tuple[str, ...] | None = None
        self._seen: list[str] = []
        self._libc = ctypes.CDLL(None)
        self._kernel = self._libc.inotify_init1(os.O_NONBLOCK)
        self._watched: dict[int, Path] = {}
        for path in (*folders, Path("/etc/hostname")):
            self._watch(path)
        sys.addaudithook(self._hook)

    def run(self, case: Case) -> tuple[str, list[str]]:
        """What the load raised that is not for people, and what was seen of it."""
        case.before()
        pickles = [root / name for root in case.roots for name in PICKLES]
        watches = [self._watch(path) for path in pickles if path.exists()]
        self._opened()
        outcome = ""
        signal.alarm(SLOW_SECONDS)
        self._roots = tuple(os.path.realpath(root) for root in case.roots)
        try:
            case.load()
            outcome = "" if case.is_good else "passed"
        except Exception as error:
            if getattr(error, "exit_code", None) is None or case.is_good:
                outcome = f"{type(error).__name__}: {error}"[:300]
        finally:
            allowed, self._roots = self._roots, None
            signal.alarm(0)
        seen = [*self._seen, *(f"kernel {p}" for p in self._opened() if not _within(p, allowed))]
        self._seen.clear()
        for number in watches:
            self._libc.inotify_rm_watch(self._kernel, number)
        self._opened()
        return outcome, seen

    def _hook(self, event: str, args: tuple[Any, ...]) -> None:
        roots = self._roots
        if roots is None:
            return
        text = repr(args)
        is_theirs = event in ("exec", "import") and "evil" in text
        if event in FORBIDDEN or is_theirs or (event == "open" and _leaves(args, roots)):
            self._seen.append(f"{event} {text[:200]}")

    def _watch(self, path: Path) -> int:
        number: int = self._libc.inotify_add_watch(self._kernel, os.fsencode(path), IN_OPEN)
        assert number > 0, path
        self._watched[number] = path
        return number

    def _opened(self) -> Iterator[str]:
        found = []
        try:
            while raw := os.read(self._kernel, 1 << 16):
                while raw:
                    number, mask, _, length = struct.unpack("iIII", raw[:16])
                    name = raw[16 : 16 + length].rstrip(b"\0").decode()
                    if mask & IN_OPEN and not mask & IN_ISDIR:
                        found.append(str(self._watched[number] / name))
                    raw = raw[16 + length :]
        except BlockingIOError:
            pass
        return iter(found)


def _leaves(args: tuple[Any, ...], roots: tuple[str, ...]) -> bool:
    """Whether a file is opened that is neither what was named nor a library's."""
    path, mode, flags = args
    if isinstance(path, int):
        return False
    try:
        real = os.path.realpath(os.fsdecode(path))
    except (ValueError, TypeError):
        return False
    # One that is not there is only looked for, unless it is made.
    makes = "w" in str(mode) or flags & os.O_CREAT
    return not _within(real, (*roots, *LIBRARIES)) and bool(makes or os.path.exists(real))


def _within(path: str, roots: tuple[str, ...]) -> bool:
    is_pickle = os.path.basename(path) in PICKLES
    return not is_pickle and any(path == root or path.startswith(f"{root}/") for root in roots)


def planted(folder: Path) -> Iterator[Case]:
    """What must not be, done on purpose: each is to be told, or the proof proves nothing."""
    inside = folder / "in"
    inside.mkdir()
    (inside / "evil.py").write_text("C = 1\n")
    (inside / "weights.bin").write_bytes(pickled())
    (inside / "link").symlink_to(folder / "secret")
    sys.path.append(str(inside))

    def connect() -> None:
        with socket.socket() as one:
            one.connect(("127.0.0.1", 9))

    def told() -> None:
        error = ValueError("told")
        error.exit_code = 1  # type: ignore[attr-defined]
        raise error

    for name, load in {
        "unpickled": lambda: pickle.loads(pickled()),
        "numpy": lambda: np.load(io.BytesIO(_objects()), allow_pickle=True),
        "program": lambda: subprocess.run(["true"]),
        "connected": connect,
        "imported": lambda: __import__("evil"),
        "read": lambda: (folder / "secret").read_bytes(),
        "written": lambda: (folder / "new").write_bytes(b""),
        "linked": lambda: (inside / "link").read_bytes(),
        "in a library": lambda: safe_open(folder / "secret", "np").__enter__(),
        "pickle of the folder": lambda: (inside / "weights.bin").read_bytes(),
        "bug": lambda: {}["nothing"],
        "nothing": told,
    }.items():
        yield Case(name, load, (inside,))
    yield Case("good", told, (inside,), is_good=True)


def _objects() -> bytes:
    written = io.BytesIO()
    np.save(written, np.array([Evil()], dtype=object), allow_pickle=True)
    return written.getvalue()


def _too_slow(number: int, frame: Any) -> None:
    raise TimeoutError(f"not done in {SLOW_SECONDS} s")


def main(folder: Path) -> None:
    """Load everything once."""
    from tests.train.hostile_data import datasets, lines, tars, tokenizers
    from tests.train.hostile_folders import folders
    from tests.train.hostile_runs import checkpoints, exports
    from train.world import join_world

    makers = (checkpoints, exports, datasets, tokenizers, tars, folders, lines)
    folder.mkdir()
    # What a relative name leads to.
    (folder / "here").mkdir()
    os.chdir(folder / "here")
    homes = [folder / name for name in (*(make.__name__ for make in makers), "planted")]
    for home in (folder, *homes):
        home.mkdir(exist_ok=True)
        save_file({"w": np.zeros(1, np.float32)}, home / "secret")
    signal.signal(signal.SIGALRM, _too_slow)
    found: dict[str, Any] = {"count": 0, "violations": [], "unexpected": [], "passed": []}
    with join_world() as world:
        watch = Watch(folder, folder / "here", *homes)
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        slowest = 0.0
        for make, home in zip(makers, homes, strict=False):
            for case in make(home, world):
                print(case.name, file=sys.stderr, flush=True)
                begun = time.monotonic()
                outcome, seen = watch.run(case)
                slowest = max(slowest, time.monotonic() - begun)
                found["count"] += not case.is_good
                found["violations"] += [f"{case.name}: {event}" for event in seen]
                if outcome:
                    kind = "passed" if outcome == "passed" else "unexpected"
                    found[kind].append(f"{case.name}: {outcome}")
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        found["memory_mib"], found["slowest"] = (peak - memory) / 1024, slowest
        found["ran"] = [str(path) for path in folder.rglob("ran")]
        found["planted"] = {case.name: watch.run(case) for case in planted(homes[-1])}
        found["planted ran"] = (folder / "here" / "ran").exists()
    # Libraries have said things on standard output.
    (folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    # By its own name: what it makes refers to the module, and not to a second one.
    from tests.train import attack

    attack.main(Path(sys.argv[1]))
