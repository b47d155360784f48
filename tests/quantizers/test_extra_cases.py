"""FSQ, SimVQ and VAR's multi-scale quantizer against the original code: values, ids, terms, gradients."""

import pytest
import torch

from tests.cases import case, close
from tokenizers_mm.quantizers.fsq import FSQ, FSQConfig
from tokenizers_mm.quantizers.multiscale import MultiScaleQuantizer, ScalesConfig, SmoothingConfig
from tokenizers_mm.quantizers.vq import VQ, SimVQ, SimVQConfig, VQConfig


@pytest.mark.parametrize("name", ["fsq_8_5_5", "fsq_symmetric"])
def test_fsq(name: str) -> None:
    own = case(f"extra/{name}")
    options, out = own.config, own.outputs
    levels = tuple(options["levels"])
    bound = "symmetric" if options.get("preserve_symmetry") else "tanh"
    quantizer = FSQ(FSQConfig(levels, len(levels), bound, project=False)).train()
    z = own.inputs["z"].requires_grad_()
    found = quantizer.quantize(z)
    assert torch.equal(found.ids, out["indices"].long())
    close(found.vectors, out["codes"], "codes")
    close(quantizer.look_up(found.ids), out["indices_to_codes"], "indices_to_codes")
    (found.vectors * own.inputs["grad_out"]).sum().backward()
    close(z.grad, out["grad_z"], "grad_z")  # type: ignore[arg-type]


def test_simvq() -> None:
    own = case("extra/simvq")
    options, out, state = own.config, own.outputs, own.tensors("state_dict")
    quantizer = SimVQ(SimVQConfig(options["n_e"], options["e_dim"], bias=True)).train()
    names = {"frozen": "embedding", "transform.weight": "embedding_proj", "transform.bias": "embedding_proj"}
    quantizer.load_state_dict({k: state[f"{v}.{'bias' if 'bias' in k else 'weight'}"] for k, v in names.items()})
    z, g = own.inputs["z"].requires_grad_(), own.inputs["grad_out"]
    found = quantizer.quantize(z.movedim(1, -1))
    assert torch.equal(found.ids.flatten(), out["indices"])
    close(found.vectors.movedim(-1, 1), out["zq"], "zq")
    close(quantizer.codebook(), out["effective_codebook"], "effective_codebook")
    close(quantizer.look_up(found.ids), found.vectors, "look_up")
    terms = found.terms
    assert terms is not None
    # "legacy" exchanges the weights of the two terms.
    weights = (options["beta"], 1.0) if options["legacy"] else (1.0, options["beta"])
    loss = weights[0] * terms["codebook"] + weights[1] * terms["commitment"]
    close(loss, out["commit_loss"], "commit_loss")
    total = (found.vectors.movedim(-1, 1) * g).sum() + loss
    assert quantizer.transform.bias is not None
    to_z, to_w, to_b = torch.autograd.grad(total, (z, quantizer.transform.weight, quantizer.transform.bias))
    for found_gradient, name in ((to_z, "grad_z"), (to_w, "grad_proj_w"), (to_b, "grad_proj_b")):
        close(found_gradient, out[name], name)


def test_var() -> None:
    own = case("extra/var_multiscale_vq")
    options, out, state = own.config, own.outputs, own.tensors("state_dict")
    grids = [(side, side) for side in options["patch_nums"]]
    distance = "cosine" if options["using_znorm"] else "l2"
    smoothing = SmoothingConfig(options["share_quant_resi"], options["quant_resi"])
    quantizer = MultiScaleQuantizer(
        VQ(VQConfig(options["vocab"], options["Cvae"], distance)), grids, ScalesConfig("bicubic", smoothing, "by_sum")
    ).train()
    names = {k: k.replace("quant_resi.qresi_ls.", "smoothing.convolutions.") for k in state if "qresi" in k}
    quantizer.load_state_dict({"quantizer.codes": state["embedding.weight"]} | {v: state[k] for k, v in names.items()})
    z, g = own.inputs["f"].requires_grad_(), own.inputs["grad_out"]
    found = quantizer.quantize(z.movedim(1, -1))
    assert torch.equal(found.ids, torch.cat([out[f"idx_{i}"] for i in range(len(grids))], dim=1))
    close(found.vectors.movedim(-1, 1), out["f_hat"], "f_hat")
    for index, total in enumerate(quantizer.partial_sums(found.ids)):
        close(total.movedim(-1, 1), out[f"fhat_{index}"], f"fhat_{index}")
    close(quantizer.next_inputs(found.ids), out["var_input"], "var_input")
    terms = found.terms
    assert terms is not None
    assert set(terms) == quantizer.loss_terms
    loss = terms["codebook"] + options["beta"] * terms["commitment"]
    close(loss, out["vq_loss"], "vq_loss")
    phi = quantizer.smoothing.convolutions[0].weight  # type: ignore[union-attr]
    total = (found.vectors.movedim(-1, 1) * g).sum() + loss
    to_z, to_codes, to_phi = torch.autograd.grad(total, (z, quantizer.quantizer.codes, phi))  # type: ignore[arg-type]
    for gradient, name in ((to_z, "grad_f"), (to_codes, "grad_embedding"), (to_phi, "grad_phi0")):
        close(gradient, out[name], name)  # type: ignore[arg-type]
