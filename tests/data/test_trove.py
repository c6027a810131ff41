"""The rules of datatrove drop what they say, are counted, fetch nothing, and need their extra."""

from __future__ import annotations

import json
import socket
import sys
from pathlib import Path

import pytest

from data.claim import WORK
from data.clean import Cleaner, StageCount
from data.config import CleanConfig, DatatroveRule, DataUsageError, PrepareConfig
from data.prepare import prepare
from data.trove import MAX_CHARACTERS, TOO_LONG, apply_rules
from tests.data.prepared import tree
from tests.data.test_cleaning import texts_of
from tests.data.test_quality import plain
from tests.data.texts import write_lines

ALL: tuple[DatatroveRule, ...] = ("gopher-repetition", "gopher-quality", "c4", "fineweb-quality")


def article(seed: int = 0, *, sentences: int = 12) -> str:
    """Sentences of which no words repeat, a few to a line."""
    rows = []
    for i in range(sentences):
        words = [w for w in plain(14, seed=seed * 1000 + i) if w not in ("the", "with")]
        rows.append(f"Over the {' '.join(words)} with it.")
    return "\n".join(rows)


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("nothing may be fetched")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.mark.parametrize(
    ("rules", "text", "reason"),
    [
        (ALL, article(), None),
        (("gopher-repetition",), (article(sentences=2) + "\n") * 6, "dup_line_frac"),
        (("gopher-repetition",), "round and round it goes " * 20, "top_2_gram"),
        (("gopher-quality",), "The mill turned with the river.", "gopher_short_doc"),
        (("gopher-quality",), " ".join(plain(80)[2:]), "gopher_enough_stop_words"),
        (("gopher-quality",), article() + " #" * 40, "gopher_too_many_hashes"),
        (("c4",), article() + "\nLorem ipsum dolor sit amet.", "lorem_ipsum"),
        (("c4",), article(sentences=4), "too_few_sentences"),
        (("c4",), article() + "\nif (x) { return y; }.", "curly_bracket"),
        (("fineweb-quality",), article().replace(".", ""), "line_punct_ratio"),
        (("fineweb-quality",), "A mill.\n" * 30, "short_line_ratio"),
        (("fineweb-quality",), article() + "\n" + article(), "char_dup_ratio"),
        (("fineweb-quality", "gopher-quality"), "A mill.\n" * 30, "short_line_ratio"),
        (("gopher-quality", "fineweb-quality"), "A mill.\n" * 9, "gopher_short_doc"),
    ],
)
def test_a_rule_drops_by_its_name(
    rules: tuple[DatatroveRule, ...], text: str, reason: str | None
) -> None:
    found = apply_rules(text, rules)[1]
    assert found == (reason and f"{rules[0]}: {reason}")


def test_a_document_too_long_for_spacy_is_dropped_and_says_so() -> None:
    assert apply_rules("x" * (MAX_CHARACTERS + 1), ("c4",))[1] == TOO_LONG == "over 4 Mi characters"


def test_c4_takes_lines_out_and_later_rules_see_the_rest() -> None:
    text = f"Menu\n{article()}\nAccept our cookie policy to go on.\nEnable JavaScript to read.\n"
    assert apply_rules(text, ("c4",)) == (article(), None)
    menu = "".join(f"Menu {i}\n" for i in range(200)) + article()
    assert apply_rules(menu, ("fineweb-quality",))[1] == "fineweb-quality: line_punct_ratio"
    assert apply_rules(menu, ("c4", "fineweb-quality")) == (article(), None)


def test_what_is_stored_is_what_the_rules_leave(tmp_path: Path) -> None:
    kept = [article(i) for i in range(8)]
    raw = [f"Home\n{text}\nUse of cookies is fine with us.\n" for text in kept]
    path = write_lines(tmp_path / "in.jsonl", [*raw, "short", "A mill.\n" * 30])
    config = PrepareConfig.model_validate(
        {
            "vocab_size": 300,
            "val_fraction": 0,
            "clean": {"filter_datatrove": ("gopher-quality", "c4"), "mask_pii": True},
        }
    )
    prepare([str(path)], tmp_path / "one", config, workers=1)
    assert sorted(texts_of(tmp_path / "one", "train")) == sorted(kept)
    report = json.loads((tmp_path / "one/manifest.json").read_text())["preparation"]["clean"]
    stages = {count["stage"]: count for count in report["stages"]}
    assert list(stages) == ["filter_datatrove", "mask_pii"]
    stage = stages["filter_datatrove"]
    assert (stage["documents_in"], stage["documents_out"]) == (10, 8)
    assert stage["dropped"] == {
        "gopher-quality: gopher_short_doc": 1,
        "gopher-quality: gopher_below_avg_threshold": 1,
    }
    assert stage["found"] == {"documents that c4 took lines from": 8}
    assert stage["bytes_out"] == sum(map(len, kept)) == stages["mask_pii"]["bytes_in"]
    assert set(report["versions"]) == {"datatrove", "spacy"}
    assert not (tmp_path / "one" / WORK).exists()
    prepare(
        [str(path)], tmp_path / "two", config.model_copy(update={"part_bytes": 2**21}), workers=2
    )
    assert tree(tmp_path / "two") == tree(tmp_path / "one")


def test_nothing_is_recorded_of_what_is_off() -> None:
    recorded = CleanConfig(filter=True).model_dump(mode="json")
    assert recorded == {"normalize": False, "filter": True, "mask_pii": False, "dedup": "off"}
    on = CleanConfig(language=("en",), filter_datatrove=("c4",)).model_dump(mode="json")
    assert on["language_min"] == 0.65 and on["filter_datatrove"] == ["c4"]


@pytest.mark.parametrize("missing", ["datatrove.pipeline", "spacy"])
def test_without_the_extra_it_is_refused_before_anything_is_written(
    tmp_path: Path, missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from data.trove import _filters

    _filters.cache_clear()
    monkeypatch.setitem(sys.modules, missing, None)
    path = write_lines(tmp_path / "in.jsonl", [article()])
    config = PrepareConfig(clean=CleanConfig(filter_datatrove=("c4",)))
    with pytest.raises(DataUsageError, match=r"--filter-datatrove needs .*'headrace\[datatrove\]'"):
        prepare([str(path)], tmp_path / "out", config, workers=1)
    assert [p.name for p in (tmp_path / "out").glob("*") if p.name.endswith("json")] == []
    account: dict[str, StageCount] = {}
    assert Cleaner(CleanConfig(filter=True)).clean(b"short", account) is None, "ours are there"
