"""Where one process runs a model that is not trained."""

from __future__ import annotations

import torch


def best_device() -> tuple[torch.device, torch.dtype | None]:
    """A GPU with weights as they are stored, or the CPU with fp32 weights.

    A dtype of None means: as stored.
    """
    if torch.cuda.is_available():
        return torch.device("cuda"), None
    return torch.device("cpu"), torch.float32
