"""Entropy and code length of counts against direct calculation."""

import math

import pytest
import torch

from tokenizers_mm.functional.usage import adaptive_code_length, entropy


def test_adaptive_code_length_equals_coding_id_by_id() -> None:
    ids = torch.randint(0, 5, (200,), generator=torch.Generator().manual_seed(0))
    counts, bits = torch.zeros(5, dtype=torch.int64), 0.0
    for index in ids.tolist():
        bits -= math.log2((float(counts[index]) + 0.5) / (float(counts.sum()) + 2.5))
        counts[index] += 1
    assert adaptive_code_length(counts) == pytest.approx(bits, rel=1e-12)


def test_adaptive_code_length_comes_near_to_the_entropy() -> None:
    counts = torch.tensor([90_000, 9_000, 900, 100])
    assert adaptive_code_length(counts) == pytest.approx(100_000 * entropy(counts), rel=1e-3)


def test_entropy_is_corrected_for_few_ids() -> None:
    """The plain estimate from 40 ids of 16 equally likely codes is too low; the corrected one is nearer in the mean."""
    generator = torch.Generator().manual_seed(0)
    plain, corrected = [], []
    for _ in range(200):
        counts = torch.bincount(torch.randint(0, 16, (40,), generator=generator), minlength=16)
        p = counts.double() / 40
        plain.append(float(torch.special.entr(p).sum()) / math.log(2))
        corrected.append(entropy(counts))
    assert abs(sum(corrected) / 200 - 4) < 0.05 < 0.15 < abs(sum(plain) / 200 - 4)
    assert entropy(torch.zeros(3, dtype=torch.int64)) == 0.0
