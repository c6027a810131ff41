"""A function over many items in worker processes: results in order, a bounded number in flight.

Workers start fresh (forkserver), never as copies of a process that has threads, and leave when
their parent is gone, even if it was killed. With one worker everything runs in this process.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from types import TracebackType
from typing import TypeVar

from data.config import DataError, DataUsageError

Progress = Callable[[str, int, int], None]
"""Called with the name of a stage, what is done of it and all there is, in bytes of input."""

Item = TypeVar("Item")
Result = TypeVar("Result")


class WorkerDied(DataError):
    """A worker is gone; what was done is kept."""


class Pool:
    """`workers` processes for as long as the `with` block lasts."""

    def __init__(self, workers: int) -> None:
        if workers < 1:
            raise DataUsageError(f"--workers {workers}: at least one process has to do the work")
        self._workers = workers
        self._executor: ProcessPoolExecutor | None = None

    def __enter__(self) -> Pool:
        if self._workers > 1:
            self._executor = ProcessPoolExecutor(
                self._workers,
                mp_context=multiprocessing.get_context("forkserver"),
                initializer=_start_worker,
            )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._executor is not None:
            self._executor.shutdown(cancel_futures=True)

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """function(item) of every item, in order; at most two per worker are ahead of the reader.

        An exception of the function is raised here. WorkerDied when one dies.
        """
        if self._executor is None:
            yield from map(function, items)
            return
        ahead: deque[Future[Result]] = deque()
        try:
            for item in items:
                ahead.append(self._executor.submit(function, item))
                if len(ahead) > 2 * self._workers:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        except BrokenProcessPool as error:
            raise WorkerDied(
                "a worker process died, most likely killed for want of memory; run the same "
                f"command again: it continues (--workers below {self._workers} needs less memory)"
            ) from error


def _start_worker() -> None:
    # The parent handles Ctrl-C and then shuts its workers down.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Rayon would start one thread per core in every worker.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_leave_with_parent, daemon=True).start()


def _leave_with_parent() -> None:
    """A worker waits on a queue that it holds open itself, so it would outlive a killed parent."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
