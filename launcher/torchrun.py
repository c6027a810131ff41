"""`python -m launcher.torchrun ...` is torchrun, but for its last words: one line instead of sixty.

How the first rank failed is left in the folder of the launch (launcher/mailbox.py), for the
launcher to say; being asked to end is no failure. Any other exception keeps its traceback.
"""

from __future__ import annotations

import logging
import os
import runpy
import sys
from types import TracebackType
from typing import Any

from launcher import mailbox


def main() -> None:
    """Be torchrun, with this process's own arguments."""
    # Its log repeats what the ranks themselves have told.
    logging.disable(logging.ERROR)
    sys.excepthook = _last_words
    runpy.run_module("torch.distributed.run", run_name="__main__", alter_sys=True)


def _last_words(kind: type[BaseException], error: Any, trace: TracebackType | None) -> None:
    # By name, because torch is not imported in this package.
    if kind.__name__ == "ChildFailedError":
        rank, failure = error.get_first_failure()
        ended = failure.signal_name() if failure.exitcode < 0 else f"code {failure.exitcode}"
        folder = mailbox.folder_of(os.environ)
        if folder is not None:
            mailbox.write(folder / mailbox.LAST_WORDS, f"rank {rank} ended with {ended}")
    elif kind.__name__ != "SignalException":
        sys.__excepthook__(kind, error, trace)


if __name__ == "__main__":
    main()
