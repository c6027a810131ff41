"""How often a run reads each of its sources: known, told and limited before it begins."""

from __future__ import annotations

from dataclasses import dataclass

from data.config import DataUsageError
from data.stream import SampleStream


@dataclass(frozen=True)
class Use:
    """What a run needs of one source."""

    source: str
    epochs: float
    needed_tokens: int
    """Targets that the run trains on; where samples are padded, by their mean."""
    available_tokens: int
    """Targets of one epoch."""

    def __str__(self) -> str:
        return f"{self.source}: {self.epochs:.3g} epochs of {_short(self.available_tokens)} tokens"


def uses(stream: SampleStream, num_samples: int) -> list[Use]:
    """What the first `num_samples` samples need of each source that is named now."""
    epochs, shares = stream.epochs(num_samples), stream.mixture.shares(num_samples)
    found = []
    for name, source in stream.sources.items():
        needed = 0
        for seq_len, counts in shares:
            if counts[name]:
                samples = stream.at(seq_len or stream.seq_len).sources[name].samples
                needed += counts[name] * samples.num_targets // samples.geometry.num_samples
        found.append(
            Use(
                source=name,
                epochs=epochs[name],
                needed_tokens=needed,
                available_tokens=source.samples.num_targets,
            )
        )
    return found


def check_epochs(found: list[Use], max_epochs: float) -> None:
    """DataUsageError when a source would be read more often than `max_epochs`; 0 is no limit."""
    over = [use for use in found if max_epochs and use.epochs > max_epochs]
    if over:
        raise DataUsageError(
            "\n".join(
                f"source {use.source!r} would be read {use.epochs:.3g} times, more than "
                f"data.max_epochs={max_epochs:g}: the run needs {use.needed_tokens:,} of its "
                f"tokens, and one epoch holds {use.available_tokens:,}"
                for use in over
            )
            + "\nprepare more text, lower steps, batch_tokens or the weight of the source, or "
            "raise data.max_epochs (0 is no limit)"
        )


def _short(tokens: int) -> str:
    for size, letter in ((10**12, "T"), (10**9, "G"), (10**6, "M"), (10**3, "k")):
        if tokens >= size:
            return f"{tokens / size:.3g} {letter}"
    return str(tokens)
