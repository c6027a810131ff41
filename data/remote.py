"""Inputs behind a URL: fetched once into a folder, then read like any file. Imports fsspec alone.

s3:// gs:// http:// https:// hf://. A file counts when the note beside it (size and hash) was
written, last; a later call holds the file against its note and does not ask the server again.
Failures that may pass (5xx, 429, cut connections, timeouts) are tried 8 times in about 30 s, with
growing pauses; others stop at once. Cost: the download, plus one hash of what was fetched before.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit

import xxhash

from data.config import DataError, DataUsageError
from data.durable import publish, write_durably, writing

PACKAGES = {
    "s3": "s3fs",
    "gs": "gcsfs",
    "http": "aiohttp",
    "https": "aiohttp",
    "hf": "huggingface_hub",
}
"""Scheme -> the package that fsspec needs for it."""
_ATTEMPTS = 8
_FIRST_PAUSE = 0.25
_PASSING = (408, 425, 429)
_STALLED_SECONDS = 60

Result = TypeVar("Result")


def fetch(url: str, folder: Path) -> list[Path]:
    """Every file that the URL names, a pattern or folder in sorted order, as files in `folder`."""
    scheme = urlsplit(url).scheme
    system = _system(url, scheme)
    return [_fetch_one(system, found, scheme, folder) for found in _expand(system, url, scheme)]


def _system(url: str, scheme: str) -> Any:
    if scheme not in PACKAGES:
        known = ", ".join(f"{name}://" for name in PACKAGES)
        raise DataUsageError(f"--input {url}: {scheme}:// is not supported; {known} are")
    package = PACKAGES[scheme]
    try:
        import fsspec

        if package != "aiohttp":
            return fsspec.filesystem(scheme)
        import aiohttp

        # Its own limit is 5 minutes for a whole file; a server's packing would not be the file's.
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=_STALLED_SECONDS)
        return fsspec.filesystem(
            scheme, client_kwargs={"timeout": timeout}, headers={"Accept-Encoding": "identity"}
        )
    except ImportError:
        raise DataUsageError(
            f"--input {url}: reading {scheme}:// needs the package {package}; install it with "
            f"{sys.executable} -m pip install {package}"
        ) from None


def _expand(system: Any, url: str, scheme: str) -> list[str]:
    """The URLs of single files."""
    if scheme in ("http", "https"):
        return [url]
    if any(mark in url for mark in "*?["):
        found = _tried(lambda: system.glob(url), url)
    elif _tried(lambda: system.isdir(url), url):
        found = _tried(lambda: system.find(url), url)
    else:
        return [url]
    names = sorted(f"{scheme}://{name}" for name in found if not _is_hidden(name))
    if not names:
        raise DataUsageError(f"--input {url}: nothing is there that matches")
    return names


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))


def _fetch_one(system: Any, url: str, scheme: str, folder: Path) -> Path:
    key = hashlib.blake2b(url.encode(), digest_size=8).hexdigest()
    name = unquote(urlsplit(url).path if scheme in ("http", "https") else url)
    path = folder / key / (name.rstrip("/").rsplit("/", 1)[-1] or "index")
    note = path.with_name(path.name + ".fetched.json")
    if _matches(path, note):
        return path
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")

    def download() -> None:
        system.get_file(url, str(part))
        expected = None if scheme in ("http", "https") else system.info(url).get("size")
        if expected is not None and part.stat().st_size != expected:
            raise OSError(f"got {part.stat().st_size} bytes of {expected}")

    try:
        _tried(download, url)
        with writing(part), part.open("rb") as stream:
            os.fsync(stream.fileno())
        publish(part, path)
    finally:
        part.unlink(missing_ok=True)
    fetched = {"url": _without_secrets(url), "bytes": path.stat().st_size, "xxh3": _hash(path)}
    write_durably(note, json.dumps(fetched).encode())
    return path


def _matches(path: Path, note: Path) -> bool:
    try:
        known = json.loads(note.read_bytes())
        return bool(known["bytes"] == path.stat().st_size and known["xxh3"] == _hash(path))
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _hash(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with path.open("rb") as stream:
        while block := stream.read(2**23):
            digest.update(block)
    return digest.hexdigest()


def _without_secrets(url: str) -> str:
    """The URL without a query, a fragment or a password: signed URLs hold credentials."""
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    return f"{parts.scheme}://{host}{parts.path}"


def _tried(action: Callable[[], Result], url: str) -> Result:
    """The action's result, tried again while its failures may pass."""
    # The pauses change no byte, and many jobs must not come back at one moment.
    rng = random.Random()
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            return action()
        except Exception as error:
            reason = _reason(error)
            if not _may_pass(error):
                raise DataUsageError(
                    f"--input {_without_secrets(url)} cannot be fetched ({reason}); check the "
                    "address, and whether you may read it"
                ) from error
            if attempt == _ATTEMPTS:
                raise DataError(
                    f"--input {_without_secrets(url)} could not be fetched in {_ATTEMPTS} attempts"
                    f" ({reason}); run the same command again when the server answers: what was "
                    "fetched is kept"
                ) from error
        time.sleep(_FIRST_PAUSE * 2 ** (attempt - 1) * rng.uniform(0.5, 1.5))
    raise AssertionError("the last attempt returns or raises")


def _status(error: BaseException | None) -> int | None:
    """The HTTP status of an error or of what caused it."""
    while error is not None:
        status = getattr(error, "status", None)
        if isinstance(status, int):
            return status
        error = error.__cause__
    return None


def _may_pass(error: Exception) -> bool:
    status = _status(error)
    if status is not None:
        return status >= 500 or status in _PASSING
    return not isinstance(
        error, FileNotFoundError | PermissionError | NotImplementedError | ValueError
    )


def _reason(error: Exception) -> str:
    status = _status(error) or (404 if isinstance(error, FileNotFoundError) else None)
    # The message itself may repeat a signed URL.
    words = type(error).__name__
    if isinstance(error, OSError) and status is None and "://" not in str(error):
        words = f"{words}: {error}"
    return f"HTTP {status}, {words}" if status else words
