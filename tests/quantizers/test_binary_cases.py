"""LFQ and BSQ against Open-MAGVIT2, Show-o, bsq-vit and Infinity: values, bits, terms, gradients."""

import pytest
import torch
from torch import Tensor

from tests.cases import case, close
from tokenizers_mm.functional.bits import flip_bits, ids_to_bits
from tokenizers_mm.functional.multiscale import area_down
from tokenizers_mm.quantizers.binary import BSQ, LFQ, BSQConfig, LFQConfig
from tokenizers_mm.quantizers.multiscale import INFINITY_SCALES, MultiScaleQuantizer


def test_open_magvit2() -> None:
    own = case("lfq/open_magvit2_lfq")
    options, out = own.config, own.outputs
    bits = options["bits"]
    quantizer = LFQ(LFQConfig(bits, temperature=options["temperature"])).train()
    z, g = own.inputs["x"].requires_grad_(), own.inputs["grad_out"]
    found = quantizer.quantize(z.movedim(1, -1))
    terms = found.terms
    assert terms is not None
    assert torch.equal(found.ids.flatten(), out["indices"])
    close(found.vectors.movedim(-1, 1), out["zq"], "zq")
    close(terms["commitment"], out["commitment"], "commitment")
    close(terms["entropy"], out["entropy_aux_loss"], "entropy")
    close(quantizer.look_up(torch.arange(1 << bits)), out["codebook"], "codebook")
    close(quantizer.look_up(found.ids).movedim(-1, 1), out["codes_from_indices"], "codes_from_indices")
    straight = (found.vectors.movedim(-1, 1) * g).sum()
    weighted = options["codebook_weight"] * terms["entropy"] + options["commit_weight"] * terms["commitment"]
    for objective, suffix in (
        (terms["entropy"], "entropy"),
        (terms["commitment"], "commit"),
        (straight + weighted, "total"),
    ):
        close(torch.autograd.grad(objective, z, retain_graph=True)[0], out[f"grad_x_{suffix}"], suffix)
    evaluated = quantizer.eval().quantize(z.movedim(1, -1))
    assert torch.equal(evaluated.ids.flatten(), out["eval_indices"])
    close(evaluated.vectors.movedim(-1, 1), out["eval_zq"], "eval_zq")
    pre, post = options["factorized_bits"]
    assert pre == post
    halves = LFQ(LFQConfig(bits, groups=2)).eval().quantize(z.movedim(1, -1)).ids
    assert torch.equal(halves.flatten(0, -2), torch.stack([out["indices_pre"], out["indices_post"]], -1))
    assert torch.equal(halves[..., 0] + (halves[..., 1] << pre), found.ids)


def test_show_o() -> None:
    own = case("lfq/showo_lfq")
    options, out = own.config, own.outputs
    config = LFQConfig(
        options["codebook_dim"], order="msb_first", entropy_bits=1, temperature=1.0, eps=1e-8, codebook_term=True
    )
    quantizer = LFQ(config).train()
    z, g = own.inputs["z"].requires_grad_(), own.inputs["grad_out"]
    found = quantizer.quantize(z.movedim(1, -1))
    terms = found.terms
    assert terms is not None
    assert set(terms) == quantizer.loss_terms
    assert torch.equal(found.ids, out["indices"][:, 0])
    close(found.vectors.movedim(-1, 1), out["zq"], "zq")
    close(quantizer.look_up(found.ids).movedim(-1, 1), out["codebook_entry"], "codebook_entry")
    state = own.tensors("state_dict")
    close(quantizer.look_up(torch.arange(len(state["embedding"]))), state["embedding"], "embedding")
    entropy = options["entropy_multiplier"] * terms["entropy"]
    quant = options["commit_loss_multiplier"] * (terms["commitment"] + options["beta"] * terms["codebook"])
    close(entropy, out["entropy_loss"], "entropy_loss")
    close(quant, out["quantizer_loss"], "quantizer_loss")
    (to_z,) = torch.autograd.grad((found.vectors.movedim(-1, 1) * g).sum() + quant + entropy, z)
    close(to_z, out["grad_z"], "grad_z")


