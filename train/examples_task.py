"""Examples with targets as a task of the training loop: responses to prompts, or labels of texts.

Sample i of a run is example order(i % n) of epoch i // n. All examples are in memory on every rank,
so the number of targets of any step is known without asking the other ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from data.config import DataError
from data.instruct import order
from data.padding import padded_batches
from data.targets import Tokenized, fingerprint
from model.loss import IGNORED, token_loss_sum
from train.config import FinetuneConfig
from train.engine import Batch
from train.world import World

# B examples, T tokens, V vocabulary, L labels


class ExamplesTask:
    """Trains on targets of padded examples; validates on held-out ones."""

    def __init__(
        self,
        config: FinetuneConfig,
        train: Sequence[Tokenized],
        val: Sequence[Tokenized],
        *,
        labels: Sequence[str],
        micro_batch: int,
        pad_id: int,
    ) -> None:
        self.unit = "examples" if config.task == "classify" else "tokens"
        self._config = config
        self._train = train
        self._val = val
        self._labels = labels
        self._fingerprint = fingerprint(train)
        self._num_targets = np.array([example.num_targets for example in train])
        self._order = partial(order, num_examples=len(train), seed=config.seed)
        self._batches = partial(
            padded_batches, micro_batch=micro_batch, max_tokens=config.seq_len, pad_id=pad_id
        )

    def num_valid(self, step: int) -> int:
        """Targets of this step over all ranks."""
        return int(self._num_targets[self._order(range(*self.samples(step)))].sum())

    def samples(self, step: int) -> tuple[int, int]:
        """[first, last) sample indices of this step."""
        size = self._config.batch_size
        return (step - 1) * size, step * size

    def micro_batches(
        self, first_step: int, last_step: int, *, rank: int, num_ranks: int
    ) -> Iterator[Batch]:
        """This rank's micro-batches in training order."""
        for step in range(first_step, last_step + 1):
            yield from self._batches(
                self._train,
                range(*self.samples(step)),
                order=self._order,
                rank=rank,
                num_ranks=num_ranks,
            )

    def loss_sum(self, module: torch.nn.Module, batch: Batch) -> torch.Tensor:
        """Summed cross entropy of the targets of the micro-batch, in nats."""
        return _loss_sum(_logits(module, batch), batch["labels"])

    def reading(self, step: int) -> str:
        """The samples of the step; all examples are in memory."""
        first, last = self.samples(step)
        return f"reading samples {first} to {last - 1}"

    def validate(
        self, module: torch.nn.Module, world: World, *, is_over: Callable[[], bool]
    ) -> dict[str, float]:
        """Collective. Mean loss per target of at most eval.samples validation examples, drawn by
        the seed; of a classifier also accuracy and macro F1.
        """
        chosen = range(min(self._config.eval.samples, len(self._val)))
        draw = partial(
            order, num_examples=len(self._val), seed=self._config.seed, purpose="validation"
        )
        total = torch.zeros(2, dtype=torch.float64)
        confusion_LL = torch.zeros(len(self._labels), len(self._labels), dtype=torch.int64)
        batches = self._batches(
            self._val, chosen, order=draw, rank=world.rank, num_ranks=world.size
        )
        for batch in batches:
            if is_over():
                return {}
            batch = {key: value.to(world.device) for key, value in batch.items()}
            labels = batch["labels"]
            logits = _logits(module, batch)
            loss = float(_loss_sum(logits, labels))
            total += torch.tensor([loss, int((labels != IGNORED).sum())], dtype=torch.float64)
            if self._labels:
                confusion_LL += confusion(logits, labels)
        loss_sum, num_targets = world.sum(total).tolist()
        found = {"val_loss": loss_sum / num_targets}
        if self._labels:
            from train.scores import classification_scores

            scores = classification_scores(world.sum(confusion_LL).numpy(), self._labels)
            found["val_accuracy"] = scores["accuracy"]
            found["val_f1_macro"] = scores["f1_macro"]
        return found

    def data_state(self, step: int) -> dict[str, Any]:
        """Consumed samples, and what they were drawn from."""
        return {
            "consumed_samples": self.samples(step)[1],
            "seed": self._config.seed,
            "num_examples": len(self._train),
            "fingerprint": self._fingerprint,
        }

    def check_data_state(self, state: dict[str, Any]) -> None:
        """DataError when the checkpoint was trained on other examples or in another order."""
        now = self.data_state(0)
        names = ("seed", "num_examples", "fingerprint")
        if changed := [
            f"{name} {state.get(name)!r} in the checkpoint, {now[name]!r} now"
            for name in names
            if state.get(name) != now[name]
        ]:
            raise DataError(
                f"the examples of {self._config.data.path} are not those that the run was started "
                f"with: {'; '.join(changed)}; restore the file (and the tokenizer), or choose "
                "another --run"
            )
        if state.get("consumed_samples", 0) % self._config.batch_size:
            raise DataError(
                f"the checkpoint stands at sample {state['consumed_samples']}, which is no "
                f"multiple of batch_size={self._config.batch_size}; choose another --run"
            )


def confusion(logits_BL: torch.Tensor, labels_B: torch.Tensor) -> torch.Tensor:
    """[L,L] counts on the CPU: true label, then predicted label; labels of -100 do not count."""
    size = logits_BL.shape[-1]
    real = labels_B != IGNORED
    cells = labels_B[real] * size + logits_BL.argmax(-1)[real]
    return torch.bincount(cells.cpu(), minlength=size * size).reshape(size, size)


def _logits(module: torch.nn.Module, batch: Batch) -> torch.Tensor:
    output = module(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    logits: torch.Tensor = output.logits
    return logits


def _loss_sum(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    if labels.dim() == 1:
        # One label per example: a text of one token.
        return token_loss_sum(logits[:, None], labels[:, None])
    return token_loss_sum(logits, labels)
