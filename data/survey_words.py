"""What a survey says to people: refusals with places and remedies, warnings, counts in words."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from data.config import PrepareConfig
from data.documents import BAD_TEXT, MISSING_FIELD
from data.split import MAX_MISS, SplitRule, miss

if TYPE_CHECKING:
    from data.survey import Survey


def share_warnings(rule: SplitRule, found: Survey) -> list[str]:
    """What a person should know of the share that was held out; nothing where it came out."""
    if rule.val_fraction == 0 or miss(share_held_out(found), rule.val_fraction) <= MAX_MISS:
        return []
    return [
        f"{share_held_out(found):.2%} of the text is held out for validation, not "
        f"{rule.val_fraction:.2%}: the input has too few different pieces; give more text, or "
        "another --val-fraction"
    ]


def share_held_out(found: Survey) -> float:
    """Share of the text that is validation."""
    return found.text_bytes["val"] / found.text_bytes.total()


def bad_lines_refused(found: Survey, config: PrepareConfig) -> str:
    """Why bad lines stop a preparation, with the places of the first."""
    lines = [
        f"{found.bad_lines.total()} {bad_noun(found)} cannot be used ({listed(found.bad_lines)}), "
        f"{config.max_bad_lines} may be skipped; the first:"
    ]
    for bad in found.examples:
        what = f"no field {config.text_field!r}" if bad.reason == MISSING_FIELD else bad.reason
        lines.append(f"  {bad.place}: {what}: {bad.detail}")
    advice = "mend them, or name the field that holds the text with --text-field"
    if found.num_documents:
        advice += f", or skip them with --max-bad-lines {found.bad_lines.total()}"
    lines.append(advice)
    return "\n".join(lines)


def bad_text_warnings(found: Survey) -> list[str]:
    """What the policy for bad text has done; nothing where all text was good."""
    warnings = []
    if found.num_replaced:
        warnings.append(
            f"{found.num_replaced} of {found.num_documents} documents hold U+FFFD in place of "
            "bytes or characters that were no text (--on-bad-text replace)"
        )
    skipped = Counter({key: found.dropped[key] for key in BAD_TEXT if found.dropped[key]})
    if skipped:
        warnings.append(
            f"{skipped.total()} documents or lines were skipped (--on-bad-text skip): "
            f"{listed(skipped)}"
        )
    return warnings


def id_warnings(found: Survey, id_field: str) -> list[str]:
    """What a person should know of ids that were asked for; nothing where all were there."""
    if not found.num_unnamed:
        return []
    return [
        f"{found.num_unnamed} of {found.num_documents} documents have no id {id_field!r} "
        "(--id-field); they are called by their file and the place in it"
    ]


def unknown_warnings(num_unknown: int) -> list[str]:
    """What a person should know of text that the tokenizer cannot express."""
    if not num_unknown:
        return []
    return [
        f"{num_unknown} tokens of the dataset are the tokenizer's unknown token: the characters "
        "that they stand for are lost; bring a tokenizer with byte fallback, or have one trained "
        "here (no --tokenizer)"
    ]


def bad_noun(found: Survey) -> str:
    """What the bad lines are lines of."""
    return "JSON lines" if all(bad.where is None for bad in found.examples) else "records"


def listed(counts: Counter[str]) -> str:
    """Counts in words: "2 blank line, 1 broken JSON"."""
    return ", ".join(f"{count} {reason}" for reason, count in sorted(counts.items()))
