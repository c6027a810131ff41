"""Hugging Face folders that bring code, promise other sizes, or lead elsewhere, for
tests/train/attack.py.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tests.train.attack import BOMBS, NAMES, NUMBERS, PICKLES, Case, pickled
from tests.train.folders import make_folder
from train import hf
from train.world import World

CODE = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M", "AutoTokenizer": "evil.M"}
CONFIGS: tuple[dict[str, Any], ...] = (
    {"auto_map": CODE},
    {"auto_map": CODE, "model_type": "evil"},
    {"auto_map": CODE, "architectures": ["Evil"]},
    {"_name_or_path": "../secret"},
    {"torch_dtype": "evil"},
    {"model_type": "../secret"},
    {"transformers_weights": "adapter_model.bin"},
    {"transformers_weights": "../other.safetensors"},
    {"transformers_weights": "evil.safetensors.index.json"},
    {"configuration_files": ["config.4.0.0.json"]},
    {"attn_implementation": "evil/kernel"},
    {"_attn_implementation_internal": "evil/kernel@main:evil"},
    *({"quantization_config": {"quant_method": kind}} for kind in ("evil", "awq", "fp8", "hqq")),
    *({"vocab_size": value} for value in NUMBERS if value is not True),
    *({"n_layer": value} for value in (-1, "7", None, [])),
)
TOKENIZERS: tuple[dict[str, Any], ...] = (
    {"auto_map": {"AutoTokenizer": ["evil.T", "evil.T"]}},
    {"tokenizer_class": "evil.T"},
    {"vocab_file": "../vocab.json", "merges_file": "../merges.txt", "spm_file": "../secret"},
    {"vocab": "../vocab.json", "merges": "../merges.txt"},
    {"init_inputs": ["../vocab.json", "../merges.txt"]},
    {"gguf_file": "../secret"},
    {"fast_tokenizer_files": ["../tokenizer.4.0.0.json"]},
    {"tokenizer_class": "SiglipTokenizer", "sp_model_kwargs": {"model_file": "../secret"}},
    {"tokenizer_class": "XLMTokenizer"},
    {"tokenizer_class": "BertTokenizer", "vocab": {}},
    {"model_max_length": "7"},
    {"added_tokens_decoder": {"-1": {"content": "a"}}},
    {"added_tokens_decoder": {"9999999999": {"content": "a"}}},
)


def folders(folder: Path, world: World) -> Iterator[Case]:
    """Of a model that is made, read, and handed on."""
    kept = make_folder(folder / "kept")
    good = folder / "hf"
    table = json.loads((kept / "tokenizer.json").read_text())["model"]
    # What could be loaded, if only somebody went there.
    shutil.copy(kept / "model.safetensors", folder / "other.safetensors")
    shutil.copy(kept / "tokenizer.json", folder / "tokenizer.4.0.0.json")
    # Beside the folder, and where such a name leads to from where we are.
    for place in (folder, folder.parent):
        (place / "vocab.json").write_text(json.dumps(table["vocab"]))
        (place / "merges.txt").write_text("\n".join(" ".join(merge) for merge in table["merges"]))
    weights = load_file(kept / "model.safetensors")
    (kept / "evil.py").write_text("open('ran', 'w')\nC = M = T = object\n")
    for one in PICKLES:
        torch.save(weights, kept / one)
    config = json.loads((kept / "config.json").read_text())
    named = json.loads((kept / "tokenizer_config.json").read_text())

    def case(
        name: str,
        change: Callable[[], object] = lambda: None,
        load: Callable[[Path], object] = hf.load_causal,
        *,
        is_good: bool = False,
    ) -> Case:
        def run() -> None:
            change()
            load(good)

        def fresh() -> None:
            shutil.rmtree(good, ignore_errors=True)
            shutil.copytree(kept, good)

        return Case(name, run, (good,), is_good=is_good, before=fresh)

    def put(name: str, content: Any) -> Callable[[], object]:
        return lambda: (good / name).write_text(json.dumps(content))

    loads = (hf.load_causal, lambda path: hf.load_classifier(path, ["a", "b"]), hf.load_tokenizer)
    for number, load in enumerate(loads):
        yield case(f"hf good {number}", load=load, is_good=True)
    for change in CONFIGS:
        yield case(f"hf {change}", put("config.json", {**config, **change}))
    for content in TOKENIZERS:
        for cls in ("GPT2Tokenizer", "TokenizersBackend"):
            for has_json in (True, False):

                def tell(content: Any = content, cls: str = cls, has: bool = has_json) -> None:
                    both = {**named, "tokenizer_class": cls, **content}
                    (good / "tokenizer_config.json").write_text(json.dumps(both))
                    if not has:
                        (good / "tokenizer.json").unlink()

                yield case(f"hf tokenizer {cls} {has_json} {content}", tell, hf.load_tokenizer)
        yield case(
            f"hf special {content}", put("special_tokens_map.json", content), hf.load_tokenizer
        )
    for template in ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "{% if %}", "{{ 1 / 0 }}"):
        put_it = put("tokenizer_config.json", {**named, "chat_template": template})
        yield case(
            f"hf template {template}", put_it, lambda path: hf.load_tokenizer(path).chat("a", "b")
        )
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json", "added_tokens.json"):
        for number, raw in enumerate(BOMBS):
            write = lambda name=name, raw=raw: (good / name).write_bytes(raw)  # noqa: E731
            yield case(f"hf {name} {number}", write, hf.load_tokenizer)
    yield from _weights(good, list(weights), case)
    yield from _links(good, kept, loads[::2], case)


def _links(
    good: Path, kept: Path, loads: Sequence[Callable[[Path], object]], case: Callable[..., Case]
) -> Iterator[Case]:
    def hand_on() -> None:
        model = hf.load_causal(kept)
        (good / "vocab.extra").symlink_to("../secret")
        hf.save_folder(model, kept / "out", tokenizer_from=good)

    for name in ("vocab.extra", "config.json", "tokenizer.json", "model.safetensors", "a.jinja"):

        def link(name: str = name) -> None:
            (good / name).unlink(missing_ok=True)
            (good / name).symlink_to("../other.safetensors" if "model" in name else "../secret")

        for load in loads:
            yield case(f"hf link {name}", link, load)
    handed = case("hf link handed on", hand_on, lambda path: None)
    yield Case(handed.name, handed.load, (good, kept), before=handed.before)


def _weights(good: Path, names: list[str], case: Callable[..., Case]) -> Iterator[Case]:
    """What the weights are said to be in. The folder has safetensors all the while."""

    def indexed(name: Any) -> None:
        index = {"metadata": {}, "weight_map": dict.fromkeys(names, name)}
        (good / "model.safetensors").rename(good / "decoy.safetensors")
        (good / "model.safetensors.index.json").write_text(json.dumps(index))

    yield case("hf index good", lambda: indexed("decoy.safetensors"), is_good=True)
    for name in (
        *NAMES,
        *PICKLES,
        "../other.safetensors",
        str(good.parent / "other.safetensors"),
        7,
    ):
        yield case(f"hf index {name!r}", lambda name=name: indexed(name))

    def adapted() -> None:
        told = {"base_model_name_or_path": "../secret", "peft_type": "LORA"}
        (good / "adapter_config.json").write_text(json.dumps(told))

    yield case("hf adapter", adapted)
    shard = "shard-00000-model-00001-of-00001.safetensors"
    yield case("hf parts", lambda: (good / "model.safetensors").rename(good / shard))

    def headed(size: int) -> None:
        path = good / "model.safetensors"
        path.write_bytes(size.to_bytes(8, "little") + path.read_bytes()[8:])

    for size in (0, 1, 2**20, 2**40, 2**63, 2**64 - 1):
        yield case(f"hf header of {size} bytes", lambda size=size: headed(size))
    yield case("hf pickle", lambda: (good / "model.safetensors").write_bytes(pickled()))
