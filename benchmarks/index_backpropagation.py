"""Index backpropagation (IBQ) with both entropies: memory and time against the form with N x K matrices.

    python -m benchmarks.index_backpropagation [--shapes 1024x16384x256 4096x262144x256] [--rounds 3] [--record]

A step is the forward and backward pass of the propagated vectors, the three terms and both entropies (temperature
0.01). Memory is what a step needs on top of its inputs, without the gradients it returns. The matrix form is left out
where its matrices would take more than 8 GB; so are time and difference there. One thread, the processor's time.
The difference is that of the gradients from the matrix form in float64, relative to their norm.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import harness
from tokenizers_mm.functional.assignment import Assignment, assign

TEMPERATURE = 0.01
MATRICES = 9
"""N x K matrices that the matrix form holds at its peak, at least."""


def matrix_form(z: Tensor, codes: Tensor) -> Assignment:
    """The definition with one-hot vectors, as the original code has it."""
    logits = z @ codes.T
    p, ids = logits.softmax(-1), logits.argmax(-1)
    hard = torch.zeros_like(logits).scatter_(1, ids[:, None], 1.0)
    log_q = (logits / TEMPERATURE).log_softmax(-1)
    q = log_q.exp()
    mean = q.mean(0)
    entropies = -(q * log_q).sum(-1).mean(), -(mean * (mean + 1e-5).log()).sum()
    return Assignment((hard - p.detach() + p) @ codes, hard @ codes, ids, *entropies)


def ours(z: Tensor, codes: Tensor) -> Assignment:
    return assign(z, codes, entropy_scale=1 / TEMPERATURE)


FORMS = {"ours": ours, "matrix": matrix_form}


def step(form: Callable[[Tensor, Tensor], Assignment], z: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of z and the codes."""
    found = form(z, codes)
    terms = F.mse_loss(found.propagated, z) + F.mse_loss(z, found.rows.detach())
    terms = terms + 0.25 * F.mse_loss(found.rows, z.detach())
    terms = terms + 0.05 * (found.sample_entropy - found.batch_entropy) + found.propagated.square().mean()
    to_z, to_codes = torch.autograd.grad(terms, (z, codes))
    return to_z, to_codes


def measure(name: str, z: Tensor, codes: Tensor, exact: list[Tensor] | None, rounds: int) -> dict[str, float | None]:
    """Seconds, megabytes, and the relative difference of the gradients from the exact ones."""
    gradients: list[Tensor] = []
    extra = harness.peak_extra_megabytes(lambda: gradients.extend(step(FORMS[name], z, codes)))
    returned = 4 * (z.numel() + codes.numel()) / 1e6
    facts: dict[str, float | None] = {"megabytes": None if extra is None else extra - returned}
    if exact is not None:
        facts["seconds"] = (
            harness.interleave({name: partial(step, FORMS[name], z, codes)}, rounds, clock="cpu")[name] / 1e3
        )
        differences = [float((a - b).norm() / b.norm()) for a, b in zip(gradients, exact, strict=True)]
        facts["difference"] = max(differences)
    return facts


def main(arguments: Sequence[str] | None = None) -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--shapes", nargs="+", default=["1024x16384x256", "4096x262144x256"])
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    about, rows = harness.machine(), [["N x K x D", "form", "CPU s", "MB", "difference"]]
    for shape in options.shapes:
        n, k, d = harness.shape(shape)
        torch.manual_seed(0)
        z, codes = torch.randn(n, d, requires_grad=True), (torch.randn(k, d) * 0.1).requires_grad_()
        small = 4 * n * k * MATRICES <= 8e9
        wide = [tensor.detach().double().requires_grad_() for tensor in (z, codes)]
        exact = list(step(matrix_form, *wide)) if small else None
        step(ours, z[:2].detach().requires_grad_(), codes)  # what is loaded by the first call does not count
        for name in FORMS if small else ("ours",):
            facts = measure(name, z, codes, exact, options.rounds)
            cells = [facts.get("seconds"), facts["megabytes"], facts.get("difference")]
            forms = ("{:.2f}", "{:.0f}", "{:.1e}")
            shown = ["" if cell is None else form.format(cell) for cell, form in zip(cells, forms, strict=True)]
            rows.append([shape, name, *shown])
            if options.record:
                harness.record("index_backpropagation", {"shape": shape, "form": name, **facts}, about)
    print(harness.table(rows))


if __name__ == "__main__":
    main()
