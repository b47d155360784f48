"""The training terms against TokenFlow's original: teacher, LPIPS, discriminator, totals, adaptive weight.

Tolerances: 1e-5 relative for scalars and 2e-5 for features, as the cases' README has it (5e-10 between thread counts).
"""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.cases import Case, case
from tests.weights_by_rule import offset_and_amplitude, uniform
from tokenizers_mm.checkpoints.tokenflow_variants import VARIANTS
from tokenizers_mm.checkpoints.upstream import link, take
from tokenizers_mm.encoders.semantic import CLIP_MEAN, CLIP_STD, SemanticEncoder, SemanticEncoderConfig
from tokenizers_mm.functional.adversarial import (
    adaptive_weight,
    hinge_discriminator,
    hinge_generator,
    logistic_discriminator,
    non_saturating_generator,
)
from tokenizers_mm.functional.alignment import cosine_distance
from tokenizers_mm.losses.discriminators import PatchGAN, PatchGANConfig

pytest.importorskip("lpips", reason="the perceptual term needs the lpips package")
from tokenizers_mm.losses.perceptual import LPIPS


@pytest.fixture(scope="module")
def reference() -> Case:
    return case("tokenflow/losses")


@pytest.fixture(scope="module")
def perceptual(reference: Case) -> LPIPS:
    """LPIPS with the case's weights: by rule on the original's names, the linear ones positive."""
    model = LPIPS()
    seed = reference.config["weights_seed"]
    keys = json.loads((reference.folder / "lpips_keys.json").read_text())

    def weight(name: str) -> Tensor:
        shape, full = keys[name], f"perceptual_loss.{name}"
        offset, amplitude = offset_and_amplitude(full, shape)
        tensor = torch.from_numpy(np.float32(offset) + np.float32(amplitude) * uniform(full, shape, seed))
        return tensor.abs() if name.startswith("lin") else tensor

    state = model.net.state_dict()
    aliases = {name: f"lin{name.split('.')[1]}.model.1.weight" for name in state if name.startswith("lins.")}
    model.net.load_state_dict(
        {n: t if n.startswith("scaling_layer") else weight(aliases.get(n, n)) for n, t in state.items()}
    )
    return model


def discriminator(reference: Case) -> PatchGAN:
    config = reference.config["disc"]
    model = PatchGAN(PatchGANConfig(config["ndf"], config["n_layers"]))
    state = {n: t for n, t in reference.tensors("state_dict").items() if n.startswith("discriminator.")}
    model.load_state_dict({n.replace("discriminator.main", "layers"): t for n, t in state.items()})
    return model


@torch.no_grad()
def test_teacher_target_and_distance(reference: Case) -> None:
    sizes, inputs, outputs = reference.config["teacher_clip"], reference.inputs, reference.outputs
    options = {
        "img_size": sizes["image_resolution"],
        "embed_dim": sizes["vision_width"],
        "depth": sizes["vision_layers"],
        "num_heads": sizes["vision_width"] // 64,
        "num_classes": sizes["embed_dim"],
    }
    name = "vit_base_patch16_clip_quickgelu_224"
    teacher = SemanticEncoder(SemanticEncoderConfig(name, options, mean=CLIP_MEAN, std=CLIP_STD, features="projected"))
    state = {
        n.replace("teacher_model.visual", "encoder_vqkd"): t
        for n, t in reference.tensors("state_dict").items()
        if n.startswith("teacher_model.visual")
    }
    projection = state.pop("encoder_vqkd.proj")
    tower = {f"encoder_vqkd.{n}": tuple(t.shape) for n, t in teacher.tower.state_dict().items() if "head" not in n}
    flat = {n: s[1:] if s[:2] != (1, 1) else s[2:] for n, s in tower.items() if n.endswith(("cls_token", "pos_embed"))}
    ours = take(link(tower, VARIANTS["clipb_224"].rules, flat), state, "teacher")
    ours |= {"encoder_vqkd.head.weight": projection.T, "encoder_vqkd.head.bias": torch.zeros(sizes["embed_dim"])}
    teacher.tower.load_state_dict({n.removeprefix("encoder_vqkd."): t for n, t in ours.items()})
    target = teacher.eval()(inputs["image"]).flatten(1, 2)
    torch.testing.assert_close(target, outputs["teacher_target"], atol=2e-5, rtol=1e-4)
    distance = cosine_distance(inputs["semantic_recon"], target)
    torch.testing.assert_close(distance, outputs["semantic_loss"], atol=0, rtol=1e-5)


