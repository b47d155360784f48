"""Facts of single kinds: what folds, what splits, what grows, against forms with all N x K distances."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tokenizers_mm.quantizers import (
    BSQ,
    FVQ,
    LFQ,
    VQ,
    BSQConfig,
    FVQConfig,
    LFQConfig,
    MultiCodebook,
    MultiCodebookConfig,
    MultiScaleQuantizer,
    PerDimension,
    PerDimensionConfig,
    ResidualConfig,
    ScalesConfig,
    SmoothingConfig,
    VQConfig,
    build_quantizer,
)


def entropies(logits: Tensor, eps: float = 1e-5) -> Tensor:
    """Sample minus batch entropy of softmax(logits [..., K]), means over all leading axes."""
    log_p = logits.log_softmax(-1)
    mean = log_p.exp().flatten(0, -2).mean(0)
    return -(log_p.exp() * log_p).sum(-1).mean() + (mean * (mean + eps).log()).sum()


def test_the_bridge_folds_into_a_plain_codebook() -> None:
    torch.manual_seed(0)
    bridge = FVQ(FVQConfig(32, 6, group=8, width=16, depth=2, heads=2)).train()
    z = torch.randn(40, 6)
    before = bridge.codebook().detach().clone()
    assert len(before.unique(dim=0)) == 32
    terms = bridge.quantize(z).terms
    assert terms is not None
    terms["codebook"].backward()
    with torch.no_grad():
        for parameter in bridge.parameters():
            assert parameter.grad is not None
            parameter -= 0.1 * parameter.grad
    assert bool((bridge.codebook() != before).any(1).all())  # all codes move, used or not
    folded, expected = bridge.eval().folded(), bridge.quantize(z)
    assert isinstance(folded, VQ)
    assert torch.equal(folded.quantize(z).ids, expected.ids)
    assert torch.equal(folded.quantize(z).vectors, expected.vectors)


def test_splits_are_unitok() -> None:
    """Chunks of channels, each normalized and searched in a codebook of its own; terms are means over chunks."""
    torch.manual_seed(0)
    config = MultiCodebookConfig(VQConfig(16, 3, "unit", entropy_temperature=0.1), 4)
    quantizer = MultiCodebook(config).train()
    z = torch.randn(2, 5, 12, requires_grad=True)
    found = quantizer.quantize(z)
    terms = found.terms
    assert terms is not None
    losses: dict[str, list[Tensor]] = {"codebook": [], "commitment": [], "entropy": []}
    for index, chunk in enumerate(z.chunk(4, -1)):
        codes: Tensor = F.normalize(quantizer.parts[index].codes, dim=-1)  # type: ignore[arg-type]
        unit = F.normalize(chunk, dim=-1)
        ids = (unit @ codes.T).argmax(-1)
        assert torch.equal(found.ids[..., index], ids)
        torch.testing.assert_close(found.vectors.chunk(4, -1)[index], codes[ids])
        losses["codebook"].append(F.mse_loss(codes[ids], unit.detach()))
        losses["commitment"].append(F.mse_loss(unit, codes[ids].detach()))
        losses["entropy"].append(entropies(-(unit[..., None, :] - codes).square().sum(-1) / 0.1))
    for name, values in losses.items():
        torch.testing.assert_close(terms[name], torch.stack(values).mean(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("pool", [True, False])
def test_groups_are_those_of_wetok(pool: bool) -> None:
    """Entropy of softmax(2 <x_g, c> / T) over the 2^b codes of a group; pooled: one mean over positions and groups."""
    torch.manual_seed(0)
    config = LFQConfig(12, groups=3, temperature=0.7, pool=pool)
    quantizer = LFQ(config).train()
    z = torch.randn(2, 5, 12, dtype=torch.float64, requires_grad=True)
    codes = torch.stack([(torch.arange(16) >> bit) % 2 for bit in range(4)], -1).double() * 2 - 1
    logits = 2 * z.unflatten(-1, (3, 4)) @ codes.T / 0.7
    expected = entropies(logits) if pool else torch.stack([entropies(part) for part in logits.unbind(2)]).mean()
    terms = quantizer.quantize(z).terms
    assert terms is not None
    torch.testing.assert_close(terms["entropy"], expected)
    gradients = [torch.autograd.grad(value, z)[0] for value in (terms["entropy"], expected)]
    torch.testing.assert_close(*gradients)
    assert torch.equal(quantizer.quantize(z).ids, logits.argmax(-1))


def test_256_bits_as_ids() -> None:
    """BitDance's 2^256 codes: 32 ids of 8 bits, 8 of 32, and 256 of one bit hold the same bits."""
    torch.manual_seed(0)
    z = torch.randn(3, 256)
    for groups in (8, 32, 256):
        quantizer = LFQ(LFQConfig(256, groups, entropy_bits=8)).train()
        found = quantizer.quantize(z)
        assert found.ids.shape == (3, groups)
        assert quantizer.codebook_size == 1 << 256 // groups
        assert torch.equal(quantizer.look_up(found.ids), torch.where(z > 0, 1.0, -1.0))
    with pytest.raises(ValueError, match="groups: expected at most 62 bits in each id, got 64 bits"):
        LFQ(LFQConfig(256, 4, entropy_bits=8))
    with pytest.raises(ValueError, match="entropy_bits: expected at most 20, got 32"):
        LFQ(LFQConfig(256, 8))


