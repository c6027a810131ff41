"""Cross entropy as a sum: whoever knows the global number of targets divides by it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

IGNORED = -100
"""Label of a place without a target."""


def token_loss_sum(logits_BTV: Tensor, labels_BT: Tensor) -> Tensor:
    """Sum of -ln p(label) in nats over labels != IGNORED: a scalar in fp32, or in float64 for such
    logits.

    labels[t] is the target of input t (already shifted). Costs one fp32 tensor of the logits' size.
    """
    wide = torch.promote_types(logits_BTV.dtype, torch.float32)
    # log_softmax fuses the cast on GPUs; cross_entropy would need a wide copy of the logits first.
    log_probs = torch.log_softmax(logits_BTV.flatten(0, 1), -1, dtype=wide)
    return F.nll_loss(log_probs, labels_BT.flatten(), ignore_index=IGNORED, reduction="sum")
