"""Codebook health against counting by hand; probes on data whose answer is known."""

import torch

from tokenizers_mm.eval.codebook import codebook_health
from tokenizers_mm.eval.semantics import linear_probe
from tokenizers_mm.types import ImageCodes, Stream


def test_usage_and_perplexity_equal_counting() -> None:
    streams = (Stream("a", 8, ((1, 1), (2, 2))), Stream("b", 4, ((1, 2),)))
    ids = torch.tensor([[0, 1, 1, 2, 2, 3, 3], [0, 1, 1, 2, 2, 0, 0]])
    report = codebook_health([ImageCodes(row[None], 8, 8, streams) for row in ids])
    assert report["a"]["usage"] == 3 / 8
    assert report["a"]["scales"][0]["usage"] == 1 / 8
    assert report["a"]["scales"][0]["perplexity"] == 1.0
    assert report["a"]["scales"][1]["perplexity"] == 2.0
    assert report["b"]["usage"] == 2 / 4
    assert report["b"]["ids"] == 4
    p = torch.tensor([2.0, 4.0, 4.0]) / 10
    assert abs(report["a"]["perplexity"] - float(torch.exp(-(p * p.log()).sum()))) < 1e-6


def test_linear_probe_reads_what_is_linear_and_nothing_else() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(600, 2, generator=generator)
    linear, ring = (x[:, 0] > 0.1).long(), (x.norm(dim=1) > 1.18).long()
    for labels, low, high in ((linear, 0.97, 1.0), (ring, 0.0, 0.65)):
        hits = linear_probe((x[:400], labels[:400]), (x[400:], labels[400:]), 2)
        assert low <= float(hits.double().mean()) <= high
