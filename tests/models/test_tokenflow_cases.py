"""TokenFlow against its original code: all three variants, base and enhanced decoders, both sizes of the CLIP one.

Tolerances: features 2e-5 + 1e-4 relative, images 5e-4 absolute, ids exact: those of the cases' README, where the
original run with 1 and with 2 threads differs by up to 5e-6 and 7.3e-5.
"""

from functools import partial

import pytest
import torch
from torch import Tensor

from tests.cases import Case, case, near
from tests.weights_by_rule import tokenflow_weights, uniform
from tokenizers_mm.checkpoints import tokenflow as published
from tokenizers_mm.checkpoints.tokenflow import links_of
from tokenizers_mm.checkpoints.upstream import Link, give
from tokenizers_mm.models import TokenFlow

CASES = ["clipb_224_base", "clipb_256_enhanced", "vitamin_256", "siglip_384"]
STEPS = ["train_step_clipb_224", "train_step_siglip_384", "train_step_finetune_decoder"]


def build(reference: Case) -> TokenFlow:
    return published.convert(tokenflow_weights(reference), reference.name, reference.config)


close = partial(near, rtol=1e-4, atol=2e-5)


def close_image(actual: Tensor, expected: Tensor, name: str) -> None:
    """Stored images may be thinned out: every n-th row and column."""
    step = actual.shape[-1] // expected.shape[-1]
    actual = actual[: len(expected), :, ::step, ::step]
    torch.testing.assert_close(actual, expected, atol=5e-4, rtol=0, msg=lambda m: f"{name}: {m}")


@pytest.mark.parametrize("name", CASES)
def test_model_case(name: str) -> None:
    reference = case(f"tokenflow/{name}")
    outputs, x = reference.outputs, reference.inputs["image"]
    tokenizer = build(reference)
    with torch.no_grad():
        features = tokenizer.encode_features(x).permute(0, 3, 1, 2)
        close(features[:, :32], outputs["semantic_pre_quant"], "semantic_pre_quant")
        close(features[:, 32:], outputs["pixel_pre_quant"], "pixel_pre_quant")
        out = tokenizer(x)
        assert torch.equal(out.quantized["shared"].ids, outputs["indices"])
        close(out.semantic, outputs["semantic_recon"], "semantic_recon")
        close_image(out.image, outputs["image_recon"], "image_recon")
        codes = tokenizer.encode(x)
        close_image(tokenizer.decode(codes), outputs["image_recon"], "decode")
        close(tokenizer.features(codes), outputs["llm_features"], "llm_features")
        first_four = sum(rows * columns for rows, columns in tokenizer.config.scales[:4])
        partial = tokenizer.decode_ids(codes.ids[:, :first_four])
        close_image(partial, outputs["decode_code_partial.image_recon"], "partial image")
        vectors = tokenizer.quantizer.look_up(codes.ids[:, :first_four])
        close(tokenizer.decode_semantic(vectors), outputs["decode_code_partial.semantic_recon"], "partial semantic")


@pytest.mark.parametrize("name", STEPS)
def test_train_step(name: str) -> None:
    """One step of the original: every term, and of every parameter's gradient its norm and a random projection."""
    reference = case(f"tokenflow/{name}")
    base = case(f"tokenflow/{reference.config['base_case']}")
    tokenizer = build(base).train()
    if reference.config["finetune_decoder"]:
        for parameter_name, parameter in tokenizer.named_parameters():
            parameter.requires_grad_(parameter_name.startswith("pixel_decoder."))
    inputs, outputs = reference.inputs, reference.outputs
    out = tokenizer(inputs["image"])
    assert out.quantized["shared"].terms is not None
    terms = {
        "rec_loss": (inputs["image"] - out.image).square().mean(),
        "vq_loss": out.quantized["shared"].terms["codebook"],
        "commit_loss": 0.25 * out.quantized["shared"].terms["commitment"],
        "semantic_loss": (1 - torch.cosine_similarity(out.semantic, inputs["target"], dim=-1)).mean(),
    }
    for key, value in terms.items():
        torch.testing.assert_close(value.detach(), outputs[key], atol=2e-5, rtol=1e-4, msg=lambda m, k=key: f"{k}: {m}")
    close(out.semantic.detach(), outputs["semantic_recon"], "semantic_recon")
    sum(terms.values(), torch.zeros(())).backward()
    compare_gradients(tokenizer, base, reference)


def compare_gradients(tokenizer: TokenFlow, base: Case, reference: Case) -> None:
    config, outputs = reference.config, reference.outputs
    trained = {name: p for name, p in tokenizer.named_parameters() if p.grad is not None}
    links = parameter_links(tokenizer, base)
    theirs = give(links, {name: p.grad for name, p in trained.items() if p.grad is not None})
    assert set(config["param_names"]) == set(theirs)
    assert not set(config["params_without_grad"]) & set(theirs)
    total = float(torch.stack([g.double().square().sum() for g in theirs.values()]).sum().sqrt())
    assert total == pytest.approx(float(outputs["grad_total_norm_before_clip"]), rel=1e-4)
    expected = outputs["grad_norm_and_projection"].tolist()
    noise = 1e-6 * total  # float32: small gradients are differences of large ones
    for (norm, projection), name in zip(expected, config["param_names"], strict=True):
        gradient = theirs[name].double()
        direction = torch.from_numpy(uniform("proj." + name, tuple(gradient.shape), 72)).double()
        assert float(gradient.norm()) == pytest.approx(norm, rel=1e-3, abs=noise), name
        assert float((gradient * direction).sum()) == pytest.approx(projection, rel=1e-3, abs=1e-3 * norm + noise), name
    for key in (k for k in outputs if k.startswith("grad.")):  # stored after clipping to norm 1
        torch.testing.assert_close(theirs[key[5:]] / total, outputs[key], rtol=1e-3, atol=1e-6)
    before = {name: p.detach().clone() for name, p in trained.items()}
    torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
    torch.optim.Adam(trained.values(), lr=1e-4, betas=(0.9, 0.95)).step()
    deltas = give(links, {name: p.detach() - before[name] for name, p in trained.items()})
    for norm, name, (gradient, _) in zip(
        outputs["param_delta_norm"].tolist(), config["param_names"], expected, strict=True
    ):
        if gradient > 10 * noise:  # the first step of Adam has the sign of the gradient, and noise has no sign
            assert float(deltas[name].double().norm()) == pytest.approx(norm, rel=2e-2, abs=5e-5), name


def parameter_links(tokenizer: TokenFlow, base: Case) -> list[Link]:
    """Links of the parameters that have a way back (not the tables that were interpolated, which are frozen here)."""
    shapes = {name: tuple(t.shape) for name, t in tokenizer.state_dict().items()}
    return [item for item in links_of(base.config, shapes) if item.change is None]
