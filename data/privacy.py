"""Placeholders for what identifies a person: e-mail and IP addresses, phone and card numbers.

Shape decides, never meaning, so every kind states what it takes and what it leaves. Masking masked
text changes nothing. Every pattern is linear in the text; cost: about 1 s per 30 MB, and per 10 MB
of documents that hold some of it.

* <EMAIL> name@host.tld.
* <CARD>  13 to 19 digits, alone or in groups, that begin and are as long as a card of a large
          brand, and whose check digit (Luhn) is right: one in ten other such numbers is taken too.
* <PHONE> + and 8 to 15 digits (E.164), or ten digits as North America writes them, area code and
          exchange from 2 up, with separators: 415-555-2671. Bare digits and other forms are left.
* <IP>    IPv6 of at least three groups, and four numbers up to 255 without leading zeros between
          dots. A bare 1.2.3.4 can be a version: it is taken; what no address can be is left, and
          so are numbers after v or a word that says version.
"""

from __future__ import annotations

import ipaddress
import re
from collections import Counter

KINDS = ("email", "card", "phone", "ipv6", "ipv4")

_EMAIL = re.compile(
    r"(?<![\w.+%-])[\w+%-](?:[\w.+%-]{0,62}[\w+%-])?@(?:[A-Za-z0-9-]{1,63}\.){1,8}[A-Za-z]{2,24}\b"
)
_CARD = re.compile(r"(?<![\w.+-])[2-6]\d{3}(?:[ -]?\d){9,15}(?![\w-])(?!\.\d)")
_BRANDS = re.compile(
    r"4\d{12}(?:\d{3}){0,2}|5[1-5]\d{14}|2[2-7]\d{14}|3[47]\d{13}|3[0689]\d{12}|6[0245]\d{14}"
)
_PHONE = re.compile(
    r"(?<![\w.+-])(?:"
    r"\+[1-9](?:[ .-]?(?:\(\d{1,4}\)|\d)){7,14}"
    r"|(?:1[ .-])?(?:\([2-9]\d\d\) ?|[2-9]\d\d[ .-])[2-9]\d\d[ .-]\d{4}"
    r")(?![\w-])(?!\.\d)"
)
_PARENTHESES = re.compile(r"(?<!\w)(?:\+?1[ .-]?)?\([2-9]\d\d\) ?[2-9]\d\d[ .-]\d{4}(?![\w-])")
_IPV6 = re.compile(r"(?<![\w:.])[0-9A-Fa-f:]{6,39}(?![\w:])")
_OCTET = r"(?:25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)"
_IPV4 = re.compile(rf"(?<![\w.-])(?:{_OCTET}\.){{3}}{_OCTET}(?![\w-])(?!\.\w)")
# What every match holds. They begin with a digit, which a search skips to; a look-behind is tried
# at every character.
_MANY_DIGITS = re.compile(r"\d(?:[ -]?\d){12}")
_LAST_DIGITS = re.compile(r"\d\d[ .-]\d{4}")
_FOUR_NUMBERS = re.compile(r"\d\.\d{1,3}\.\d{1,3}\.\d")
_VERSION = re.compile(r"(?:version|release|v\.?|ver\.?|section|chapter)[ :=]?\Z", re.IGNORECASE)


def mask(text: str) -> tuple[str, Counter[str]]:
    """The text with placeholders, and how many of each kind it holds."""
    found: Counter[str] = Counter()

    def put(kind: str, placeholder: str, pattern: re.Pattern[str], text: str) -> str:
        def replacement(match: re.Match[str]) -> str:
            if not _is(kind, match):
                return match[0]
            found[kind] += 1
            return placeholder

        return pattern.sub(replacement, text)

    if "@" in text:
        text = put("email", "<EMAIL>", _EMAIL, text)
    if _MANY_DIGITS.search(text):
        text = put("card", "<CARD>", _CARD, text)
    if "+" in text or _LAST_DIGITS.search(text):
        text = put("phone", "<PHONE>", _PHONE, text)
        text = put("phone", "<PHONE>", _PARENTHESES, text)
    if "::" in text or text.count(":") > 6:
        text = put("ipv6", "<IP>", _IPV6, text)
    if _FOUR_NUMBERS.search(text):
        text = put("ipv4", "<IP>", _IPV4, text)
    return text, found


def _is(kind: str, match: re.Match[str]) -> bool:
    """What a pattern alone cannot say."""
    if kind == "card":
        digits = re.sub(r"\D", "", match[0])
        return _BRANDS.fullmatch(digits) is not None and is_luhn(digits)
    if kind == "ipv4":
        return not _VERSION.search(match.string[max(0, match.start() - 10) : match.start()])
    if kind == "ipv6":
        if sum(map(bool, match[0].split(":"))) < 3:
            return False
        try:
            ipaddress.IPv6Address(match[0])
        except ValueError:
            return False
    return True


def is_luhn(digits: str) -> bool:
    """Whether the last digit of a number is its check digit (ISO/IEC 7812-1, annex B)."""
    total = 0
    for place, digit in enumerate(map(int, reversed(digits))):
        doubled = digit * (1 + place % 2)
        total += doubled - 9 * (doubled > 9)
    return total % 10 == 0
