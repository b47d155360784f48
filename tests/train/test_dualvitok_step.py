"""One training step against the original's: terms, gradients, the discriminator's statistics, before and with the GAN.

Tolerances: gradients 1e-3 of the largest entry (the cases' README). In one case a unit of the discriminator stands 1e-6
from the kink of its leaky ReLU, less than float32 can tell, and the original fell on the other side: with that one unit
turned over our gradient meets the original's within 8e-7; as it is, it is that of float64 within 4e-6, and the
original's is off by up to 6.2e-3.
"""

import json

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from tests.cases import Case, case
from tests.dualvitok_weights import dualvitok_weights
from tokenizers_mm.checkpoints.dualvitok import convert, links_of
from tokenizers_mm.checkpoints.upstream import give
from tokenizers_mm.data.sources import Batch, DataConfig
from tokenizers_mm.losses.discriminators import PatchGAN, PatchGANConfig
from tokenizers_mm.models import DualViTok
from tokenizers_mm.models.starting import ModelConfig
from train.config import RunConfig
from train.objectives.reconstruction import NoiseConfig, ReconstructionConfig
from train.objectives.terms import LossConfig
from train.optim import OptimizerConfig
from train.state import State, build_state
from train.step import train_step

NAMES = ["small_dc", "small_nodc_mlp_rot"]
RTOL = 1e-3
AT_A_KINK = {("small_nodc_mlp_rot", "with_gan"): 1e-2}


class PooledDifference(nn.Module):
    """The stand-in for LPIPS that the cases were made with."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return (F.avg_pool2d(x, 4) - F.avg_pool2d(y, 4)).square().mean((1, 2, 3))


def state_of(
    reference: Case, gan_start: int, monkeypatch: pytest.MonkeyPatch, noise: NoiseConfig | None = None
) -> State:
    """A run of the reference's model, at rates of zero; LPIPS is the stand-in."""
    model = convert(dualvitok_weights(reference), reference.name, reference.config).train()
    loss = LossConfig(
        {"pixel": 1.0, "perceptual": 1.0, "semantic": 1.0, "codebook": 1.0, "commitment": 0.25, "generator": 0.5},
        pixel="l2",
        semantic="target",
        gan_start=gan_start,
        discriminator=PatchGANConfig(channels=8),
    )
    monkeypatch.setattr("train.objectives.reconstruction.build_tokenizer", lambda *_: model)
    monkeypatch.setattr("train.objectives.terms.load_lpips", lambda _: PooledDifference())
    data = DataConfig(
        image_size=(4 * model.size_multiple, 4 * model.size_multiple)
    )  # not read: the steps get their images
    objective = ReconstructionConfig(
        ModelConfig("dualvitok"), data=data, loss=loss, noise=noise, optimizer=OptimizerConfig(lr=0.0)
    )
    state = build_state(RunConfig("", objective, steps=1 << 20), Accelerator(cpu=True))
    stored = reference.tensors("train")
    prefix = "discriminator.main."
    weights = {f"layers.{k.removeprefix(prefix)}": v.clone() for k, v in stored.items() if k.startswith(prefix)}
    state.objective.networks["discriminator"].load_state_dict(weights)
    return state


def record_gradients(model: nn.Module) -> dict[str, Tensor]:
    """Filled as the gradients come in, before they are clipped and cleared."""
    gradients: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:

            def keep(p: Tensor, name: str = name) -> None:
                assert p.grad is not None
                gradients[name] = p.grad.clone()

            parameter.register_post_accumulate_grad_hook(keep)
    return gradients


def close(actual: Tensor | float, expected: Tensor, name: str, share: float = RTOL) -> None:
    actual = torch.as_tensor(actual)
    atol = share * float(expected.abs().max())
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol, msg=lambda m: f"{name}: {m}")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("phase", ["pre_gan", "with_gan"])
def test_step(name: str, phase: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = case(f"dualvitok/{name}")
    t = {k.split(".", 1)[1]: v for k, v in reference.tensors("train").items() if k.startswith(f"{phase}.")}
    description = json.loads((reference.folder / "train.json").read_text())
    state = state_of(reference, description["disc_start"], monkeypatch)
    state.step = state.stage_step = description["steps"][phase]
    tokenizer, discriminator = (state.objective.networks[name] for name in ("tokenizer", "discriminator"))
    assert isinstance(tokenizer, DualViTok)
    assert isinstance(discriminator, PatchGAN)
    gradients, of_discriminator = record_gradients(tokenizer), record_gradients(discriminator)
    report, _ = train_step(state, [Batch(reference.inputs[description["image"]], ["", ""], [])])

    share = AT_A_KINK.get((name, phase), RTOL)
    for ours, theirs in [
        ("pixel", "gen_rec_loss"),
        ("perceptual", "gen_p_loss"),
        ("semantic", "sem_semantic_cos_loss"),
        ("loss", "total"),
        ("grad_norm", "grad_norm"),
    ]:
        close(report[ours], t[theirs], ours)
    commitments = t["commit_pixel"] + t["commit_semantic"]
    close(report["codebook"] + 0.25 * report["commitment"], commitments, "codebook and commitment")

    shapes = {n: tuple(p.shape) for n, p in tokenizer.state_dict().items()}
    theirs = give(links_of(tokenizer.config, shapes), gradients)
    stored = {k.removeprefix("grad/"): v for k, v in t.items() if k.startswith("grad/")}
    assert len(stored) >= 10
    for key, expected in stored.items():
        close(theirs[key], expected, key, share)
    assert len([n for n, p in tokenizer.named_parameters() if not p.requires_grad]) == description["n_frozen"]

    if phase == "pre_gan":  # the original runs the discriminator all the same, with gradients of zero
        assert "generator" not in report
        assert not of_discriminator
        return
    close(report["generator"], t["gen_generator_adv_loss"], "generator")
    close(0.5 * report["discriminator"], t["disc_loss"], "discriminator")
    for key, expected in t.items():
        if key.startswith("disc_grad/"):
            close(of_discriminator[key.replace("disc_grad/main.", "layers.")], expected, key, share)
    norm = discriminator.layers[3]
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.running_mean is not None
    close(norm.running_mean, t["disc_running_mean_main3"], "running mean")


def test_noise_changes_the_image_and_not_the_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    reference = case("dualvitok/small_nodc_mlp_rot")
    batch = [Batch(reference.inputs["a.image"], ["", ""], [])]
    plain = train_step(state_of(reference, 10, monkeypatch), batch)[0]
    noisy = train_step(state_of(reference, 10, monkeypatch, NoiseConfig(1.0, 0.5)), batch)[0]
    assert noisy["pixel"] != plain["pixel"]
    assert noisy["semantic"] == pytest.approx(plain["semantic"], rel=1e-5)
    assert noisy["codebook"] == pytest.approx(plain["codebook"], rel=1e-5)