@pytest.mark.parametrize("name", ["bsqvit_analytical_g1", "bsqvit_group3", "bsqvit_nol2_eval"])
def test_bsq(name: str) -> None:
    own = case(f"bsq/{name}")
    options, out = own.config, own.outputs
    group, dim = options["group_size"], options["embed_dim"]
    config = BSQConfig(
        dim,
        normalize=False,  # the caller does so in the original
        unit=options["l2_norm"],
        entropy_bits=1 if options["persample_entropy_compute"] == "analytical" else group,
        inverse_temperature=options["inv_temperature"],
        diversity=options["gamma"] / options["gamma0"],
    )
    quantizer = BSQ(config).train()
    z, g = own.inputs["z"].requires_grad_(), own.inputs["grad_out"]
    found = quantizer.quantize(z)
    terms = found.terms
    assert terms is not None
    assert torch.equal(found.ids, out["indices"])
    close(found.vectors, out["zq"], "zq")
    close(quantizer.look_up(found.ids) / quantizer.size, out["codes_pm1"], "codes")
    grouped = BSQ(BSQConfig(dim, groups=dim // group)).eval()
    ids = grouped.quantize(z).ids
    assert torch.equal(ids.view(out["group_indices"].shape), out["group_indices"])
    close(grouped.look_up(ids) / grouped.size, out["group_codes_pm1"], "group codes")
    weight = options["zeta"] * options["gamma0"] / options["inv_temperature"]
    loss = options["beta"] * terms["commitment"] + weight * terms["entropy"]
    entropy = out["per_sample_entropy"] - config.diversity * out["codebook_entropy"]
    close(terms["entropy"], entropy, "entropy")
    close(loss, out["loss"], "loss")
    total = (found.vectors * g).sum() + loss
    close(torch.autograd.grad(loss, z, retain_graph=True)[0], out["grad_z_loss_only"], "grad_z_loss_only")
    close(torch.autograd.grad(total, z)[0], out["grad_z"], "grad_z")


def test_infinity() -> None:
    own = case("bsq/infinity_msbsq_bsc")
    options, inputs, out = own.config, own.inputs, own.outputs
    dim = options["codebook_dim"]
    grids = [(rows, columns) for _, rows, columns in inputs["scale_schedule"].tolist()]
    inner = BSQ(BSQConfig(dim, groups=dim))
    quantizer = MultiScaleQuantizer(inner, grids, INFINITY_SCALES).eval()
    z = inputs["h"].movedim(1, -1)
    found = quantizer.quantize(z)
    labels = torch.cat([out[f"bits_{i}"].flatten(1, 3) for i in range(len(grids))], dim=1)
    assert torch.equal(found.ids, labels.long())
    close(found.vectors.movedim(-1, 1), out["zq"], "zq")
    close(quantizer.look_up(found.ids).movedim(-1, 1), out["summed_codes"], "summed_codes")
    expected = torch.cat([out[f"var_input_{i}"].flatten(2).mT for i in range(len(grids) - 1)], dim=1)
    close(quantizer.next_inputs(found.ids), expected, "var_input")
    strengths = inputs["bsc_strengths"].tolist()

    def corrupt(ids: Tensor, scale: int) -> Tensor:
        if scale >= options["noise_apply_layers"]:
            return ids
        return flip_bits(ids, inputs[f"bsc_uniform_{scale}"].view(ids.shape), strengths[scale])

    ids, history = quantizer.self_correcting(z, corrupt)
    assert torch.equal(ids, out["bsc_gt_bits"].long())
    close(history, out["bsc_x_BLC_wo_prefix"], "bsc_x")
    one = MultiScaleQuantizer(BSQ(BSQConfig(dim)), grids, INFINITY_SCALES).eval()
    assert torch.equal(ids_to_bits(one.quantize(z).ids, dim, "msb_first").long(), found.ids)
    assert area_down(z, grids[0]).shape == (2, 1, 1, dim)
