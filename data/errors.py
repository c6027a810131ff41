"""The errors of this package; importing them costs nothing."""

from __future__ import annotations

import sys
from typing import ClassVar


class DataError(ValueError):
    """Data that is damaged, missing or not what it claims to be."""

    exit_code: ClassVar[int] = 1


class DataUsageError(DataError):
    """A request that cannot be met with this data, refused before anything is written."""

    exit_code: ClassVar[int] = 2


def missing_extra(what: str, extra: str, error: ImportError) -> DataUsageError:
    """The refusal of what needs an optional extra that is not installed."""
    return DataUsageError(
        f"{what} needs the packages of the extra {extra!r} ({error}); install them with "
        f"{sys.executable} -m pip install 'headrace[{extra}]'"
    )


class AccessError(DataError):
    """Data that cannot be read now: a network, a server, a right or a disk is in the way.

    It says nothing about the data, so nothing is ever taken for damaged because of it.
    """


class MissingError(AccessError):
    """A file that a server says is not there: it may be lost, or the address may be wrong."""
