"""IBQ and its variant on unit vectors against the original code: values, ids, terms, and gradients of each."""

import pytest
import torch

from tests.cases import case, close
from tokenizers_mm.quantizers.ibq import IBQ, IBQConfig


@pytest.mark.parametrize("name", ["ibq_train", "ibq_train_small_scale"])
def test_ibq(name: str) -> None:
    own = case(f"ibq/{name}")
    options, out = own.config, own.outputs
    config = IBQConfig(options["n_e"], options["e_dim"], entropy_temperature=options["entropy_temperature"])
    quantizer = IBQ(config).train()
    quantizer.load_state_dict({"codes": own.tensors("state_dict")["embedding.weight"]})
    z, g = own.inputs["z"].requires_grad_(), own.inputs["grad_out"]
    found = quantizer.quantize(z.movedim(1, -1))
    assert torch.equal(found.ids.flatten(), out["indices"])
    close(found.vectors.movedim(-1, 1), out["zq"], "zq")
    close(quantizer.look_up(found.ids).movedim(-1, 1), out["codebook_entry"], "codebook_entry")
    terms = found.terms
    assert terms is not None
    assert set(terms) == quantizer.loss_terms
    quant = terms["assignment"] + terms["commitment"] + options["beta"] * terms["codebook"]
    close(quant, out["quant_loss"], "quant_loss")
    close(terms["entropy"], out["entropy_loss"], "entropy_loss")
    straight = (found.vectors.movedim(-1, 1) * g).sum()
    total = straight + options["quant_loss_weight"] * quant + options["entropy_loss_weight"] * terms["entropy"]
    for objective, suffix in ((straight, "ste"), (quant, "quant"), (terms["entropy"], "entropy"), (total, "total")):
        to_z, to_codes = torch.autograd.grad(objective, (z, quantizer.codes), retain_graph=True)
        close(to_z, out[f"grad_z_{suffix}"], f"grad_z_{suffix}")
        close(to_codes, out[f"grad_emb_{suffix}"], f"grad_emb_{suffix}")
    evaluated = quantizer.eval().quantize(z.movedim(1, -1))
    assert torch.equal(evaluated.ids, found.ids)
    assert evaluated.terms is None
    close(evaluated.vectors, found.vectors, "eval")


def test_ibq_on_unit_vectors() -> None:
    own = case("ibq/ibq_xomni_l2")
    options, out = own.config, own.outputs
    config = IBQConfig(options["n_e"], options["e_dim"], options["quantization_temp"], normalize=options["l2_norm"])
    quantizer = IBQ(config).train()
    quantizer.load_state_dict({"codes": own.tensors("state_dict")["embedding.weight"]})
    z, g = own.inputs["z"].requires_grad_(), own.inputs["grad_out"]
    found = quantizer.quantize(z.movedim(1, -1))
    assert torch.equal(found.ids, out["train_indices"])
    close(found.vectors.movedim(-1, 1), out["train_zq"], "train_zq")
    close(quantizer.look_up(found.ids).movedim(-1, 1), out["codebook_entry"], "codebook_entry")
    terms = found.terms
    assert terms is not None
    commit = terms["assignment"] + terms["commitment"] + options["beta"] * terms["codebook"]
    close(commit, out["train_commit_loss"], "train_commit_loss")
    total = (found.vectors.movedim(-1, 1) * g).sum() + commit
    for gradient, name in zip(torch.autograd.grad(total, (z, quantizer.codes)), ("grad_z", "grad_emb"), strict=True):
        close(gradient, out[name], name)
    evaluated = quantizer.eval().quantize(z.movedim(1, -1))
    assert torch.equal(evaluated.ids, out["eval_indices"])
    close(evaluated.vectors.movedim(-1, 1), out["eval_zq"], "eval_zq")
