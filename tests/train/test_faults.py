"""HEADRACE_FAULT is read strictly, and a fault happens once, where and to whom it says."""

from __future__ import annotations

import errno
from collections.abc import Iterator

import pytest
import torch

from train import faults
from train.device import flip_bit
from train.faults import AT_START, KINDS, ONLY_AT, PHASES, Fault, FaultError, parse


@pytest.fixture(autouse=True)
def unarmed() -> Iterator[None]:
    yield
    faults.arm(None, 0)


def test_every_phase_and_kind_is_read() -> None:
    for phase in PHASES:
        for kind in KINDS:
            if phase in ONLY_AT.get(kind, PHASES):
                step, rank = (0 if phase in (*AT_START, "export") else 12), 3 * (phase != "export")
                assert parse(f"{phase}:{step}:{rank}:{kind}") == Fault(phase, step, rank, kind)
    assert parse("evaluate:0:0:kill").step == 0, "there is one before the first step"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("forward:5:1", "is not phase:step:rank:kind, such as forward:5:1:kill"),
        ("forward:-1:0:kill", "is not phase:step:rank:kind"),
        ("forward:5:x:kill", "is not phase:step:rank:kind"),
        ("lunch:5:1:kill", "no phase 'lunch'; there are import, rendezvous, build"),
        ("forward:5:1:maim", "no kind 'maim'; there are kill, stop, term"),
        ("import:5:0:kill", "import happens at step 0 alone"),
        ("export:8:0:kill", "export happens at step 0 alone"),
        ("export:0:1:kill", "one process exports, and that is rank 0"),
        ("data:0:0:kill", "the first data happens at step 1"),
        ("prune:0:0:kill", "the first prune happens at step 1"),
        ("write:5:1:nan", "nan changes a number, and none passes by at write; it can happen at fo"),
        ("forward:5:1:bitflip", "it can happen at backward, optimizer, snapshot"),
    ],
)
def test_what_is_no_fault_is_refused(text: str, message: str) -> None:
    with pytest.raises(FaultError, match=message):
        parse(text)


def test_a_fault_of_a_rank_that_there_is_not_is_refused() -> None:
    faults.check_rank(None, 1)
    faults.check_rank("data:5:1:kill", 2)
    with pytest.raises(FaultError, match="there is no rank 9 here, but ranks 0 to 1"):
        faults.check_rank("data:5:9:kill", 2)


def test_a_fault_that_did_not_happen_is_told(caplog: pytest.LogCaptureFixture) -> None:
    faults.arm("data:99:0:raise", 0)
    faults.point("data", 5)
    faults.tell_missed()
    (said,) = caplog.messages
    assert said.endswith("raise at data, step 99 did not happen, as rank 0 never came there")
    with pytest.raises(RuntimeError):
        faults.point("data", 99)
    caplog.clear()
    faults.tell_missed()
    assert caplog.messages == []


def test_a_fault_happens_once_at_its_step_and_rank() -> None:
    faults.arm("data:2:1:eio", 0)
    faults.point("data", 2)
    faults.arm("data:2:1:eio", 1)
    faults.point("data", 1)
    faults.point("forward", 2)
    with pytest.raises(OSError) as caught:
        faults.point("data", 2)
    assert caught.value.errno == errno.EIO
    faults.point("data", 2)


def test_a_number_is_changed_once_where_it_passes_by() -> None:
    faults.arm("forward:1:0:nan", 0)
    faults.point("forward", 1)
    assert not faults.hits("forward", 0, "nan")
    assert not faults.hits("forward", 1, "bitflip")
    assert faults.hits("forward", 1, "nan")
    assert not faults.hits("forward", 1, "nan")


def test_one_bit_is_flipped_wherever_the_tensor_lies() -> None:
    weights = torch.ones(5)
    flip_bit(weights)
    assert weights.tolist() == [1, 1, 1.5, 1, 1]
    flip_bit(weights[2:3])
    assert weights.tolist() == [1, 1, 1, 1, 1]
