"""GAN losses: values against 64-bit formulas, and the sign of every gradient."""

import math

import torch

from tokenizers_mm.functional import adversarial as gan


def test_gradients_have_the_right_sign() -> None:
    """The discriminator raises real and lowers fake logits; the generator raises fake ones."""
    real = torch.tensor([-2.0, 0.0, 0.5], requires_grad=True)
    fake = torch.tensor([-0.5, 0.0, 2.0], requires_grad=True)
    for loss in (gan.hinge_discriminator, gan.logistic_discriminator):
        to_real, to_fake = torch.autograd.grad(loss(real, fake), (real, fake))
        assert (to_real < 0).all()
        assert (to_fake > 0).all()
    for loss in (gan.hinge_generator, gan.non_saturating_generator):
        (to_fake,) = torch.autograd.grad(loss(fake), fake)
        assert (to_fake < 0).all()


def test_lecam_holds_logits_back() -> None:
    """Real logits above the mean of fake ones fall, fake logits below the mean of real ones rise; others are free."""
    real = torch.tensor([2.0, -2.0], requires_grad=True)
    fake = torch.tensor([-2.0, 2.0], requires_grad=True)
    loss = gan.lecam(real, fake, torch.tensor(1.0), torch.tensor(-1.0))
    to_real, to_fake = torch.autograd.grad(loss, (real, fake))
    assert (to_real > 0).tolist() == [True, False]
    assert (to_fake < 0).tolist() == [True, False]
    assert float(to_real[1]) == float(to_fake[1]) == 0.0


def test_values_equal_the_formulas() -> None:
    generator = torch.Generator().manual_seed(0)
    real, fake = (torch.randn(50, generator=generator, dtype=torch.float64) for _ in range(2))
    r, f = real.tolist(), fake.tolist()

    def mean(values) -> float:
        return sum(values) / 50

    hinge = 0.5 * (mean(max(0, 1 - v) for v in r) + mean(max(0, 1 + v) for v in f))
    logistic = 0.5 * (mean(math.log1p(math.exp(-v)) for v in r) + mean(math.log1p(math.exp(v)) for v in f))
    assert abs(float(gan.hinge_discriminator(real, fake)) - hinge) < 1e-12
    assert abs(float(gan.logistic_discriminator(real, fake)) - logistic) < 1e-12
    assert abs(float(gan.non_saturating_generator(fake)) - mean(math.log1p(math.exp(-v)) for v in f)) < 1e-12
    assert abs(float(gan.hinge_generator(fake)) + mean(f)) < 1e-12
    lecam = mean(max(0, v - 0.3) ** 2 for v in r) + mean(max(0, 0.7 - v) ** 2 for v in f)
    assert abs(float(gan.lecam(real, fake, torch.tensor(0.7), torch.tensor(0.3))) - lecam) < 1e-7


def test_adaptive_weight_is_a_ratio_of_gradient_norms() -> None:
    weight = torch.tensor([1.0, 2.0], requires_grad=True)
    ratio = gan.adaptive_weight((3 * weight).sum(), (weight * torch.tensor([0.0, 4.0])).sum(), weight)
    assert abs(float(ratio) - math.sqrt(18) / (4 + 1e-4)) < 1e-6


def test_r1_is_half_the_squared_gradient_of_an_image_and_reaches_the_weights() -> None:
    """For logits w . x the gradient is w for every image, whatever the batch."""
    weight = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64, requires_grad=True)
    images = torch.rand(4, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    logits = (images * weight[:, None, None]).sum((1, 2, 3))
    penalty = gan.r1_penalty(images, logits[:, None])
    torch.testing.assert_close(penalty, 0.5 * 4 * weight.square().sum())
    (to_weight,) = torch.autograd.grad(penalty, weight)
    torch.testing.assert_close(to_weight, 4 * weight)
