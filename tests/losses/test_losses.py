"""Training-only networks: what the caption contrast learns from, PatchGAN's shape, LPIPS from a local file."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from tokenizers_mm.functional.alignment import contrastive, cosine_distance
from tokenizers_mm.losses.captions import CaptionConfig, CaptionContrast
from tokenizers_mm.losses.discriminators import DINOConfig, DINODiscriminator, PatchGAN, PatchGANConfig
from tokenizers_mm.losses.perceptual import LPIPS, load_lpips


def test_contrast_equals_the_formula_and_falls_when_pairs_agree() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(5, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    scale = torch.tensor(2.0, dtype=torch.float64)
    similar = torch.exp(scale) * torch.tensor([[F.cosine_similarity(x, y, 0) for y in b] for x in a])
    expected = -0.5 * (similar.log_softmax(1).diagonal().mean() + similar.log_softmax(0).diagonal().mean())
    assert float(contrastive(a, b, scale)) == pytest.approx(float(expected), abs=1e-9)
    assert float(contrastive(a, a, scale)) < float(contrastive(a, b, scale))
    assert float(cosine_distance(a, 3 * a)) == pytest.approx(0, abs=1e-12)
    assert float(cosine_distance(a, -a)) == pytest.approx(2, abs=1e-12)


def test_samples_without_a_caption_take_no_part() -> None:
    torch.manual_seed(0)
    contrast = CaptionContrast(6, CaptionConfig(16, 1, 2, 64, 10)).eval()
    semantic = torch.randn(4, 9, 6, requires_grad=True)
    loss = contrast(semantic, ["a red circle", "", "a blue square on grey, with {braces}", ""])
    (grad,) = torch.autograd.grad(loss, semantic)
    assert (grad.abs().sum((1, 2)) > 0).tolist() == [True, False, True, False]
    alone = contrast(semantic, ["only one", "", "", ""])
    assert float(alone.detach()) == 0.0
    # padding changes nothing
    short, long = (
        contrast.encode_text(["red circle"]),
        contrast.encode_text(["red circle", "a much longer caption here"]),
    )
    torch.testing.assert_close(short[0], long[0])


def test_patchgan_sees_patches() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 64, 64)
    for norm in ("batch", "none"):
        network = PatchGAN(PatchGANConfig(8, 3, norm)).eval()
        logits = network(x)
        assert logits.shape == (2, 1, 6, 6)
        moved = x.clone()
        moved[:, :, :4, :4] += 1
        changed = (network(moved) != logits)[0, 0]
        assert changed[0, 0]
        assert not changed[-1, -1]


TOWER = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 2}


def test_dino_discriminator_judges_tokens_and_leaves_its_tower_alone() -> None:
    torch.manual_seed(0)
    network = DINODiscriminator(DINOConfig(name="vit_tiny_patch16_224", options=TOWER, blocks=(0, 2), kernel=3)).train()
    assert not any(module.training for module in network.tower.modules())
    x = torch.rand(2, 3, 48, 48, requires_grad=True)
    logits = network(x)  # images of another size are resized
    assert logits.shape == (2, 2 * 16)
    logits.sum().backward()
    assert x.grad is not None
    assert float(x.grad.abs().sum()) > 0
    assert all(p.grad is None for p in network.tower.parameters())
    assert all(p.grad is not None for p in network.heads.parameters())
    network.eval()
    before = network(x)
    with torch.no_grad():
        network.tower.blocks[2].mlp.fc2.weight.mul_(-1.0)
    after = network(x)
    torch.testing.assert_close(before[:, :16], after[:, :16])
    assert not torch.allclose(before[:, 16:], after[:, 16:])
    with pytest.raises(ValueError, match=r"blocks: expected numbers below 3, the depth of the tower, got"):
        DINODiscriminator(DINOConfig(name="vit_tiny_patch16_224", options=TOWER, blocks=(0, 3)))
    with pytest.raises(ValueError, match="name: expected a timm vision transformer, got 'test_resnet'"):
        DINODiscriminator(DINOConfig(name="test_resnet", blocks=(0,)))


def test_lpips_reads_a_local_file_and_stays_in_evaluation_mode(tmp_path: Path) -> None:
    pytest.importorskip("lpips")
    torch.manual_seed(0)
    names = LPIPS().net.net.state_dict()
    state = {f"features.{n.split('.')[1]}.{n.split('.')[2]}": torch.randn_like(t) * 0.05 for n, t in names.items()}
    torch.save(state | {"classifier.0.weight": torch.zeros(1)}, tmp_path / "vgg.pth")
    model = load_lpips(tmp_path / "vgg.pth").train()
    assert not any(module.training for module in model.modules())
    assert torch.equal(model.net.net.state_dict()["slice1.0.weight"], state["features.0.weight"])
    x, y = torch.rand(2, 3, 64, 64) * 2 - 1, torch.rand(2, 3, 64, 64) * 2 - 1
    distance = model(x, y)
    assert distance.shape == (2,)
    assert (distance > 0).all()
    torch.testing.assert_close(model(x, x), torch.zeros(2))
    torch.testing.assert_close(distance, model(x, y))  # no dropout
    for content in ({"args": Path.touch}, {"features.0.weight": torch.zeros(1)}, 3):
        torch.save(content, tmp_path / "vgg.pth")
        with pytest.raises(ValueError, match="perceptual weights: expected the VGG16 weights"):
            load_lpips(tmp_path / "vgg.pth")
