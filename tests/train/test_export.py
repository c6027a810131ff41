"""An exported folder is the model that was trained, or it is not published."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from data.config import PrepareConfig
from data.prepare import prepare
from data.tokenizer import load_tokenizer
from model.config import parameter_shapes
from model.gpt import GPT, init_weights
from tests.ranks import run_ranks
from tests.train.checkpoints import inventory
from tests.train.folders import make_tokenizer
from train import checkpoint
from train.attempt import run_attempt
from train.checkpoint import CheckpointError, open_checkpoint
from train.config import FinetuneConfig, RunConfig
from train.decode import load_config
from train.export import ExportError, ExportSummary, ExportUsageError, export
from train.export_check import check
from train.export_weights import reference_logits
from train.pretrain import pretraining
from train.run import copy_tokenizer, open_run, read_config
from train.slices import write_slices
from train.world import World

RECIPE = """
steps = 6
seed = 1
seq_len = 32
batch_tokens = 256
precision = "fp32"
optim.lr = 1e-2
zero.stage = 2
checkpoint.every = 3
model = { num_layers = 2, hidden_size = 32, num_heads = 4, num_kv_heads = 2, ffn_size = 48 }
"""


def train_run(world: World, config: RunConfig, run: Path) -> str:
    return run_attempt(world, run, pretraining(config, num_ranks=world.size))


@pytest.fixture(scope="module")
def run(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 6 steps on two ranks with ZeRO-2, checkpoints at 3 and 6."""
    run = tmp_path_factory.mktemp("export") / "run"
    config = load_config(RunConfig, RECIPE, [f"data={dataset}"])
    assert run_ranks(2, train_run, config, run) == ["complete", "complete"]
    return run


@pytest.fixture(scope="module")
def exported(run: Path, tmp_path_factory: pytest.TempPathFactory) -> ExportSummary:
    return export(run, tmp_path_factory.mktemp("published") / "hf")


def test_transformers_computes_what_we_trained(run: Path, exported: ExportSummary) -> None:
    config, saved = _config(run), open_checkpoint(run)
    ours = GPT(config)
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            parameter.copy_(torch.from_numpy(saved.read(name)))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(exported.folder)
    ids = torch.arange(96).view(3, 32) % config.vocab_size
    with torch.no_grad():
        expected, found = ours(ids), theirs(ids).logits
    # fp32 sums in another order.
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert found.shape == (3, 32, config.vocab_size)
    assert exported.agreement.max_logit_difference <= exported.agreement.tolerance / 10


def test_the_folder_tells_where_it_comes_from(run: Path, exported: ExportSummary) -> None:
    folder, saved = exported.folder, open_checkpoint(run)
    told = json.loads((folder / "headrace.json").read_text())
    assert (told["run"], told["step"], told["tokens"]) == ("run", 6, 6 * 256)
    assert told["data"] == saved.state["data"]
    assert told["data"]["consumed_samples"] == 48
    manifest = (saved.folder / "manifest.json").read_bytes()
    assert told["checkpoint_sha256"] == hashlib.sha256(manifest).hexdigest()
    assert set(told["files"]) == {path.name for path in folder.iterdir()} - {"headrace.json"}
    for name, digest in told["files"].items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest
    assert told["checks"]["num_texts"] == 2000
    config = _config(run)
    assert {id for row in told["checks"]["probe_ids"] for id in row} >= {0, config.vocab_size - 1}
    # Nothing is left of the folder in the making, and others may read the result.
    assert [path.name for path in folder.parent.iterdir()] == ["hf"]
    assert folder.stat().st_mode == run.stat().st_mode
    assert len({path.stat().st_mode for path in (run / "config.json", *folder.iterdir())}) == 1


def test_the_folder_has_the_runs_tokenizer(run: Path, exported: ExportSummary) -> None:
    ours = load_tokenizer(run)
    theirs = transformers.AutoTokenizer.from_pretrained(exported.folder)
    text = "  def main() -> None:\n\tprint('</s>', 1_000)\n"
    assert theirs(text)["input_ids"] == ours.encode(text)
    assert theirs.decode(ours.encode(text)) == text
    config = json.loads((exported.folder / "config.json").read_text())
    assert config["vocab_size"] == ours.vocab_size
    assert (config["bos_token_id"], config["eos_token_id"]) == (ours.bos_id, ours.eos_id)
    generation = json.loads((exported.folder / "generation_config.json").read_text())
    assert generation["eos_token_id"] == ours.eos_id
    assert config["max_position_embeddings"] == 32


