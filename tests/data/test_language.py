"""Documents are kept by language and counted by it; the model is in the package."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from data.clean import Cleaner, StageCount
from data.config import CleanConfig, DataUsageError, PrepareConfig
from data.language import _model, check_languages, language_of
from data.prepare import prepare
from tests.data.texts import prose, write_lines

SENTENCES = {
    "en": "All human beings are born free and equal in dignity and rights.",
    "zh": "\u4eba\u4eba\u751f\u800c\u81ea\u7531,\u5728\u5c0a\u4e25\u548c\u6743\u5229\u4e0a"
    "\u4e00\u5f8b\u5e73\u7b49\u3002",
    "de": "Alle Menschen sind frei und gleich an W\u00fcrde und Rechten geboren.",
    "fr": "Tous les \u00eatres humains naissent libres et \u00e9gaux en dignit\u00e9 et en droits.",
    "es": "Todos los seres humanos nacen libres e iguales en dignidad y derechos.",
    "ru": "\u0412\u0441\u0435 \u043b\u044e\u0434\u0438 \u0440\u043e\u0436\u0434\u0430\u044e\u0442"
    "\u0441\u044f \u0441\u0432\u043e\u0431\u043e\u0434\u043d\u044b\u043c\u0438.",
    "ja": "\u3059\u3079\u3066\u306e\u4eba\u9593\u306f\u3001\u751f\u307e\u308c\u306a\u304c\u3089"
    "\u306b\u3057\u3066\u81ea\u7531\u3067\u3042\u308b\u3002",
}
"""Article 1 of the Universal Declaration of Human Rights."""


@pytest.mark.parametrize("code", SENTENCES)
def test_a_sentence_is_told(code: str) -> None:
    found, confidence = language_of(SENTENCES[code])
    assert found == code and 0.65 < confidence <= 1.0


def test_cantonese_and_wu_are_chinese() -> None:
    """Their scores are added: a line of characters is shared out among the three otherwise."""
    poem = "\u5e8a\u524d\u660e\u6708\u5149\uff0c\u7591\u662f\u5730\u4e0a\u971c\u3002"
    assert language_of(poem)[0] == "zh" and language_of(poem)[1] > 0.9


def test_a_head_in_another_language_does_not_decide() -> None:
    assert language_of(SENTENCES["en"] * 30 + SENTENCES["de"] * 300)[0] == "de"


def test_empty_of_features_is_no_language_for_sure() -> None:
    assert language_of("\u2603 42")[1] < 0.3


def test_documents_are_kept_and_counted_by_language(tmp_path: Path) -> None:
    texts = [SENTENCES[code] * 5 for code in SENTENCES] + [f"{prose(900)}", "ok 12"]
    path = write_lines(tmp_path / "in.jsonl", texts)
    config = PrepareConfig.model_validate(
        {"vocab_size": 400, "val_fraction": 0, "clean": {"language": ("en", "zh")}}
    )
    prepare([str(path)], tmp_path / "out", config, workers=1)
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    report = manifest["preparation"]["clean"]
    [stage] = report["stages"]
    assert (stage["stage"], stage["documents_in"], stage["documents_out"]) == ("language", 9, 3)
    assert stage["found"] == {"documents in en": 2, "documents in zh": 1}
    dropped = {f"language {code}": 1 for code in ("de", "fr", "es", "ru", "ja")}
    assert dropped.items() <= stage["dropped"].items()
    assert sum(stage["dropped"].values()) == 6
    assert manifest["counts"]["documents"] == 3
    assert list(report["versions"]) == ["py3langid"]


def test_a_document_less_sure_than_asked_is_dropped_as_such() -> None:
    account: dict[str, StageCount] = {}
    text = SENTENCES["en"].encode()
    confidence = language_of(text.decode())[1]
    kept = CleanConfig(language=("en",), language_min=min(1.0, confidence))
    assert Cleaner(kept).clean(text, account) == text.decode()
    strict = CleanConfig(language=("de", "en"), language_min=1.0)
    assert Cleaner(strict).clean(b"the mill ok", account) is None
    assert account["language"].dropped == {"language en, but less sure than 1.0": 1}


def test_a_preparation_in_an_unknown_language_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("words")
    config = PrepareConfig(clean=CleanConfig(language=("xx",)))
    with pytest.raises(DataUsageError, match="xx is no language that can be told"):
        prepare([str(tmp_path / "a.txt")], tmp_path / "out", config, workers=1)
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (("en", "xx"), r"--language en,xx: xx is no language that can be told; those are ace, "),
        (("yue",), r"yue is no language that can be told"),
    ],
)
def test_an_unknown_language_is_refused(codes: tuple[str, ...], message: str) -> None:
    with pytest.raises(DataUsageError, match=message):
        check_languages(codes)


@pytest.mark.parametrize(
    ("clean", "message"),
    [
        ({"language": ("en", "en")}, "one of them is named twice"),
        ({"language": ("English",)}, "should match pattern"),
        ({"language_min": 0.5}, "--language-min needs --language"),
        ({"filter_datatrove": ("c5",)}, "should be 'gopher-repetition'"),
    ],
)
def test_a_bad_setting_is_refused(clean: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CleanConfig.model_validate(clean)


def test_without_the_extra_the_refusal_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _model.cache_clear()
    monkeypatch.setitem(sys.modules, "py3langid.langid", None)
    with pytest.raises(DataUsageError, match=r"--language needs .* install 'headrace\[language\]'"):
        check_languages(("en",))
