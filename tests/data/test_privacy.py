"""Personal data is masked by its shape; what looks similar stays."""

from __future__ import annotations

import random

import pytest

from data.privacy import is_luhn, mask

MASKED = [
    ("write to jane.doe+x@mail.example.co.uk.", "write to <EMAIL>.", "email"),
    ("<a@b.io>", "<<EMAIL>>", "email"),
    ("card 4111 1111 1111 1111!", "card <CARD>!", "card"),
    ("5555-5555-5555-4444", "<CARD>", "card"),
    ("amex 378282246310005,", "amex <CARD>,", "card"),
    ("call +49 30 1234567 now", "call <PHONE> now", "phone"),
    ("+14155552671", "<PHONE>", "phone"),
    ("415-555-2671", "<PHONE>", "phone"),
    ("(415) 555-2671.", "<PHONE>.", "phone"),
    ("tel:(415)555-2671", "tel:<PHONE>", "phone"),
    ("1-415-555-2671", "<PHONE>", "phone"),
    ("from 192.168.0.1:8080", "from <IP>:8080", "ipv4"),
    # A bare version of four numbers is an address by its shape: the stated price of the rule.
    ("at 1.2.3.4.", "at <IP>.", "ipv4"),
    ("host 2001:db8::ff00:42:8329 up", "host <IP> up", "ipv6"),
    ("2001:0db8:0000:0000:0000:ff00:0042:8329", "<IP>", "ipv6"),
]
KEPT = [
    "user@localhost",
    "@handle and a @ b",
    "a decorator: @functools.cache",
    "4111 1111 1111 1112",
    "1234567890123456",
    "0.4111111111111111",
    "order 9411111111111111",
    "2024-11-24 10:15:30",
    "10:15:30",
    "ISBN 978-3-16-148410-0",
    "4155552671",
    "115-555-2671",
    "415-155-2671",
    "3.14159265358979",
    "+1 and +2 make +3",
    "1,234,567,890",
    "version 1.2.3.4",
    "v1.2.3.4",
    "release 1.2.3.4",
    "1.2.3.4.5",
    "256.1.1.1",
    "01.2.3.4",
    "1.2.3",
    "1.2.3.4-beta",
    "std::vector<int>::iterator",
    "a::b and fe::1",
    "00:1A:2B:3C:4D:5E",
]


@pytest.mark.parametrize(("text", "expected", "kind"), MASKED, ids=[row[0] for row in MASKED])
def test_personal_data_is_masked_and_counted(text: str, expected: str, kind: str) -> None:
    assert mask(text) == (expected, {kind: 1})
    assert mask(expected) == (expected, {})


@pytest.mark.parametrize("text", KEPT)
def test_what_only_looks_similar_stays(text: str) -> None:
    assert mask(text) == (text, {})


def test_several_kinds_are_counted_apart() -> None:
    masked, found = mask("a@b.org, c@d.org 10.0.0.1 and 415.555.2671")
    assert masked == "<EMAIL>, <EMAIL> <IP> and <PHONE>"
    assert found == {"email": 2, "ipv4": 1, "phone": 1}


def test_the_check_digit_finds_every_wrong_digit() -> None:
    rng = random.Random(0)
    for _ in range(50):
        body = "".join(rng.choices("0123456789", k=15))
        right = [body + digit for digit in "0123456789" if is_luhn(body + digit)]
        assert len(right) == 1
        place, other = rng.randrange(16), rng.randrange(1, 10)
        wrong = (int(right[0][place]) + other) % 10
        assert not is_luhn(f"{right[0][:place]}{wrong}{right[0][place + 1 :]}")


@pytest.mark.parametrize("unit", ["1", "a", "1 ", "1.", "a.", "a@", "a@b.", "+1", "(2", "2:", "-"])
def test_long_runs_cost_linear_time(unit: str) -> None:
    text = unit * (200_000 // len(unit))
    assert mask(text)[0]
