"""The order is a bijection, fixed by golden vectors and a second implementation; it mixes well."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import data.order
from data.order import (
    NUM_ROUNDS,
    WINDOW_TOKENS,
    Geometry,
    key,
    locate,
    permute,
    samples_at,
    slots_of,
    unpermute,
)

# 11 full blocks of 8 samples and 3 samples in the tail; windows of 4, 4 and 3 blocks.
MANY_WINDOWS = Geometry(11 * 2**25 + 3 * 2**22 + 1, 2**25, 2**22)


def test_keys_are_golden() -> None:
    assert key(0, "blocks", "text", 0) == 6936707234820092327
    assert key(1234, "window 3", "caf\u00e9", 7) == 13631231486459729227


@pytest.mark.parametrize(
    ("size", "permutation_key", "expected"),
    [
        (8, 1, [1, 5, 6, 7, 4, 0, 3, 2]),
        (1000, 2, [181, 611, 335, 429, 812, 294, 645, 333]),
        (65537, 2**64 - 1, [37425, 34817, 62667, 63855, 28598, 3842, 53072, 38375]),
        (10**12, 12345, [341995507045, 32997259937, 669721164946, 662473016638, 759145112533]),
    ],
)
def test_permutations_are_golden(size: int, permutation_key: int, expected: list[int]) -> None:
    assert permute(np.arange(len(expected)), size, permutation_key).tolist() == expected


@pytest.mark.parametrize(
    ("seed", "first", "epochs", "offsets"),
    [
        (0, 0, [0, 0, 0, 0], [896147456, 316651520, 555810816, 583743488]),
        (0, 488279, [0, 0, 1, 1], [997609472, 984584192, 376692736, 717694976]),
        (1, 1000000, [2, 2, 2, 2], [185249792, 171724800, 555407360, 905650176]),
    ],
)
def test_token_offsets_are_golden(
    seed: int, first: int, epochs: list[int], offsets: list[int]
) -> None:
    geometry = Geometry(10**9 + 17, 2**19, 2048)
    assert geometry.num_samples == 488281
    found = locate(np.arange(first, first + 4), geometry, seed=seed, source="text")
    assert [array.tolist() for array in found] == [epochs, offsets]


def test_small_data_is_golden() -> None:
    _, offsets = locate(np.arange(8), Geometry(5003, 64, 7), seed=42, source="text")
    assert offsets.tolist() == [3904, 4288, 1856, 4117, 3100, 128, 3249, 3022]


@given(
    num_tokens=st.integers(2, 3000),
    block_tokens=st.integers(1, 600),
    seq_len=st.integers(1, 600),
    seed=st.integers(0, 2**64),
    epoch=st.integers(0, 5),
)
@settings(max_examples=150, deadline=None)
def test_an_epoch_holds_every_sample_exactly_once(
    num_tokens: int, block_tokens: int, seq_len: int, seed: int, epoch: int
) -> None:
    geometry = Geometry(num_tokens, block_tokens, seq_len)
    count = geometry.num_samples
    if seq_len > block_tokens or count == 0:
        return
    samples = np.arange(epoch * count, (epoch + 1) * count)
    epochs, offsets = locate(samples, geometry, seed=seed, source="s")
    _, straight = locate(samples, geometry, seed=seed, source="s", shuffle=False)

    assert set(epochs.tolist()) == {epoch}
    assert sorted(offsets.tolist()) == straight.tolist()
    assert straight[0] == 0 and straight[-1] + seq_len < num_tokens
    assert (np.diff(straight) >= seq_len).all()
    # What a block or the tail cannot fill is all that is left out.
    lost = (num_tokens - 1) - count * seq_len
    assert lost <= (geometry.num_blocks + 1) * (seq_len - 1)


@pytest.mark.parametrize("epoch", [0, 1, 2, 3])
def test_windows_are_whole_and_hold_every_sample_once(epoch: int) -> None:
    count = MANY_WINDOWS.num_samples
    samples = np.arange(epoch * count, (epoch + 1) * count)
    _, offsets = locate(samples, MANY_WINDOWS, seed=5, source="s")

    assert (MANY_WINDOWS.num_windows, MANY_WINDOWS.window_blocks, count) == (3, 4, 91)
    assert len(set(offsets.tolist())) == count
    blocks = offsets // MANY_WINDOWS.block_tokens
    sizes = _runs([blocks[at : at + 32] for at in range(0, count, 32)])
    # Whatever the rotation, a stretch of one window's length never touches more blocks than two
    # windows hold, and the first window of the epoch is read from its start.
    assert max(sizes) <= 8
    first = key(5, "rotation", "s", epoch) % 3
    length = 27 if first == 2 else 32
    assert len(set(blocks[:length].tolist())) == 4


def test_the_rotation_moves_the_short_window_between_epochs() -> None:
    tails = set()
    for epoch in range(12):
        samples = np.arange(epoch * 91, (epoch + 1) * 91)
        _, offsets = locate(samples, MANY_WINDOWS, seed=5, source="s")
        tails.add(int(np.argmax(offsets // 2**25 == 11)) // 32)
    assert tails == {0, 1, 2}


@given(size=st.integers(1, 5000), permutation_key=st.integers(0, 2**64 - 1))
@settings(max_examples=100, deadline=None)
def test_a_permutation_is_a_bijection(size: int, permutation_key: int) -> None:
    found = permute(np.arange(size), size, permutation_key)
    assert sorted(found.tolist()) == list(range(size))


@given(
    size=st.integers(1, 2**45),
    permutation_key=st.integers(0, 2**64 - 1),
    data=st.data(),
)
@settings(max_examples=100, deadline=None)
def test_the_vectorised_permutation_equals_the_plain_one(
    size: int, permutation_key: int, data: st.DataObject
) -> None:
    indices = data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=20))
    found = permute(np.array(indices), size, permutation_key)
    assert found.tolist() == [_plain_permute(i, size, permutation_key) for i in indices]


def test_every_output_bit_flips_with_the_index_half_of_the_time() -> None:
    for num_bits in (16, 17, 20):
        size = 2**num_bits
        found = permute(np.arange(50_000), size, key(0, "test", "s", num_bits))
        flips = found[1:] ^ found[:-1]
        rates = [float(np.mean((flips >> bit) & 1)) for bit in range(num_bits)]
        # 5 standard deviations of a fair coin thrown 50,000 times.
        assert max(abs(rate - 0.5) for rate in rates) < 5 * 0.5 / np.sqrt(50_000), rates


def test_neighbours_and_keys_are_uncorrelated() -> None:
    size = 1_000_003
    found = permute(np.arange(50_000), size, 1).astype(float)
    other = permute(np.arange(50_000), size, 2).astype(float)
    limit = 5 / np.sqrt(50_000)
    assert abs(np.corrcoef(found[1:], found[:-1])[0, 1]) < limit
    assert abs(np.corrcoef(found, np.arange(50_000))[0, 1]) < limit
    assert abs(np.corrcoef(found, other)[0, 1]) < limit


@pytest.mark.parametrize("size", [3, 5, 16, 61])
def test_small_permutations_are_even_over_keys(size: int) -> None:
    keys = [key(seed, "test", "s", 0) for seed in range(1000)]
    for index in (0, size - 1):
        places = [int(permute(np.array([index]), size, k)[0]) for k in keys]
        expected = len(keys) / size
        chi_square = float(np.sum((np.bincount(places, minlength=size) - expected) ** 2 / expected))
        # Mean size - 1, standard deviation sqrt(2 (size - 1)).
        assert chi_square < (size - 1) + 5 * np.sqrt(2 * (size - 1))


def test_a_batch_touches_as_many_blocks_as_independent_draws_would() -> None:
    geometry = Geometry(2**27 + 1, 2**19, 2048)
    _, offsets = locate(np.arange(512), geometry, seed=0, source="s")
    blocks = len(set((offsets // geometry.block_tokens).tolist()))
    assert blocks == pytest.approx(256 * (1 - (1 - 1 / 256) ** 512), abs=20)


def test_seed_source_and_epoch_change_the_order() -> None:
    geometry = Geometry(64_001, 2**19, 64)

    def start(seed: int, source: str, epoch: int) -> list[int]:
        samples = np.arange(20) + epoch * 1000
        return locate(samples, geometry, seed=seed, source=source)[1].tolist()

    orders = [start(0, "a", 0), start(1, "a", 0), start(0, "b", 0), start(0, "a", 1)]
    assert len({tuple(order) for order in orders}) == 4
    assert start(0, "a", 0) == orders[0]


def test_the_order_of_fifteen_trillion_tokens_needs_no_memory() -> None:
    geometry = Geometry(15 * 10**12, 2**19, 4096)
    samples = np.arange(64) + geometry.num_samples - 32
    epochs, offsets = locate(samples, geometry, seed=0, source="s")
    assert epochs.tolist() == [0] * 32 + [1] * 32
    assert offsets.min() >= 0 and offsets.max() + 4096 < geometry.num_tokens
    assert geometry.window_blocks * geometry.block_tokens == WINDOW_TOKENS


@given(size=st.integers(1, 3000), permutation_key=st.integers(0, 2**64 - 1))
@settings(max_examples=100, deadline=None, derandomize=True, database=None)
def test_a_permutation_is_undone(size: int, permutation_key: int) -> None:
    there = permute(np.arange(size), size, permutation_key)
    assert unpermute(there, size, permutation_key).tolist() == list(range(size))
    assert permute(
        unpermute(np.arange(size), size, permutation_key), size, permutation_key
    ).tolist() == list(range(size))


@pytest.mark.parametrize(
    ("num_tokens", "block_tokens", "seq_len", "window_tokens"),
    [
        (203, 40, 7, 80),  # 5 blocks in windows of 2, a tail of 0 samples
        (230, 40, 7, 80),  # 5 blocks in windows of 2, a tail of 4 samples in the last one
        (121, 8, 8, 24),  # blocks of one sample, windows of 3
        (34, 40, 7, 80),  # no full block
        (161, 40, 40, 2**27),  # exactly 4 blocks of one sample, one window
    ],
)
@pytest.mark.parametrize("shuffle", [True, False])
def test_the_samples_of_every_range_are_the_inverse_of_locate(
    monkeypatch: pytest.MonkeyPatch,
    num_tokens: int,
    block_tokens: int,
    seq_len: int,
    window_tokens: int,
    shuffle: bool,
) -> None:
    monkeypatch.setattr(data.order, "WINDOW_TOKENS", window_tokens)
    geometry = Geometry(num_tokens, block_tokens, seq_len)
    count = geometry.num_samples
    for epoch in (0, 1):
        samples = np.arange(epoch * count, (epoch + 1) * count)
        _, offsets = locate(samples, geometry, seed=4, source="s", shuffle=shuffle)
        held = {
            sample: set(range(offset, offset + seq_len + 1))
            for sample, offset in zip(samples.tolist(), offsets.tolist(), strict=True)
        }
        for start in range(num_tokens):
            for stop in {start + 1, start + 5, start + 60, num_tokens}:
                if start < stop <= num_tokens:
                    wanted = set(range(start, stop))
                    expected = sorted(s for s, tokens in held.items() if tokens & wanted)
                    slots = slots_of(start, stop, geometry)
                    found = samples_at(
                        slots, geometry, epoch=epoch, seed=4, source="s", shuffle=shuffle
                    )
                    assert found.tolist() == expected, (epoch, start, stop)


def test_samples_of_a_range_in_windows_of_real_size() -> None:
    """Blocks of 2^25 tokens: three windows without a smaller window for the test."""
    for epoch in (0, 3):
        samples = np.arange(epoch * 91, (epoch + 1) * 91)
        _, offsets = locate(samples, MANY_WINDOWS, seed=5, source="s")
        for sample, offset in zip(samples.tolist(), offsets.tolist(), strict=True):
            slots = slots_of(offset + 1, offset + 2, MANY_WINDOWS)
            found = samples_at(slots, MANY_WINDOWS, epoch=epoch, seed=5, source="s")
            assert found.tolist() == [sample]


def _runs(stretches: list[np.ndarray]) -> list[int]:
    return [len(set(stretch.tolist())) for stretch in stretches]


def _plain_permute(index: int, size: int, permutation_key: int) -> int:
    """The same Feistel network once more, in whole numbers of Python."""
    num_bits = (size - 1).bit_length()
    low_bits = num_bits - num_bits // 2
    while True:
        high, low = index >> low_bits, index % 2**low_bits
        for r in range(NUM_ROUNDS):
            round_key = _plain_mix((permutation_key + (r + 1) * 0x9E3779B97F4A7C15) % 2**64)
            if r % 2 == 0:
                high ^= _plain_mix((low + round_key) % 2**64) % 2 ** (num_bits - low_bits)
            else:
                low ^= _plain_mix((high + round_key) % 2**64) % 2**low_bits
        index = (high << low_bits) | low
        if index < size:
            return index


def _plain_mix(x: int) -> int:
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return x ^ (x >> 31)


def test_keys_are_blake2b_of_a_spelled_out_name() -> None:
    name = json.dumps(["headrace order 1", 7, "blocks", "text", 3], separators=(",", ":"))
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    assert key(7, "blocks", "text", 3) == int.from_bytes(digest, "little")
