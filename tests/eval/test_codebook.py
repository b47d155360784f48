"""Codebook health against counting by hand; probes on data whose answer is known."""

import torch

from tokenizers_mm.eval.codebook import CodebookCounts, codebook_health
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


def test_usage_of_a_large_codebook_is_counted_over_all_images() -> None:
    """All of 262,144 codes, a few in each image: no window of the last ids, in which only a part of them has room."""
    size = 1 << 18
    stream = Stream("a", size, ((32, 32),))
    counts, ids = CodebookCounts(), torch.randperm(size, generator=torch.Generator().manual_seed(0)).view(-1, 1024)
    for part in ids.split(100):
        counts.add(ImageCodes(part, 32, 32, (stream,)))
    report = counts.report()["a"]
    assert (report["usage"], report["dead"], report["ids"]) == (1.0, 0, size)
    assert abs(report["perplexity"] / size - 1) < 1e-9
    random = torch.randint(0, size, (100, 1024), generator=torch.Generator().manual_seed(1))
    found = codebook_health(ImageCodes(part, 32, 32, (stream,)) for part in random.split(7))["a"]
    assert found["usage"] == float((torch.bincount(random.flatten(), minlength=size) > 0).double().mean())


def test_linear_probe_reads_what_is_linear_and_nothing_else() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(600, 2, generator=generator)
    linear, ring = (x[:, 0] > 0.1).long(), (x.norm(dim=1) > 1.18).long()
    for labels, low, high in ((linear, 0.97, 1.0), (ring, 0.0, 0.65)):
        hits = linear_probe((x[:400], labels[:400]), (x[400:], labels[400:]), 2)
        assert low <= float(hits.double().mean()) <= high


def test_entropies_and_code_lengths() -> None:
    """Ids that repeat row by row: nothing is left to say given the id above, and an adaptive coder learns them."""
    stream = Stream("a", 16, ((8, 8),))
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(0, 16, (400, 1, 8), generator=generator).expand(-1, 8, -1)
    counts = CodebookCounts()
    for part in rows.flatten(1).split(64):
        counts.add(ImageCodes(part, 8, 8, (stream,)))
    report = counts.report()["a"]
    assert report["dead"] == 0
    assert report["bits"]["nominal"] == 64 * 4
    assert abs(report["entropy"] - 4) < 0.05
    assert abs(report["bits"]["entropy_coded"] - 64 * report["entropy"]) < 1
    assert report["conditional"]["up"]["bits"] < 0.01
    assert report["conditional"]["previous"]["bits"] > 3.5
    assert report["conditional"]["previous"]["reliable"]
    random = torch.randint(0, 4096, (1, 64), generator=generator)
    few = codebook_health([ImageCodes(random, 8, 8, (Stream("a", 4096, ((8, 8),)),))])["a"]
    assert not few["conditional"]["previous"]["reliable"]
    assert few["bits"]["entropy_coded"] <= few["bits"]["nominal"]
    again = CodebookCounts()
    again.restore(counts.state())
    assert again.report() == counts.report()
    empty = CodebookCounts()
    empty.add(ImageCodes(torch.zeros(1, 1, dtype=torch.int64), 8, 8, (Stream("a", 1 << 40, ((1, 1),)),)))
    assert empty.report() == {}, "a codebook that no table can hold"
