"""Orders of samples that are computed, not stored: keyed permutations, and mixtures with a position per source.

All functions of a position take constant time and memory, whatever the number of samples.
"""

import struct
from collections.abc import Sequence
from hashlib import blake2b

import numpy as np

from tokenizers_mm._check import require

ROUNDS = 4
"""Rounds of the Feistel network; an even number, so that both halves end where they began."""

SHARES = 1 << 20
"""Weights of a mixture are rounded to this many equal shares."""

_MASK = (1 << 64) - 1


def mix_seeds(*numbers: int) -> int:
    """A seed (64 bits, not negative) that depends on all of several numbers, the same on every machine."""
    return int.from_bytes(blake2b(struct.pack(f"<{len(numbers)}q", *numbers), digest_size=8).digest(), "little")


def permute(index: int, size: int, key: int) -> int:
    """Image of `index` under a pseudo-random permutation of 0 .. size - 1 that the key decides.

    A Feistel network over the smallest power of two that is not below `size`; values outside are sent through again
    ("cycle walking", Black and Rogaway, Ciphers with Arbitrary Finite Domains, 2002, section 3), twice on average at
    most.
    """
    require(0 <= index < size, "index", f"0 to {size - 1}", index)
    bits = max(2, (size - 1).bit_length())
    low = bits - bits // 2
    left_mask, low_mask = (1 << bits // 2) - 1, (1 << low) - 1
    rounds = [
        ((key + number * 0x9E3779B97F4A7C15) & _MASK, low_mask if number % 2 else left_mask) for number in range(ROUNDS)
    ]
    while True:
        left, right = index >> low, index & low_mask
        for salt, mask in rounds:
            z = ((right ^ salt) * 0xBF58476D1CE4E5B9) & _MASK  # the first half of splitmix64's mixing
            left, right = right, left ^ (((z ^ (z >> 29)) * 0x94D049BB133111EB) >> 32 & mask)
        index = left << low | right
        if index < size:
            return index


class Interleaving:
    """Positions of a mixture to positions of its sources: each source is gone through in order, without gaps.

    Sources are spread evenly: up to any position each has had its share of the samples, to less than one per source.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        total = sum(weights)
        sound = len(weights) > 0 and min(weights) >= 0 and total > 0
        require(sound, "weights", "numbers from 0 on, not all 0", weights)
        self.counts = [max(round(SHARES * weight / total), int(weight > 0)) for weight in weights]

    def __call__(self, position: int) -> tuple[int, int]:
        """Number of the source, and position in it."""
        rest = sum(self.counts)
        for source, count in enumerate(self.counts):
            before, after = position * count // rest, (position + 1) * count // rest
            if after > before:
                return source, before
            position, rest = position - before, rest - count  # among the sources that follow
        raise AssertionError("the last source takes what is left")


class BlockOrder:
    """Orders that stay in a few blocks of samples for a while, for samples that are read a block at a time.

    In every pass the blocks come in a new order, and the samples of `window` blocks that follow each other are shuffled
    together; each sample comes once. A new pass takes time in the number of blocks, a position in its logarithm.
    """

    def __init__(self, counts: Sequence[int], window: int = 1) -> None:
        """counts: samples of each block, none of them 0."""
        require(len(counts) > 0 and min(counts) > 0, "blocks", "blocks with samples", counts)
        self.counts, self.window = np.asarray(counts, dtype=np.int64), window
        self.starts = np.concatenate([[0], np.cumsum(self.counts)])
        self._pass: tuple[int, int] = (-1, -1)
        self._blocks, self._ends = self.counts, self.starts

    def __call__(self, position: int, seed: int) -> int:
        """Index of the sample at a position of endless passes."""
        epoch, place = divmod(position, int(self.starts[-1]))
        key = mix_seeds(seed, epoch, 4)
        if self._pass != (seed, epoch):
            count = len(self.counts)
            self._blocks = np.array([permute(number, count, key) for number in range(count)], dtype=np.int64)
            self._ends = np.concatenate([[0], np.cumsum(self.counts[self._blocks])])
            self._pass = (seed, epoch)
        first = (int(np.searchsorted(self._ends, place, side="right")) - 1) // self.window * self.window
        low, high = (int(self._ends[at]) for at in (first, min(first + self.window, len(self._blocks))))
        place = low + permute(place - low, high - low, mix_seeds(key >> 1, first))
        at = int(np.searchsorted(self._ends, place, side="right")) - 1
        return int(self.starts[self._blocks[at]]) + place - int(self._ends[at])


def shuffled(position: int, size: int, seed: int) -> int:
    """Index at a position of an endless sequence of passes over `size` samples, each pass in an order of its own."""
    epoch, place = divmod(position, size)
    return permute(place, size, mix_seeds(seed, epoch, 2))
