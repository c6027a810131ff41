"""What can go wrong with data, as errors meant for people; the command line leaves with their `exit_code`."""

from typing import ClassVar


class DataError(ValueError):
    """Data that is damaged, missing or not what it claims to be."""

    exit_code: ClassVar[int] = 1


class DataUsageError(DataError):
    """A request that cannot be met with this data, refused before anything is written."""

    exit_code: ClassVar[int] = 2
