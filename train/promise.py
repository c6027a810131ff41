"""What a resumed run promises of the numbers to come, in one sentence.

The samples and their order are the same in any case. Bits follow from the order of additions, which
the layout fixes (ranks, ZeRO, micro-batch), and from the kernels: those of a device, of a number of
CPU threads, of a release. GPU kernels may besides add up in another order every time.
"""

from __future__ import annotations

from collections.abc import Sequence

from train.settings import TrainConfig

ADDITIONS = ("world_size", "micro_batch", "zero.", "deepspeed.")
KERNELS = ("device", "threads", "python", "torch", "deepspeed", "numpy", "headrace", "train.")

PHASES = ("data.sources", "batch_tokens", "seq_len")


def promise(train: TrainConfig, changed: Sequence[str], *, device: str) -> str:
    """For `KEY: OLD -> NEW` of what differs from the attempt before (train/attempts.py)."""
    exact = train.reproducible == "across_world_sizes"
    counted = KERNELS if exact else (*ADDITIONS, *KERNELS)
    matter = [change for change in changed if change.startswith(counted)]
    if matter:
        return (
            "the samples and their order are those of a run that was not interrupted; losses may "
            f"differ in their last digits, because of {'; '.join(matter)}"
        )
    if device == "cpu" or train.repeats:
        same = ""
        if any(change.startswith(PHASES) for change in changed):
            same = "with the same phases "
        return f"every number is, to the last bit, that of a run {same}that was not interrupted"
    return (
        "the samples and their order are those of a run that was not interrupted; losses may "
        "differ in their last digits, as GPU kernels do without train.deterministic=true"
    )
