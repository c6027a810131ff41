"""Only the response is a target; what does not fit is cut left of the prompt, and counted."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from data.targets import NO_TARGET, fingerprint, prompt_with_response, with_label


def test_only_response_and_its_end_are_targets() -> None:
    example = prompt_with_response([5, 6], [7, 8, 2], max_tokens=10, prefix=[1])
    assert example.input_ids.tolist() == [1, 5, 6, 7, 8]
    assert example.labels.tolist() == [NO_TARGET, NO_TARGET, 7, 8, 2]
    assert (example.num_targets, example.is_cut) == (3, False)


def test_a_long_prompt_loses_its_left_but_not_what_the_tokenizer_puts_first() -> None:
    example = prompt_with_response([4, 5, 6], [7, 2], max_tokens=3, prefix=[1])
    assert example.input_ids.tolist() == [1, 6, 7]
    assert example.labels.tolist() == [NO_TARGET, 7, 2]
    assert example.is_cut


def test_a_long_response_loses_its_end() -> None:
    example = prompt_with_response([4, 5], [6, 7, 8, 2], max_tokens=3)
    assert example.input_ids.tolist() == [5, 6, 7]
    assert example.labels.tolist() == [6, 7, 8]
    assert example.is_cut


@given(
    st.lists(st.integers(10, 99), min_size=1, max_size=9),
    st.lists(st.integers(100, 199), min_size=1, max_size=9),
    st.lists(st.integers(0, 9), max_size=2),
    st.integers(3, 20),
)
def test_inputs_and_targets_are_one_cut_sequence(
    prompt: list[int], response: list[int], prefix: list[int], max_tokens: int
) -> None:
    example = prompt_with_response(prompt, response, max_tokens=max_tokens, prefix=prefix)
    inputs, labels = example.input_ids.tolist(), example.labels.tolist()
    assert 1 <= len(inputs) == len(labels) <= max_tokens
    assert inputs[: len(prefix)] == prefix
    targets = [label for label in labels if label != NO_TARGET]
    assert targets == response[: len(targets)] and targets
    assert labels[-len(targets) :] == targets
    assert all(a == b for a, b in zip(inputs[1:], labels, strict=False) if b != NO_TARGET)
    assert example.is_cut == (len(prefix) + len(prompt) + len(response) > max_tokens + 1)
    if not example.is_cut:
        assert [*inputs, labels[-1]] == prefix + prompt + response


def test_the_fingerprint_sees_every_number() -> None:
    base = [with_label([1, 2], 0), with_label([3], 1)]
    assert fingerprint(base) == fingerprint([with_label([1, 2], 0), with_label([3], 1)])
    others = [
        base[::-1],
        base[:1],
        [with_label([1, 2], 1), with_label([3], 1)],
        [with_label([1], 0), with_label([2, 3], 1)],
    ]
    assert len({fingerprint(other) for other in [base, *others]}) == 5
