"""Attempts at what may fail for a while: cut connections, timeouts, busy servers.

Failures that may pass are tried 8 times within about 30 s of growing pauses, and not again once
5 minutes are over; others stop at once. Messages hold no password and no query of a URL.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar
from urllib.parse import urlsplit

from data.config import AccessError, DataError, DataUsageError, MissingError

_ATTEMPTS = 8
_FIRST_PAUSE = 0.25
_BUDGET_SECONDS = 300.0
_PASSING = (408, 425, 429)

Result = TypeVar("Result")


class WrongAnswer(OSError):
    """An answer that came without an error and is not what was asked for; the message says why."""


@dataclass(frozen=True)
class Wish:
    """What messages say of the thing that is fetched."""

    name: str
    """Its URL; secrets in it are left out."""
    cure: str = "check the address, and whether you may read it"
    is_input: bool = False
    """Of a preparation, where a person has just written the URL."""

    def refusal(self, reason: str, *, is_missing: bool) -> DataError:
        """It will not do to ask again."""
        kind: type[DataError] = MissingError if is_missing else AccessError
        kind = DataUsageError if self.is_input else kind
        return kind(f"{self} cannot be fetched ({reason}); {self.cure}")

    def surrender(self, attempts: int, reason: str) -> DataError:
        """Asking again has not helped."""
        kind = DataError if self.is_input else AccessError
        return kind(
            f"{self} could not be fetched in {attempts} attempts ({reason}); run the same command "
            "again when the server answers: what was fetched is kept"
        )

    def __str__(self) -> str:
        return f"{'--input ' if self.is_input else ''}{without_secrets(self.name)}"


def tried(action: Callable[[], Result], wish: Wish) -> Result:
    """The action's result, tried again while its failures may pass."""
    # The pauses change no byte, and many jobs must not come back at one moment.
    rng = random.Random()
    started = time.monotonic()
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            return action()
        except DataError:
            raise
        except Exception as error:
            reason = _reason(error)
            if not _may_pass(error):
                missing = isinstance(error, FileNotFoundError) and _status(error) in (None, 404)
                raise wish.refusal(reason, is_missing=missing) from error
            if attempt == _ATTEMPTS or time.monotonic() - started > _BUDGET_SECONDS:
                raise wish.surrender(attempt, reason) from error
        time.sleep(_FIRST_PAUSE * 2 ** (attempt - 1) * rng.uniform(0.5, 1.5))
    raise AssertionError("the last attempt returns or raises")


def without_secrets(url: str) -> str:
    """The URL without a query, a fragment or a password: signed URLs hold credentials."""
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    return f"{parts.scheme}://{host}{parts.path}"


def _status(error: BaseException | None) -> int | None:
    """The HTTP status of an error or of what caused it, as each library says it."""
    while error is not None:
        answer = getattr(error, "response", None)
        code = "code" if type(error).__module__.startswith("gcsfs") else "status"
        for holder, name in ((error, code), (answer, "status_code")):
            status = getattr(holder, name, None)
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
    if isinstance(error, WrongAnswer):
        return str(error)
    status = _status(error) or (404 if isinstance(error, FileNotFoundError) else None)
    # The message itself may repeat a signed URL.
    words = type(error).__name__
    if isinstance(error, OSError) and status is None and "://" not in str(error):
        words = f"{words}: {error}"
    return f"HTTP {status}, {words}" if status else words
