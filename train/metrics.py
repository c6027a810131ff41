"""metrics.jsonl is the truth; the progress line and wandb are views of it that can never block or
kill a run.

One writer (rank 0), append-only, one JSON object per line; numbers round-trip exactly. When a
resumed run repeats steps, the last row of a step wins. The only module that imports wandb.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from data.durable import RowFile, StorageError
from train.rows import Row as Row
from train.rows import read_metrics as read_metrics
from train.settings import LogConfig

log = logging.getLogger(__name__)

FINISH_SECONDS = 60
"""How long the end of a run waits for wandb."""


class View(Protocol):
    """Shows rows somewhere."""

    def show(self, row: Row) -> None:
        """Show one row of metrics.jsonl."""

    def close(self) -> None:
        """Release what the view holds."""


class Metrics:
    """Appends rows to RUN/metrics.jsonl and passes them on; on ranks but 0 it does nothing."""

    def __init__(self, run: Path, *, enabled: bool, views: list[View]) -> None:
        self._run = run
        self._rows = RowFile(run / "metrics.jsonl") if enabled else None
        self._views = views if enabled else []
        self.failure: StorageError | None = None
        """Why no more rows are written."""

    def write(self, row: Row) -> None:
        """Append one row. Storage that refuses it is no error before `sync`, where all ranks hear
        of it; until then nothing more is written.
        """
        if self._rows is None or self.failure is not None:
            return
        try:
            self._rows.append(row)
        except StorageError as error:
            self.failure = error
        for view in list(self._views):
            if not _survives(view, lambda view=view: view.show(row)):  # type: ignore[misc]
                self._views.remove(view)

    def has_validation(self, step: int) -> bool:
        """Whether a validation row of this step was written, by whatever attempt."""
        return any(row["step"] == step and "val_loss" in row for row in read_metrics(self._run))

    def sync(self) -> None:
        """Push all rows to the disk; StorageError when it has refused one."""
        if self.failure is not None:
            raise self.failure
        if self._rows is not None:
            self._rows.sync()

    def close(self) -> None:
        """Close the file and every view."""
        if self._rows is not None:
            # Rows behind the last checkpoint are written again by whoever resumes.
            with suppress(StorageError):
                self._rows.close()
        for view in self._views:
            _survives(view, view.close)


def _survives(view: View, call: Callable[[], None]) -> bool:
    try:
        call()
    except Exception as error:
        log.warning("%s is switched off for this attempt: %s", type(view).__name__, error)
        return False
    return True


class ProgressLine:
    """A live line on stderr with a bar, loss, lr, grad norm, tokens/s, MFU and ETA; plain lines
    when stderr is a file.
    """

    PLAIN_SECONDS = 10.0

    def __init__(self, *, steps: int, first_step: int, unit: str) -> None:
        self._console = Console(stderr=True)
        self._steps = steps
        self._unit = unit
        self._last = 0.0
        self._text = ""
        self._progress: Progress | None = None
        if self._console.is_terminal:
            self._progress = Progress(
                BarColumn(bar_width=20),
                MofNCompleteColumn(),
                TextColumn("{task.fields[text]}"),
                TextColumn("eta"),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._task = self._progress.add_task("", total=steps, completed=first_step - 1, text="")
            self._progress.start()

    def show(self, row: Row) -> None:
        """Redraw the line, or print one now and then."""
        if "val_loss" in row:
            self._print(f"step {row['step']}/{self._steps}  val {row['val_loss']:.4f}")
        if "loss" not in row:
            return
        mfu = f"  mfu {row['mfu']:.1%}" if row.get("mfu") else ""
        text = (
            f"loss {row['loss']:.4f}  lr {row['lr']:.2e}  grad {row['grad_norm']:.2f}  "
            f"{row['tokens_per_second']:,.0f} {self._unit}/s{mfu}"
        )
        if self._progress is not None:
            self._progress.update(self._task, completed=row["step"], text=text)
        elif time.monotonic() - self._last > self.PLAIN_SECONDS or row["step"] == self._steps:
            self._last = time.monotonic()
            self._print(f"step {row['step']}/{self._steps}  {text}  eta {row['eta_seconds']:.0f} s")

    def _print(self, text: str) -> None:
        if self._progress is not None:
            self._progress.console.print(text, highlight=False, soft_wrap=True)
        else:
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leave the last state of the line on the screen."""
        if self._progress is not None:
            self._progress.stop()


class WandbView:
    """The same rows in Weights & Biases."""

    def __init__(self, run: Path, config: LogConfig, settings: Row) -> None:
        import wandb

        self._run = wandb.init(
            project=config.wandb_project,
            name=run.name,
            dir=run,
            mode="online" if config.wandb == "online" else "offline",
            config=settings,
            settings=wandb.Settings(
                init_timeout=30, console="off", x_disable_stats=True, silent=True
            ),
        )

    def show(self, row: Row) -> None:
        """Log the numbers of one row under its step; wandb itself refuses steps that go backwards,
        so `step` is a field.
        """
        self._run.log({key: value for key, value in row.items() if isinstance(value, (int, float))})

    def close(self) -> None:
        """Finish the wandb run; after FINISH_SECONDS it is left to `wandb sync`."""
        ending = threading.Thread(target=self._run.finish, daemon=True)
        ending.start()
        ending.join(FINISH_SECONDS)
        if ending.is_alive():
            log.warning("wandb has not finished in %d s; send RUN/wandb later", FINISH_SECONDS)


def wandb_views(run: Path, config: LogConfig, settings: Row) -> list[View]:
    """A wandb view when the config asks for one; a failure to start is a warning, never the end of
    a run.
    """
    if config.wandb == "off":
        return []
    try:
        return [WandbView(run, config, settings)]
    except Exception as error:
        log.warning("wandb is switched off for this attempt: %s", error)
        return []
