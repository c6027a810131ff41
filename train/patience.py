"""Reads that outlast a file server which is busy or starts again. No torch here.

Whoever gave up at once would resume from an earlier checkpoint, and the good one would be removed
with the next commit.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from typing import TypeVar

PASSING = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT)
"""What a network file system answers while its server is away for a moment."""
PAUSES = (0.5, 2.0, 8.0)
"""Seconds between attempts."""

Answer = TypeVar("Answer")


def insisting(ask: Callable[[], Answer]) -> Answer:
    """The answer of a file system, asked again while it may yet give one; its last OSError else."""
    for pause in PAUSES:
        try:
            return ask()
        except OSError as error:
            if error.errno not in PASSING:
                raise
        time.sleep(pause)
    return ask()