@torch.no_grad()
def test_perceptual_distance(reference: Case, perceptual: LPIPS) -> None:
    inputs, outputs = reference.inputs, reference.outputs
    perceptual.train()  # dropout stays off
    distance = perceptual(inputs["image"], inputs["recon"])
    torch.testing.assert_close(distance, outputs["lpips"].flatten(), atol=1e-7, rtol=1e-5)
    features = perceptual.net.net(perceptual.net.scaling_layer(inputs["image"]))
    for name, feature in features._asdict().items():
        torch.testing.assert_close(feature[:1, :4, :4, :4], outputs[f"vgg.{name}.corner"], atol=2e-5, rtol=1e-4)
        stats = torch.stack([feature.mean(), feature.std(), feature.abs().max()])
        torch.testing.assert_close(stats, outputs[f"vgg.{name}.stats"], atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_discriminator_and_totals(reference: Case, perceptual: LPIPS) -> None:
    """Before and after the step at which the discriminator comes in, as training calls it: fake, then real and fake."""
    inputs, outputs, config = reference.inputs, reference.outputs, reference.config
    model = discriminator(reference).eval()
    torch.testing.assert_close(model(inputs["image"]), outputs["disc_eval.real"], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(model(inputs["recon"]), outputs["disc_eval.fake"], atol=1e-6, rtol=1e-5)
    for key in (k for k in outputs if k.startswith("disc_after.")):
        ours = model.state_dict()[key.replace("disc_after.main", "layers")]
        assert torch.equal(ours, outputs[key])  # evaluation moves no statistics
    terms = {
        "rec_loss": (inputs["image"] - inputs["recon"]).square().mean(),
        "p_loss": perceptual(inputs["image"], inputs["recon"]).mean(),
        "vqkd_loss": outputs["semantic_loss"],
    }
    for step in (1, 20001):
        weight = config["disc_weight"] if step >= config["disc_start"] else 0.0
        model = discriminator(reference).train()
        adversarial = hinge_generator(model(inputs["recon"]))
        real, fake = model(inputs["image"]), model(inputs["recon"])
        torch.testing.assert_close(real, outputs[f"disc.step{step}.logits_real"], atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(fake, outputs[f"disc.step{step}.logits_fake"], atol=1e-6, rtol=1e-5)
        loss = weight * hinge_discriminator(real, fake)
        torch.testing.assert_close(loss, outputs[f"disc.step{step}.loss"], atol=0, rtol=1e-5)
        expected = {name: outputs[f"gen.step{step}.{name}"] for name in [*terms, "generator_adv_loss", "total"]}
        for name, value in terms.items():
            torch.testing.assert_close(value, expected[name], atol=0, rtol=1e-5)
        torch.testing.assert_close(adversarial, expected["generator_adv_loss"], atol=1e-7, rtol=1e-5)
        total = sum(terms.values()) + weight * adversarial + sum(config["codebook_losses"])
        torch.testing.assert_close(total, expected["total"], atol=0, rtol=1e-5, check_dtype=False)


def test_adaptive_weight(reference: Case, perceptual: LPIPS) -> None:
    inputs, outputs = reference.inputs, reference.outputs
    model, last_layer = discriminator(reference).eval(), inputs["last_layer"].requires_grad_()
    image = F.conv2d(inputs["feat"], last_layer, padding=1).tanh()
    reconstruction = (image - inputs["image"]).square().mean() + perceptual(inputs["image"], image).mean()
    weight = adaptive_weight(reconstruction, hinge_generator(model(image)), last_layer)
    torch.testing.assert_close(weight, outputs["adaptive_weight"], atol=0, rtol=1e-4)


@torch.no_grad()
def test_variants_of_the_adversarial_term(reference: Case) -> None:
    outputs = reference.outputs
    real, fake = outputs["disc_eval.real"], outputs["disc_eval.fake"]
    for value, name in [
        (hinge_discriminator(real, fake), "dloss.hinge"),
        (logistic_discriminator(real, fake), "dloss.vanilla"),
        (hinge_generator(fake), "gloss.hinge"),
    ]:
        torch.testing.assert_close(value, outputs[name], atol=1e-7, rtol=1e-5)
    # The original's non-saturating variant takes the logits for targets and the targets for logits. Ours does not.
    cross_entropy = F.binary_cross_entropy_with_logits
    swapped = cross_entropy(torch.ones_like(fake), fake)
    torch.testing.assert_close(swapped, outputs["gloss.non_saturating"], atol=0, rtol=1e-5)
    both = 0.5 * (cross_entropy(torch.ones_like(real), real) + cross_entropy(torch.zeros_like(fake), fake))
    torch.testing.assert_close(both, outputs["dloss.non_saturating"], atol=0, rtol=1e-5)
    right = cross_entropy(fake, torch.ones_like(fake))
    torch.testing.assert_close(non_saturating_generator(fake), right, atol=0, rtol=1e-5)
