"""What a Hugging Face folder may lead to: nothing outside of it, and nothing that is code."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from train import hf
from train.folder_files import check_folder, no_files, weight_files
from train.folder_tokenizer import ModelFolderError

INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "model"
    made.mkdir()
    for name in ("config.json", "tokenizer_config.json", "special_tokens_map.json"):
        (made / name).write_text("{}")
    (made / "a.safetensors").write_bytes(b"")
    (tmp_path / "other.safetensors").write_bytes(b"")
    check_folder(made)
    return made


@pytest.mark.parametrize(
    "name", ["../other.safetensors", "/etc/x.safetensors", "weights.bin", "", ".", "..", 7, None]
)
def test_an_index_leads_nowhere_else(folder: Path, name: Any) -> None:
    (folder / "weights.bin").write_bytes(b"")
    (folder / INDEX).write_text(json.dumps({"weight_map": {"w": "a.safetensors", "v": name}}))
    with pytest.raises(ModelFolderError, match="which is no safetensors file of this folder"):
        weight_files(folder)


def test_the_weights_are_those_that_transformers_takes(folder: Path) -> None:
    with pytest.raises(ModelFolderError, match=f"holds no model.safetensors and no {INDEX}; load"):
        weight_files(folder)
    (folder / INDEX).write_text(json.dumps({"weight_map": {"w": "a.safetensors"}}))
    assert weight_files(folder) == [folder / "a.safetensors"]
    (folder / INDEX).write_text(json.dumps({"weight_map": {"w": "b.safetensors"}}))
    with pytest.raises(ModelFolderError, match=f"b.safetensors is missing, which {INDEX} lists"):
        weight_files(folder)
    for content, told in (("[]", "holds no JSON object"), ("{}", "no weight_map"), ("[", "read: ")):
        (folder / INDEX).write_text(content)
        with pytest.raises(ModelFolderError, match=told):
            weight_files(folder)
    (folder / "model.safetensors").write_bytes(b"")
    assert weight_files(folder) == [folder / "model.safetensors"]
    (folder / "shard-00000-model-00001-of-00001.safetensors").write_bytes(b"")
    with pytest.raises(ModelFolderError, match="written in parts by many processes"):
        weight_files(folder)


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"transformers_weights": "adapter_model.bin"}, "names other files with 'transformers_w"),
        ({"configuration_files": ["config.4.0.0.json"]}, "names other files with 'configuration_f"),
        ({"attn_implementation": "a/kernel"}, "attn_implementation = 'a/kernel' names a kernel"),
        ({"text_config": {"_attn_implementation": {"": "a/b@v:c"}}}, "'a/b@v:c' names a kernel of"),
    ],
)
def test_a_config_names_no_file_and_no_code(
    folder: Path, config: dict[str, Any], told: str
) -> None:
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelFolderError, match=told):
        check_folder(folder)
    # As written by hundreds of models.
    plain = {
        "attn_implementation": "sdpa",
        "_name_or_path": "org/model",
        "transformers_weights": None,
    }
    (folder / "config.json").write_text(json.dumps(plain))
    check_folder(folder)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize(
    ("config", "key"),
    [
        ({"init_inputs": ["../x"]}, "init_inputs"),
        ({"vocab": "../x"}, "vocab"),
        ({"merges": "x"}, "merges"),
        ({"fast_tokenizer_files": ["../tokenizer.4.0.0.json"]}, "fast_tokenizer_files"),
        ({"sp_model_kwargs": {"model_file": "../x"}}, "sp_model_kwargs.model_file"),
    ],
)
def test_a_tokenizer_names_no_file_elsewhere(
    folder: Path, name: str, config: dict[str, Any], key: str
) -> None:
    (folder / name).write_text(json.dumps(config))
    with pytest.raises(ModelFolderError, match=f"{name}: '{key}' may name a file anywhere"):
        check_folder(folder)


def test_names_of_files_that_a_tokenizer_has_kept_are_not_followed(folder: Path) -> None:
    kept = {"special_tokens_map_file": "/root/x.json", "gguf_file": "../x", "eos_token": "<eos>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**kept, "init_inputs": []}))
    check_folder(folder)
    assert no_files(folder) == {"special_tokens_map_file": None, "gguf_file": None}


def test_an_adapter_is_no_model(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelFolderError, match=r"adapter_config\.json makes this an adapter"):
        check_folder(folder)


@pytest.mark.parametrize("name", ["vocab.extra", "inside/deep.jinja", "linked"])
def test_a_link_out_of_the_folder_is_neither_read_nor_handed_on(
    folder: Path, tmp_path: Path, name: str
) -> None:
    (tmp_path / "private").mkdir()
    (tmp_path / "private/netrc").write_text("password")
    (folder / "inside").mkdir()
    (folder / name).symlink_to(tmp_path / "private" / ("" if name == "linked" else "netrc"))
    with pytest.raises(ModelFolderError, match=rf"{name} is a link to {tmp_path}/private.*cp -rL"):
        check_folder(folder)
    written = SimpleNamespace(save_pretrained=lambda out, **_: pytest.fail("begun"))
    with pytest.raises(ModelFolderError, match="is a link to"):
        hf.save_folder(written, tmp_path / "out", tokenizer_from=folder)


def test_links_within_a_folder_and_into_the_cache_of_the_hub_are_files(tmp_path: Path) -> None:
    blobs, commit = tmp_path / "models--a--b/blobs", tmp_path / "models--a--b/snapshots/0123"
    for made in (blobs, commit):
        made.mkdir(parents=True)
    (blobs / "4567").write_text("{}")
    (commit / "config.json").symlink_to("../../blobs/4567")
    (commit / "again.json").symlink_to("config.json")
    (tmp_path / "short").symlink_to(commit)
    check_folder(commit)
    check_folder(tmp_path / "short")
    (commit / "vocab.txt").symlink_to("../../../outside")
    with pytest.raises(ModelFolderError, match=r"vocab\.txt is a link to"):
        check_folder(tmp_path / "short")
