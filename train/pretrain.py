"""Pretraining: a dataset of token shards, a GPT of ours, and the shared loop."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data.config import Boundaries, DataUsageError
from data.config import accumulation as rounds
from data.epochs import check_epochs, uses
from data.loader import SampleStream, micro_batches
from data.phases import Phases, RunPhase
from data.sources import data_of, open_datasets
from data.verify import tokenizer_of
from model.flops import flops_per_token
from model.gpt import GPT, init_weights
from model.loss import IGNORED, token_loss_sum
from train.attempt import run_attempt
from train.checkpoint import completed_steps
from train.config import ConfigError, RunConfig, require_data
from train.engine import Batch
from train.phases import History, phases_of, read_phases
from train.restore import restore_newer
from train.run import Outcome
from train.work import Work
from train.world import World, join_world

log = logging.getLogger(__name__)


def pretrain(
    config: RunConfig, run: Path, *, stop_at: int | None = None, allow_change: Sequence[str] = ()
) -> Outcome:
    """Collective. Train `run`, or continue it: the outcome is "complete" or "stopped".

    ConfigError when the run directory belongs to another config, DataError when the data cannot be
    read.
    """
    with join_world(stall_seconds=config.stall_seconds, repeats=config.train.repeats) as world:
        return pretrain_on(world, config, run, stop_at=stop_at, allow_change=allow_change)


def pretrain_on(
    world: World,
    config: RunConfig,
    run: Path,
    *,
    stop_at: int | None = None,
    allow_change: Sequence[str] = (),
) -> Outcome:
    """Collective. `pretrain` in a world that stands."""
    restore_newer(world, run, config.checkpoint.mirror)
    history = History()
    with world.together("reading the phases of the run"):
        if world.is_main:
            history = History(read_phases(run), completed_steps(run))
    # Read once: rank 0 appends to it before others might get to it.
    history = world.broadcast(history)
    with world.together("opening the data"):
        work = pretraining(
            config, num_ranks=world.size, history=history, allow_change=tuple(allow_change)
        )
    return run_attempt(world, run, work, stop_at=stop_at)


def pretraining(
    config: RunConfig,
    *,
    num_ranks: int,
    history: History | None = None,
    allow_change: tuple[str, ...] = (),
) -> Work:
    """The work of a pretraining run on `num_ranks` ranks, with the model resolved against the
    dataset.
    """
    require_data(config)
    # The config comes from the command line and a recipe: a person has written its commands.
    datasets = open_datasets(
        data_of(config.data), seq_len=config.seq_len, config=config.data, commands=True
    )
    tokenizers = [
        tokenizer_of(place, file, datasets.tokenizer_sha256, datasets.special_ids)
        for place, file in datasets.places
    ]
    phases = phases_of(config, datasets, history or History(), allow_change)
    stream = SampleStream(datasets, seq_len=config.seq_len, seed=config.seed, phases=phases)
    _check_boundaries(stream, config.data.boundaries)
    found = uses(stream, phases.samples(config.steps)[1])
    for use in found:
        log.info("%s", use)
    check_epochs(found, config.data.max_epochs)
    longest = max(row.seq_len for row in phases.rows)
    config = resolve(config, vocab_size=stream.vocab_size, longest=longest)
    micro_batch, accumulation = config.layout(config.batch_samples, num_ranks=num_ranks)

    def module() -> torch.nn.Module:
        gpt = GPT(config.model)
        init_weights(gpt, config.seed)
        return gpt

    return Work(
        config=config,
        task=PretrainTask(
            config, stream, phases, micro_batch=micro_batch, accumulation=accumulation
        ),
        module=module,
        steps=config.steps,
        micro_batch=micro_batch,
        accumulation=accumulation,
        tokenizer=tokenizers[0],
        flops_per_token=flops_per_token(config.model, config.seq_len),
        identity={
            "tokenizer_sha256": stream.tokenizer_sha256,
            "bos": stream.bos,
            "data_fingerprint": stream.fingerprint,
        },
        phase=phases.rows[-1],
        allow_change=allow_change,
    )


def resolve(config: RunConfig, *, vocab_size: int, longest: int = 0) -> RunConfig:
    """The config with every value that follows from the dataset or from another key filled in.
    `longest` is the greatest seq_len that the run has had.
    """
    if config.model.vocab_size not in (0, vocab_size):
        raise ConfigError(
            f"model.vocab_size={config.model.vocab_size}, but the dataset's tokenizer has "
            f"{vocab_size} ids; "
            "leave model.vocab_size at 0 to take it from the dataset"
        )
    length = config.model.max_seq_len or max(config.seq_len, longest)
    model = config.model.model_copy(update={"vocab_size": vocab_size, "max_seq_len": length})
    return config.model_copy(update={"model": model})


class PretrainTask:
    """Next-token prediction on permuted samples of a dataset."""

    unit = "tokens"

    def __init__(
        self,
        config: RunConfig,
        stream: SampleStream,
        phases: Phases,
        *,
        micro_batch: int,
        accumulation: int,
    ) -> None:
        self._config = config
        self._stream = stream
        self._phases = phases
        self._micro_batch = micro_batch
        self._accumulation = accumulation
        self._val_stream = _validation(config)

    def num_valid(self, step: int) -> int | None:
        """Every place of every sample has a target, unless packing, the ends of documents or damage
        count.
        """
        data = self._config.data
        if (data.boundaries, data.packing, data.on_damage) != ("ignore", "concat", "fail"):
            return None
        phase = self._phases.at(step)
        return phase.batch_samples * phase.seq_len

    def samples(self, step: int) -> tuple[int, int]:
        """[first, last) sample indices of this step."""
        return self._phases.samples(step)

    def micro_batches(
        self, first_step: int, last_step: int, *, rank: int, num_ranks: int
    ) -> Iterator[Batch]:
        """This rank's micro-batches in training order, as many in each step.

        ConfigError when steps of an earlier phase have to be repeated (its last checkpoint is
        damaged) that need more micro-batches than those of the last phase.
        """
        segments = list(self._phases.segments(first_step, last_step))
        for start, end, phase in segments:
            needed = rounds(phase.batch_samples, num_ranks, self._micro_batch)
            if needed > self._accumulation:
                raise ConfigError(self._repeating(start, end, phase))
        return itertools.chain.from_iterable(
            micro_batches(
                self._stream.at(phase.seq_len),
                first_sample=self.samples(start)[0],
                batch_samples=phase.batch_samples,
                num_steps=end - start + 1,
                rank=rank,
                num_ranks=num_ranks,
                micro_batch=self._micro_batch,
                num_micro=self._accumulation,
                num_workers=self._config.data.num_workers,
                boundaries=self._config.data.boundaries,
                on_damage=self._config.data.on_damage,
            )
            for start, end, phase in segments
        )

    def _repeating(self, start: int, end: int, phase: RunPhase) -> str:
        values = f"batch_tokens={phase.batch_samples * phase.seq_len}"
        options = f"--allow-change batch_tokens --stop-at {end}"
        if phase.seq_len != self._config.seq_len:
            values = f"seq_len={phase.seq_len} {values}"
            options = f"--allow-change seq_len {options}"
        return (
            f"the run goes on from step {start - 1}, where an earlier phase with {values} held; "
            f"restore the checkpoint of step {end}, or repeat those steps with `{values} "
            f"{options}`, and change it again then"
        )

    def reading(self, step: int) -> str:
        """The samples of the step, and their shards by the manifest: files may not answer."""
        first, last = self.samples(step)
        told = f"reading samples {first} to {last - 1}"
        if self._config.data.packing != "concat":
            return told
        stream = self._stream.at(self._phases.at(step).seq_len)
        sources, _, offsets = stream.locate(np.arange(first, last))
        places = zip(sources.tolist(), offsets.tolist(), strict=True)
        shards = {stream.source(k).tokens.shard_of(offset) for k, offset in places}
        return f"{told} from {', '.join(sorted(shards)[:8])}"

    def loss_sum(self, module: torch.nn.Module, batch: Batch) -> torch.Tensor:
        """Summed cross entropy of the micro-batch, in nats."""
        logits = module(batch["input_ids"], batch["position_ids"], batch.get("doc_ids"))
        return token_loss_sum(logits, batch["labels"])

    def validate(
        self, module: torch.nn.Module, world: World, *, is_over: Callable[[], bool]
    ) -> dict[str, float]:
        """Collective. Mean loss per target of the first eval.samples validation samples."""
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
            boundaries=self._config.data.boundaries,
            on_damage=self._config.data.on_damage,
        )
        total = torch.zeros(2, dtype=torch.float64)
        for batch in batches:
            if is_over():
                return {}
            del batch["data_hash"]
            batch.pop("quarantined", None)
            placed = {key: value.to(world.device) for key, value in batch.items()}
            found = [float(self.loss_sum(module, placed)), int((batch["labels"] != IGNORED).sum())]
            total += torch.tensor(found, dtype=torch.float64)
        loss_sum, num_valid = world.sum(total).tolist()
        return {"val_loss": loss_sum / num_valid} if num_valid else {}

    def data_state(self, step: int) -> dict[str, Any]:
        """Consumed samples, seed, phases, batches and fingerprints."""
        return {
            **self._stream.state(self.samples(step)[1]),
            "batches": self._phases.state(step),
        }

    def check_data_state(self, state: dict[str, Any]) -> None:
        """DataError when the checkpoint was trained on other data or in another order."""
        self._stream.check_state(state)
        self._phases.check_state(state)


def _check_boundaries(stream: SampleStream, boundaries: Boundaries) -> None:
    """DataUsageError where nobody can tell where documents end; a warning where nothing will be
    learned of how they begin.
    """
    if stream.packing == "best_fit":
        # The plan knows where documents end.
        follows = "nothing"
    elif boundaries == "ignore":
        return
    else:
        follows = f"nothing but id {stream.eos_id}, the end of another"
    if stream.bos:
        return
    log.warning(
        "no target tells how a document begins: its first token is none, and follows %s; prepare "
        "with --bos for a model that begins texts",
        follows,
    )


def _validation(config: RunConfig) -> SampleStream | None:
    try:
        datasets = open_datasets(
            data_of(config.data),
            seq_len=config.seq_len,
            split="val",
            config=config.data,
            commands=True,
        )
        return SampleStream(datasets, seq_len=config.seq_len, seed=config.seed, shuffle=False)
    except DataUsageError as error:
        log.warning("no validation loss in this run: %s", error)
        return None