def test_spherical_codes_are_the_nearest_corners() -> None:
    torch.manual_seed(0)
    quantizer = BSQ(BSQConfig(6)).eval()
    codes = quantizer.look_up(torch.arange(64))
    torch.testing.assert_close(codes.norm(dim=1), torch.ones(64))
    z = torch.randn(50, 6)
    unit = F.normalize(z, dim=-1)
    assert torch.equal(quantizer.quantize(z).ids, torch.cdist(unit, codes).argmin(1))
    assert torch.equal(quantizer.quantize(3 * z).ids, quantizer.quantize(z).ids)


def test_levels_of_frozen_features() -> None:
    quantizer = PerDimension(PerDimensionConfig(5))
    z = torch.randn(4, 5) * 3
    z[0] = torch.tensor([-100.0, 100.0, 0.0, -9.0, 9.0])
    found = quantizer.quantize(z)
    values = quantizer.look_up(torch.arange(8)[:, None].expand(-1, 5))[:, 0]
    assert found.ids[0, :2].tolist() == [0, 7]
    torch.testing.assert_close(found.vectors, values[(z[..., None] - values).abs().argmin(-1)])
    assert not quantizer.state_dict()  # the configuration says it all


def test_scales_of_several_ids() -> None:
    """Ids [B, L, groups] of a residual quantizer inside scales, and a part of the scales."""
    torch.manual_seed(0)
    inner = build_quantizer(ResidualConfig(VQConfig(16, 4), 3))
    quantizer = MultiScaleQuantizer(
        inner, [(1, 1), (2, 2), (3, 4)], ScalesConfig(smoothing=SmoothingConfig(0, 0.25, 1))
    )
    assert quantizer.smoothing is not None
    assert len(quantizer.smoothing.convolutions) == 3
    z = torch.randn(2, 3, 4, 4)
    found = quantizer.quantize(z)
    assert found.ids.shape == (2, 1 + 4 + 12, 3)
    sums = quantizer.partial_sums(found.ids)
    torch.testing.assert_close(sums[-1], found.vectors)
    torch.testing.assert_close(quantizer.look_up(found.ids[:, :5]), sums[1])
    assert quantizer.next_inputs(found.ids).shape == (2, 4 + 12, 4)
    ids, history = quantizer.self_correcting(z, lambda ids, scale: ids)
    assert torch.equal(ids, found.ids)  # without mistakes the labels are the ids
    assert history.shape == (2, 4 + 12, 4)
