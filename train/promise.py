"""What a resumed run promises of the numbers to come, in one sentence.

The samples and their order are the same in any case. Bits follow from the order of additions, which
the layout fixes (ranks, ZeRO, micro-batch), and from the kernels: those of a device, of a number of
CPU threads, of a release. GPU kernels may besides add up in another order every time. Which steps
are taken at all follows from the guard. Compared is the attempt that wrote the checkpoint: one in
between that left none has no part in what is to come.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from train.settings import TrainConfig

ADDITIONS = ("world_size", "micro_batch", "zero.", "deepspeed.")
MACHINE = ("device", "processor", "instructions", "threads")
KERNELS = (*MACHINE, "python", "torch", "deepspeed", "numpy", "headrace", "train.")
CHOICES = ("guard.", "data.on_damage")
"""What decides about steps and samples that are left out."""
ONLY_LOOKS = ("guard.check_every", "guard.repeat_every")

PHASES = ("data.sources", "batch_tokens", "seq_len")


def promise(train: TrainConfig, changed: Sequence[str], *, device: str) -> str:
    """For `KEY: OLD -> NEW` of what differs from the attempt that wrote the checkpoint
    (train/attempts.py).
    """
    exact = train.reproducible == "across_world_sizes"
    counted = KERNELS if exact else (*ADDITIONS, *KERNELS)
    other = []
    if chosen := [c for c in changed if c.startswith(CHOICES) and not c.startswith(ONLY_LOOKS)]:
        other.append(f"others of them may be left out, because of {'; '.join(chosen)}")
    if matter := [change for change in changed if change.startswith(counted)]:
        # Dropout is drawn by the micro-batch (train/passes.py), of which there are others then.
        more = any(change.startswith(("world_size", "micro_batch")) for change in matter)
        by = "last digits (under dropout by more)" if more else "last digits"
        other.append(f"losses may differ in their {by}, because of {'; '.join(matter)}")
    elif device != "cpu" and not train.repeats:
        other.append(
            "losses may differ in their last digits, as GPU kernels do without "
            "train.deterministic=true"
        )
    if other:
        return (
            "the samples and their order are those of a run that did not stop here; "
            f"{', and '.join(other)}"
        )
    same = ""
    if any(change.startswith(PHASES) for change in changed):
        same = "with the same phases "
    return f"every number is, to the last bit, that of a run {same}that did not stop here"


def skipped_too_late(then: Iterable[int], now: Iterable[int], *, step: int) -> list[int]:
    """Steps of a new guard.skip_steps, and of none before, that a run which stands at `step` has
    behind it.
    """
    return sorted(number for number in set(now) - set(then) if number <= step)
