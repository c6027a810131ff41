"""Files behind a URL: inputs, fetched once into a folder, and datasets, read by ranges.

s3:// gs:// http:// https:// hf://. The only module that imports fsspec. A kept input counts when
the note beside it (size and hash) was written, last; a later call holds the file against its note
and does not ask the server again. Failures: data/retries.py. Cost: the download, plus one hash of
what was fetched before.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit

import xxhash

from data.config import AccessError, DataUsageError, check_public
from data.drafts import draft
from data.durable import write_durably, writing
from data.retries import Wish, WrongAnswer, tried, without_secrets

PACKAGES = {
    "s3": "s3fs",
    "gs": "gcsfs",
    "http": "aiohttp",
    "https": "aiohttp",
    "hf": "huggingface_hub",
}
"""Scheme -> the package that fsspec needs for it."""
_STALLED_SECONDS = 60


class UrlFiles:
    """The files of a dataset below a URL."""

    has_ranges = True

    def __init__(self, url: str) -> None:
        check_public(url)
        self.location = url
        self._url = url.rstrip("/")
        self._scheme = urlsplit(url).scheme
        self._system: Any = None
        # Refused before anything is asked of a server.
        _system(self._url, self._scheme, "dataset ")

    def __getstate__(self) -> dict[str, Any]:
        # A file system belongs to the process whose threads serve it.
        return {**vars(self), "_system": None}

    def name(self, file: str) -> str:
        """The URL of a file."""
        return f"{self._url}/{quote(file) if self._is_http else file}"

    def whole(self, file: str) -> bytes:
        """A small file. AccessError when it cannot be had."""
        url = self.name(file)
        found: bytes = tried(lambda: self._files().cat_file(url), Wish(url))
        return found

    def size(self, file: str) -> int:
        """The bytes of a file, without reading it."""
        url = self.name(file)

        def ask() -> int:
            size = self._files().info(url).get("size")
            if size is None:
                raise WrongAnswer("the server does not say how long the file is")
            return int(size)

        return tried(ask, Wish(url))

    def read(self, file: str, start: int, stop: int) -> bytes:
        """Bytes [start, stop) of a file, never more or fewer. AccessError when they are not given.

        Whether they are the right ones only their hash can tell.
        """
        url = self.name(file)
        cure = (
            "the file there is not the one that the manifest lists, or the server does not give "
            "parts of files: copy the dataset again, or to another place"
        )

        def ask() -> bytes:
            found = self._range(url, start, stop)
            if len(found) != stop - start:
                raise WrongAnswer(
                    f"bytes {start} to {stop - 1} were asked for, {len(found)} bytes came"
                )
            return found

        return tried(ask, Wish(url, cure))

    def _range(self, url: str, start: int, stop: int) -> bytes:
        files = self._files()
        if not self._is_http:
            found: bytes = files.cat_file(url, start=start, end=stop)
            return found
        # Unlike cat_file it does not download a whole file that a server gives instead of a part.
        with files.open(url, "rb", size=stop, cache_type="none") as stream:
            stream.seek(start)
            try:
                part: bytes = stream.read(stop - start)
            except ValueError:
                # To ask again will not do: it answers 200 where 206 would be the part.
                raise AccessError(
                    f"{without_secrets(url)} cannot be read in parts: bytes {start} to {stop - 1} "
                    "were asked for, the server gave the whole file; copy the dataset to a server "
                    "that gives ranges, or to a directory"
                ) from None
        if not part:
            raise ValueError("the file ends before the bytes that were asked for")
        return part

    @property
    def _is_http(self) -> bool:
        return self._scheme in ("http", "https")

    def _files(self) -> Any:
        if self._system is None:
            self._system = _system(self._url, self._scheme, "dataset ")
        return self._system


def fetch(
    url: str, folder: Path, excludes: Callable[[str, int], bool] = lambda url, below: False
) -> list[Path]:
    """Every file that the URL names, a pattern or folder in sorted order, as files in `folder`;
    not those that are excluded, of whose parts the first `below` are what a person wrote.
    """
    scheme = urlsplit(url).scheme
    system = _system(url, scheme, "--input ")
    found = _expand(system, url, scheme)
    # In the address of a page a question mark is no part of a name.
    is_page = scheme in ("http", "https")
    own = Path(url.partition("?")[0] if is_page else url).parts
    if found == [url]:
        below = len(own) - 1
    else:
        below = next((i for i, part in enumerate(own) if set(part) & set("*?[")), len(own))
    names = {name: name.partition("?")[0] if is_page else name for name in found}
    left = [name for name, told in names.items() if not excludes(told, below)]
    return [_fetch_one(system, name, scheme, folder) for name in left]


def _system(url: str, scheme: str, noun: str) -> Any:
    if scheme not in PACKAGES:
        known = ", ".join(f"{name}://" for name in PACKAGES)
        raise DataUsageError(
            f"{noun}{without_secrets(url)}: {scheme}:// is not supported; {known} are"
        )
    package = PACKAGES[scheme]
    try:
        import fsspec

        if package != "aiohttp":
            return fsspec.filesystem(scheme)
        import aiohttp

        # Its own limit is 5 minutes for a whole file; a server's packing would not be the file's.
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=_STALLED_SECONDS)
        traces = [_whole_files()] if noun == "--input " else []
        return fsspec.filesystem(
            scheme,
            # trust_env: passwords from ~/.netrc, proxies from the environment.
            client_kwargs={"timeout": timeout, "trust_env": True, "trace_configs": traces},
            headers={"Accept-Encoding": "identity"},
        )
    except ImportError:
        raise DataUsageError(
            f"{noun}{without_secrets(url)}: reading {scheme}:// needs the package {package}; "
            f"install it with {sys.executable} -m pip install {package}"
        ) from None


@lru_cache(maxsize=1)
def _whole_files() -> Any:
    """What looks at every answer before its body is read: fsspec takes any that is no failure."""
    import aiohttp

    async def refuse(session: Any, context: Any, told: Any) -> None:
        answer, why = told.response, ""
        encoding = answer.headers.get("Content-Encoding", "identity").strip().lower()
        if 200 < answer.status < 300:
            why = f"HTTP {answer.status} to a request for all of it"
        elif answer.status == 200 and encoding not in ("", "identity"):
            # Nobody tells a packed body that was cut from a whole one, once it is unpacked.
            why = f"packed as Content-Encoding {encoding!r}, which was not asked for"
        if told.method == "GET" and why:
            answer.close()
            raise DataUsageError(
                f"--input {without_secrets(str(told.url))}: the server's answer cannot be taken "
                f"for the whole file ({why}); fetch the file by other means, and name it"
            )

    config = aiohttp.TraceConfig()
    config.on_request_end.append(refuse)
    return config


def writable_system(url: str) -> Any:
    """fsspec's file system of a place that is written to, of any scheme that it knows.
    DataUsageError when there is none, or when the URL holds a secret.
    """
    check_public(url, "mirror")
    scheme, name = urlsplit(url).scheme, without_secrets(url)
    if scheme in ("http", "https"):
        raise DataUsageError(f"{name} cannot be written: {scheme}:// is only read; name a folder")
    try:
        import fsspec

        return fsspec.filesystem(scheme)
    except ImportError as error:
        raise DataUsageError(
            f"{name}: writing to {scheme}:// needs a package ({error}); install it with "
            f"{sys.executable} -m pip install {PACKAGES.get(scheme, 'PACKAGE')}"
        ) from None
    except ValueError:
        raise DataUsageError(
            f"{name}: fsspec knows no {scheme}://; name a folder, or a URL such as s3://BUCKET/PATH"
        ) from None


def _expand(system: Any, url: str, scheme: str) -> list[str]:
    """The URLs of single files."""
    if scheme in ("http", "https"):
        return [url]
    wish = Wish(url, is_input=True)
    if any(mark in url for mark in "*?["):
        found = tried(lambda: system.glob(url), wish)
    elif tried(lambda: system.isdir(url), wish):
        found = tried(lambda: system.find(url), wish)
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
    with draft(path, folder) as part:

        def download() -> None:
            expected = _get(system, url, scheme, part)
            if expected is not None and part.stat().st_size != expected:
                raise OSError(f"got {part.stat().st_size} bytes of {expected}")

        tried(download, Wish(url, is_input=True))
        with writing(part), part.open("rb") as stream:
            os.fsync(stream.fileno())
        # Of what was fetched: under its name somebody else may have put another one since.
        size, xxh3 = part.stat().st_size, _hash(part)
    fetched = {"url": without_secrets(url), "bytes": size, "xxh3": xxh3}
    write_durably(note, json.dumps(fetched).encode())
    return path


def _get(system: Any, url: str, scheme: str, part: Path) -> int | None:
    """Fetch a file as `part`; how long the server says that it is, where it says so."""
    if scheme not in ("http", "https"):
        system.get_file(url, str(part))
        size: int | None = system.info(url).get("size")
        return size
    from fsspec.callbacks import Callback

    announced = Callback()
    system.get_file(url, str(part), callback=announced)
    if announced.size is None:
        # The file ended with the connection, whoever closed it. HEAD may know better.
        with suppress(FileNotFoundError):
            announced.size = system.info(url).get("size") or None
    length: int | None = announced.size
    return length


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
