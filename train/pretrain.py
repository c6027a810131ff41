"""Pretraining: a dataset of token shards, a GPT of ours, and the shared loop."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from data.config import DataUsageError
from data.loader import SampleStream, micro_batches
from data.verify import check_tokenizer
from model.flops import flops_per_token
from model.gpt import GPT, init_weights
from model.loss import token_loss_sum
from train.attempt import Work, run_attempt
from train.config import ConfigError, RunConfig, require_data
from train.engine import Batch
from train.run import Outcome
from train.world import World, join_world

log = logging.getLogger(__name__)


def pretrain(config: RunConfig, run: Path, *, stop_at: int | None = None) -> Outcome:
    """Collective. Train `run`, or continue it: the outcome is "complete" or "stopped".

    ConfigError when the run directory belongs to another config, DataError when the data cannot be
    read.
    """
    with join_world() as world:
        return run_attempt(world, run, pretraining(config, num_ranks=world.size), stop_at=stop_at)


def pretraining(config: RunConfig, *, num_ranks: int) -> Work:
    """The work of a pretraining run on `num_ranks` ranks, with the model resolved against the
    dataset.
    """
    require_data(config)
    stream = SampleStream(config.data.path, seq_len=config.seq_len, seed=config.seed)
    check_tokenizer(Path(config.data.path), stream.tokenizer_sha256)
    config = resolve(config, vocab_size=stream.vocab_size)
    micro_batch, accumulation = config.layout(config.batch_samples, num_ranks=num_ranks)

    def module() -> torch.nn.Module:
        gpt = GPT(config.model)
        init_weights(gpt, config.seed)
        return gpt

    return Work(
        config=config,
        task=PretrainTask(config, stream, micro_batch=micro_batch),
        module=module,
        steps=config.steps,
        micro_batch=micro_batch,
        accumulation=accumulation,
        tokenizer=Path(config.data.path),
        flops_per_token=flops_per_token(config.model, config.seq_len),
        identity={
            "tokenizer_sha256": stream.tokenizer_sha256,
            "bos": stream.bos,
            "data_fingerprint": stream.fingerprint,
        },
    )


def resolve(config: RunConfig, *, vocab_size: int) -> RunConfig:
    """The config with every value that follows from the dataset or from another key filled in."""
    if config.model.vocab_size not in (0, vocab_size):
        raise ConfigError(
            f"model.vocab_size={config.model.vocab_size}, but the dataset's tokenizer has "
            f"{vocab_size} ids; "
            "leave model.vocab_size at 0 to take it from the dataset"
        )
    model = config.model.model_copy(
        update={"vocab_size": vocab_size, "max_seq_len": config.model.max_seq_len or config.seq_len}
    )
    return config.model_copy(update={"model": model})


class PretrainTask:
    """Next-token prediction on permuted samples of a dataset."""

    unit = "tokens"

    def __init__(self, config: RunConfig, stream: SampleStream, *, micro_batch: int) -> None:
        self._config = config
        self._stream = stream
        self._micro_batch = micro_batch
        self._val_stream = _validation(config)

    def num_valid(self, step: int) -> int:
        """Every place of every sample has a target."""
        return self._config.batch_samples * self._config.seq_len

    def samples(self, step: int) -> tuple[int, int]:
        """[first, last) sample indices of this step."""
        size = self._config.batch_samples
        return (step - 1) * size, step * size

    def micro_batches(
        self, first_step: int, last_step: int, *, rank: int, num_ranks: int
    ) -> Iterator[Batch]:
        """This rank's micro-batches in training order."""
        return micro_batches(
            self._stream,
            first_sample=self.samples(first_step)[0],
            batch_samples=self._config.batch_samples,
            num_steps=last_step - first_step + 1,
            rank=rank,
            num_ranks=num_ranks,
            micro_batch=self._micro_batch,
            num_workers=self._config.data.num_workers,
        )

    def loss_sum(self, module: torch.nn.Module, batch: Batch) -> torch.Tensor:
        """Summed cross entropy of the micro-batch, in nats."""
        return token_loss_sum(module(batch["input_ids"], batch["position_ids"]), batch["labels"])

    def validate(self, module: torch.nn.Module, world: World) -> dict[str, float]:
        """Collective. Mean loss per token of the first eval.samples validation samples."""
        stream = self._val_stream
        if stream is None:
            return {}
        count = min(self._config.eval.samples, stream.num_samples_per_epoch)
        batches = micro_batches(
            stream,
            first_sample=0,
            batch_samples=count,
            num_steps=1,
            rank=world.rank,
            num_ranks=world.size,
            micro_batch=self._micro_batch,
            num_workers=0,
        )
        total = torch.zeros((), dtype=torch.float64)
        for batch in batches:
            del batch["data_hash"]
            placed = {key: value.to(world.device) for key, value in batch.items()}
            total += self.loss_sum(module, placed).double().cpu()
        return {"val_loss": float(world.sum(total)) / (count * self._config.seq_len)}

    def data_state(self, step: int) -> dict[str, Any]:
        """Consumed samples, seed, phases and fingerprints."""
        return self._stream.state(self.samples(step)[1])

    def check_data_state(self, state: dict[str, Any]) -> None:
        """DataError when the checkpoint was trained on other data or in another order."""
        self._stream.check_state(state)


def _validation(config: RunConfig) -> SampleStream | None:
    try:
        return SampleStream(
            config.data.path, seq_len=config.seq_len, seed=config.seed, split="val", shuffle=False
        )
    except DataUsageError as error:
        log.warning("no validation loss in this run: %s", error)
        return None