def test_an_older_step_in_several_bf16_files(run: Path, tmp_path: Path) -> None:
    summary = export(run, tmp_path / "new" / "hf", step=3, dtype="bf16", max_shard_bytes=20_000)
    assert summary.step == 3
    assert len(summary.weight_files) > 3
    index = json.loads((summary.folder / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(summary.weight_files)
    assert index["metadata"]["total_size"] == 2 * summary.num_parameters
    tensors: dict[str, torch.Tensor] = {}
    for file in summary.weight_files:
        part = load_file(summary.folder / file)
        assert len(part) == 1 or sum(tensor.nbytes for tensor in part.values()) <= 20_000
        tensors |= part
    assert sum(tensor.numel() for tensor in tensors.values()) == summary.num_parameters
    gate = open_checkpoint(run, 3).read("blocks.1.ffn.gate.weight")
    found = tensors["model.layers.1.mlp.gate_proj.weight"]
    assert torch.equal(found, torch.from_numpy(gate).bfloat16())


def test_a_folder_that_computes_something_else_is_told_apart(
    run: Path, exported: ExportSummary, tmp_path: Path
) -> None:
    def swap(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        gate, up = (f"model.layers.0.mlp.{name}_proj.weight" for name in ("gate", "up"))
        tensors[gate], tensors[up] = tensors[up], tensors[gate]
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    def interleave(folder: Path) -> None:
        # The other convention of rotary positions: neighbours are pairs.
        tensors = load_file(folder / "model.safetensors")
        name = "model.layers.0.self_attn.q_proj.weight"
        heads = tensors[name].view(4, 2, 4, 32).transpose(1, 2)
        tensors[name] = heads.reshape(32, 32).contiguous()
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    def stretch(folder: Path) -> None:
        _edit(
            folder / "config.json", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e3}}
        )

    assert _problems(run, exported.folder) == []
    for number, damage in enumerate((swap, interleave, stretch)):
        folder = tmp_path / str(number)
        shutil.copytree(exported.folder, folder)
        damage(folder)
        (problem,) = _problems(run, folder)
        assert "logits differ by more than" in problem and "token id" in problem, damage.__name__


def test_a_tokenizer_that_cuts_differently_is_told_apart(
    run: Path, exported: ExportSummary, tmp_path: Path
) -> None:
    def forget_merges(table: dict[str, Any]) -> None:
        del table["model"]["merges"][-10:]

    def prepend(table: dict[str, Any]) -> None:
        table["normalizer"] = {
            "type": "Sequence",
            "normalizers": [{"type": "Prepend", "prepend": "\u2581"}, table["normalizer"]],
        }

    for number, damage in enumerate((forget_merges, prepend)):
        folder = tmp_path / str(number)
        shutil.copytree(exported.folder, folder)
        table = json.loads((folder / "tokenizer.json").read_text())
        damage(table)
        (folder / "tokenizer.json").write_text(json.dumps(table))
        (problem,) = _problems(run, folder)
        assert "of 2000 texts differ, such as" in problem, damage.__name__
    special = tmp_path / "special"
    shutil.copytree(exported.folder, special)
    _edit(special / "tokenizer_config.json", {"split_special_tokens": False})
    (problem,) = _problems(run, special)
    assert "texts differ" in problem


def test_a_brought_tokenizer_and_its_bos_go_with_the_model(tmp_path: Path) -> None:
    make_tokenizer(tmp_path / "brought", bos=True)
    run = _handmade_run(tmp_path / "brought", tmp_path / "run", state={"bos": True})
    folder = export(run, tmp_path / "hf").folder
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    assert theirs("the <eos> wheel")["input_ids"] == [
        1,
        *load_tokenizer(run).encode("the <eos> wheel"),
    ]
    config = json.loads((folder / "config.json").read_text())
    assert (config["eos_token_id"], config["bos_token_id"], config["pad_token_id"]) == (0, 1, None)
    assert not (folder / "tokenizer.model").exists()


def test_whether_documents_begin_with_bos_is_known_from_the_dataset(
    corpus: Path, tmp_path: Path
) -> None:
    for bos in (False, True):
        dataset = tmp_path / str(bos)
        prepare([str(corpus)], dataset, PrepareConfig(vocab_size=400, bos=bos), workers=1)
        config = load_config(RunConfig, RECIPE, [f"data={dataset}"])
        assert pretraining(config, num_ranks=1).identity["bos"] is bos


def test_a_model_without_numbers_is_not_published(dataset: Path, tmp_path: Path) -> None:
    run = _handmade_run(dataset, tmp_path / "run", fill={"norm.weight": float("nan")})
    with pytest.raises(ExportError, match=r"logits differ by more than.*\nnothing was published"):
        export(run, tmp_path / "hf")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_an_occupied_output_is_refused_with_the_command_that_helps(
    run: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    message = (
        rf"{out} is not empty, and an export overwrites nothing; name another folder: "
        rf"`headrace export {run} {out}-2`"
    )
    with pytest.raises(ExportUsageError, match=message) as refusal:
        export(run, out)
    assert refusal.value.exit_code == 2
    with pytest.raises(ExportUsageError, match=r"notes\.txt is a file"):
        export(run, out / "notes.txt")
    with pytest.raises(ExportUsageError) as own:
        export(run, run)
    assert "rm -r" not in str(own.value), "nobody is told to remove a run"
    assert [path.name for path in out.iterdir()] == ["notes.txt"]
    assert (out / "notes.txt").read_text() == "mine"


def test_a_damaged_checkpoint_is_named_and_leaves_nothing(
    dataset: Path, run: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    path = copy / "checkpoints" / "step-000000006" / "rank-00001.safetensors"
    raw = bytearray(path.read_bytes())
    # Weights are last; an export reads nothing else.
    raw[-100] ^= 1
    path.write_bytes(raw)
    with pytest.raises(CheckpointError, match=r"rank-00001\.safetensors: chunk \d+ .*not what was"):
        export(copy, tmp_path / "hf")
    with pytest.raises(CheckpointError, match=r"no committed checkpoint of step 5; .*3, 6"):
        export(copy, tmp_path / "hf", step=5)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_run_whose_parts_do_not_belong_together_is_refused(
    dataset: Path, run: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(run, other)
    table = json.loads((other / "config.json").read_text())
    table["config"]["model"]["ffn_size"] = 64
    (other / "config.json").write_text(json.dumps(table))
    message = (
        r"'blocks\.0\.ffn\.down\.weight' is \(32, 48\) there, config\.json makes it \(32, 64\)"
    )
    with pytest.raises(ExportError, match=message):
        export(other, tmp_path / "hf")
    shutil.copyfile(run / "config.json", other / "config.json")
    with (other / "tokenizer.model").open("ab") as file:
        file.write(b"\0")
    with pytest.raises(
        ExportError, match=r"tokenizer\.model is not the tokenizer that the run was"
    ):
        export(other, tmp_path / "hf")


def test_a_fine_tuning_run_points_to_its_folder(tmp_path: Path) -> None:
    config = load_config(FinetuneConfig, 'task = "classify"')
    open_run(tmp_path / "run", config, {})
    with pytest.raises(ExportUsageError, match=rf"folder already: {tmp_path / 'run' / 'hf'}"):
        export(tmp_path / "run", tmp_path / "hf")


def _config(run: Path) -> Any:
    return read_config(run).model


def _edit(path: Path, change: dict[str, Any]) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))


def _problems(run: Path, folder: Path) -> list[str]:
    """What the check of an export says of this folder."""
    saved, config = open_checkpoint(run), _config(run)
    told = json.loads((folder / "headrace.json").read_text())
    ids = torch.tensor(told["checks"]["probe_ids"])
    probe = {"input_ids": ids, "logits": reference_logits(saved, config, "fp32", ids)}
    problems: list[str] = check(folder, probe, load_tokenizer(run), bos=False)["problems"]
    return problems


def _handmade_run(
    tokenizer: Path,
    run: Path,
    *,
    fill: dict[str, float] | None = None,
    state: dict[str, Any] | None = None,
) -> Path:
    """A run with an untrained checkpoint at step 1; parameters named in `fill` have one value."""
    model = {"vocab_size": load_tokenizer(tokenizer).vocab_size, "max_seq_len": 32}
    overrides = [f"model.{key}={value}" for key, value in model.items()]
    config = load_config(RunConfig, RECIPE, overrides)
    open_run(run, config, {})
    copy_tokenizer(tokenizer, run)
    module = GPT(config.model)
    init_weights(module, seed=0)
    values = {name: p.detach().numpy().ravel() for name, p in module.named_parameters()}
    for name, value in (fill or {}).items():
        values[name] = np.full_like(values[name], value)
    ranges = {"param": [(name, 0, array.size) for name, array in values.items()]}
    folder = checkpoint.begin(run, 1)
    entry = write_slices(folder, 0, {"param": list(values.values())}, ranges)
    checkpoint.commit(
        folder,
        step=1,
        parameters=inventory(parameter_shapes(config.model)),
        scalars={},
        state=state or {},
        files=[entry],
    )
    return run
