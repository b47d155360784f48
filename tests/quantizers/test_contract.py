"""The promises of every kind in the table: values, gradients by tensor, ids and back, modes, precision, refusals."""

import copy
import dataclasses
import inspect
from typing import Any

import jaxtyping
import pytest
import torch
from torch import Tensor

from tests.quantizers.kinds import CONFIGS, DIM, MAKERS
from tokenizers_mm.config import Choice, from_mapping, to_mapping
from tokenizers_mm.functional import assignment
from tokenizers_mm.kernels.decisions import watch_decisions
from tokenizers_mm.models.exactness import Watcher
from tokenizers_mm.quantizers import QUANTIZERS, VQ, Quantizer, VQConfig, build_quantizer
from tokenizers_mm.types import Quantized

FIXED = {"fsq, symmetric", "multi-codebook, groups", "scales, Infinity"}
"""Kinds without parameters, with all variants of `FIXED_KINDS`."""

FIXED_KINDS = ("lfq", "bsq", "per dimension")

NORMALIZED = {"vq, unit", "ibq, unit", "bsq", "bsq, bits as ids"}
"""Kinds that divide features by their norm: the gradient is orthogonal to the features."""


@pytest.fixture(params=list(MAKERS))
def made(request: pytest.FixtureRequest) -> tuple[str, Quantizer, Tensor]:
    torch.manual_seed(0)
    return request.param, MAKERS[request.param](), torch.randn(3, 2, 2, DIM)


def ids_shape(quantizer: Quantizer, z: Tensor, name: str) -> tuple[int, ...]:
    lead = (len(z), 5) if name.startswith("scales") else z.shape[:-1]
    return (*lead, quantizer.groups) if quantizer.groups > 1 else tuple(lead)


def test_every_kind_is_walked() -> None:
    assert {config.kind for config in CONFIGS.values()} == set(QUANTIZERS)
    for kind, cls in QUANTIZERS.items():
        assert cls.Config.kind == kind  # type: ignore[attr-defined]


@pytest.mark.parametrize("config", CONFIGS.values(), ids=list(CONFIGS))
def test_configuration_files_name_it(config: Any) -> None:
    again = Choice(QUANTIZERS, "vq").convert(to_mapping(config), "config.quantizer")
    assert again == config
    assert build_quantizer(again).dim == config.dim == DIM
    with pytest.raises(ValueError, match="unknown key"):
        from_mapping(type(config), to_mapping(config) | {"colour": 1})


def test_values_and_ids(made) -> None:
    name, quantizer, z = made
    found = quantizer.eval().quantize(z)
    assert found.terms is None
    assert found.vectors.shape == z.shape
    assert found.ids.shape == ids_shape(quantizer, z, name)
    assert found.ids.dtype == torch.int64
    assert int(found.ids.min()) >= 0
    assert int(found.ids.max()) < quantizer.codebook_size
    if found.queries is not None:
        assert not found.queries.requires_grad
    expected = quantizer.look_up(found.ids)
    if name == "ibq, unit":  # rows as they are, see its docstring; they have norm 1 here
        torch.testing.assert_close(expected.norm(dim=-1), torch.ones(3, 2, 2))
    torch.testing.assert_close(found.vectors, expected, rtol=1e-5, atol=1e-6)


def test_looked_up_vectors_have_the_same_ids(made) -> None:
    name, quantizer, _ = made
    if name.startswith(("scales", "residual")):
        pytest.skip("the sum of several codes need not be its own nearest sum")
    quantizer.eval()
    if quantizer.codebook_size**quantizer.groups <= 1 << 12:
        everything = torch.cartesian_prod(*[torch.arange(quantizer.codebook_size)] * quantizer.groups)
        vectors = quantizer.look_up(everything)
        if name.startswith("fsq") and vectors.shape[-1] != quantizer.codebook_size and quantizer.config.project:
            pytest.skip("the linear maps of FSQ are not inverse to each other")
        if name == "fsq, symmetric":
            vectors = torch.atanh(vectors.clamp(-1 + 1e-3, 1 - 1e-3))
        again = quantizer.quantize(vectors).ids
        matches = (again == everything).double().mean()
        # A code that is not the nearest to itself: of an inner product, a longer one is.
        assert float(matches) == 1 or name == "ibq"


def test_terms_are_those_announced(made) -> None:
    _, quantizer, z = made
    terms = quantizer.train().quantize(z).terms
    assert terms is not None
    assert set(terms) == quantizer.loss_terms
    for term in terms.values():
        assert term.shape == ()
        assert torch.isfinite(term)


def test_training_and_evaluation_agree(made) -> None:
    _, quantizer, z = made
    training, evaluated = quantizer.train().quantize(z), quantizer.eval().quantize(z)
    assert torch.equal(training.ids, evaluated.ids)
    torch.testing.assert_close(training.vectors, evaluated.vectors)


def test_each_gradient_reaches_its_tensors(made) -> None:
    name, quantizer, z = made
    z.requires_grad_()
    found = quantizer.train().quantize(z)
    (to_z,) = torch.autograd.grad(found.vectors.square().sum(), z, retain_graph=True)
    assert to_z.abs().sum() > 0
    if name in NORMALIZED:
        torch.testing.assert_close((to_z * z).sum(-1), torch.zeros(3, 2, 2), atol=1e-5, rtol=0)
    parameters = list(quantizer.parameters())
    assert bool(parameters) != (name in FIXED or name.startswith(FIXED_KINDS))
    terms = found.terms
    assert terms is not None
    for term, value in terms.items():
        to_features, *to_codes = torch.autograd.grad(value, (z, *parameters), retain_graph=True, allow_unused=True)
        moves_codes = any(g is not None and bool(g.any()) for g in to_codes)
        moves_features = to_features is not None and bool(to_features.any())
        if term == "commitment":
            assert moves_features
            assert not moves_codes
        elif term == "codebook" and name != "lfq, single bits":
            assert moves_codes
            assert not moves_features or "residual" in name or name.startswith("multi")
        else:
            assert moves_features
            assert moves_codes == bool(parameters)


def test_rows_do_not_depend_on_each_other(made) -> None:
    _, quantizer, z = made
    quantizer.eval()
    together = quantizer.quantize(z)
    single = [quantizer.quantize(row[None]) for row in z]
    assert torch.equal(together.ids, torch.cat([each.ids for each in single]))
    torch.testing.assert_close(together.vectors, torch.cat([each.vectors for each in single]), rtol=1e-6, atol=1e-6)


def test_an_empty_batch(made) -> None:
    name, quantizer, z = made
    for mode in (False, True):
        found = quantizer.train(mode).quantize(z[:0])
        assert found.vectors.shape == (0, 2, 2, DIM)
        assert found.ids.shape == ids_shape(quantizer, z[:0], name)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("mode", [False, True])
def test_features_that_are_not_finite_are_refused(made, value: float, mode: bool) -> None:
    _, quantizer, z = made
    parts: Any = getattr(quantizer, "quantizer", quantizer)
    quantizer.name_queries(*(["head"] * len(parts.query_names)))
    z[1, 0, 1, 2] = value
    with pytest.raises(ValueError, match=r"head: expected finite .*, got (NaN|infinity)"):
        quantizer.train(mode).quantize(z)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("mode", [False, True])
def test_weights_that_are_not_finite_never_pass(made, value: float, mode: bool) -> None:
    """Refused, or the vectors are not finite, which decoders refuse: no weight that counts is passed over."""
    _, quantizer, z = made
    before = quantizer.train(mode).quantize(z)
    for name, parameter in quantizer.named_parameters():
        if "attn.qkv" in name:  # torch's attention on a CPU passes over NaN in queries where there are under 16 keys
            continue
        kept = parameter.detach().clone()
        with torch.no_grad():
            parameter.view(-1)[0] = value
        try:
            found = quantizer.quantize(z)
        except ValueError as error:
            assert "expected finite" in str(error)  # noqa: PT017 (either will do)
        else:
            unused = torch.equal(found.ids, before.ids) and torch.equal(found.vectors, before.vectors)
            assert not bool(found.vectors.isfinite().all()) or (unused and "smoothing" in name), name
        with torch.no_grad():
            parameter.copy_(kept)


def test_autocast_computes_in_float32(made) -> None:
    _, quantizer, z = made
    expected = quantizer.train().quantize(z)
    with torch.autocast("cpu", torch.bfloat16):
        found = quantizer.quantize(z)
        vectors = quantizer.look_up(found.ids)
        narrow = quantizer.quantize(z.bfloat16())
    assert torch.equal(found.ids, expected.ids)
    for tensor in (found.vectors, vectors, narrow.vectors, *(found.terms or {}).values()):
        assert tensor.dtype == torch.float32
    torch.testing.assert_close(found.vectors, expected.vectors, rtol=0, atol=0)


def test_state_goes_round(made) -> None:
    name, quantizer, z = made
    expected = quantizer.eval().quantize(z)
    other = MAKERS[name]().eval()
    other.load_state_dict(copy.deepcopy(quantizer.state_dict()))
    found = other.quantize(z)
    assert torch.equal(found.ids, expected.ids)
    assert torch.equal(found.vectors, expected.vectors)


def test_unused_codes_move_or_say_why_not(made) -> None:
    _, quantizer, _ = made
    ids, target = torch.tensor([3]), torch.nn.functional.normalize(torch.full((1, DIM), 3.0), dim=-1) * 3
    if not quantizer.revivable:
        with pytest.raises(ValueError, match="expected"):
            quantizer.set_codes(ids, target)
        return
    quantizer.set_codes(ids, target)
    inner: Any = getattr(quantizer, "quantizer", quantizer)
    assert int(inner.eval().quantize(target).ids.flatten()[0]) == 3
    if inner.groups > 1:
        last = (inner.groups - 1) * inner.codebook_size + 3
        inner.set_codes(torch.tensor([last]), target)
        assert int(inner.quantize(target).ids[0, -1]) == 3


COMPILED = [name for name in MAKERS if "," not in name] + ["vq, cosine", "ibq, unit", "scales, VAR"]


@pytest.mark.parametrize("name", COMPILED)
def test_compiles(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # what pytest adds cannot be traced
    for method in ("forward", "backward"):  # torch before 2.7 traces a wrapper of these even if it does nothing
        plain = inspect.unwrap(getattr(assignment._Assign, method))
        monkeypatch.setattr(assignment._Assign, method, staticmethod(plain))
    torch.manual_seed(0)
    torch._dynamo.reset()
    quantizer, z = MAKERS[name]().train(), torch.randn(3, 2, 2, DIM)

    def run(x: Tensor) -> Tensor:
        found: Quantized = quantizer.quantize(x)
        total = (found.vectors * torch.linspace(-1, 1, x.numel()).view_as(x)).sum()
        return total + sum((found.terms or {}).values())  # type: ignore[return-value]

    gradients = []
    for function in (run, torch.compile(run, backend="eager", fullgraph=True)):
        leaf = z.clone().requires_grad_()
        function(leaf).backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)


def test_a_kind_of_a_script(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two lines beside the class: its configuration with a kind, and its place in the table."""

    @dataclasses.dataclass(frozen=True)
    class HalvedConfig(VQConfig):
        kind: Any = "halved"

    class Halved(VQ):
        Config = HalvedConfig

        def _compared(self, z: Tensor) -> Tensor:
            return z / 2

    monkeypatch.setitem(QUANTIZERS, "halved", Halved)
    nested = {"kind": "multi_codebook", "part": {"kind": "halved", "codebook_size": 8, "dim": 2}, "count": 2}
    quantizer = build_quantizer(Choice(QUANTIZERS, "vq").convert(nested, "quantizer"))
    z = torch.randn(5, DIM)
    found = quantizer.quantize(z)
    torch.testing.assert_close(found.queries, z / 2)
    torch.testing.assert_close(found.vectors, quantizer.look_up(found.ids))


PLAIN = (
    "vq",
    "simvq",
    "simvq, bias",
    "ibq",
    "lfq",
    "lfq, groups",
    "bsq",
    "bsq, bits as ids",
    "fsq, symmetric",
    "per dimension",
)
"""Kinds whose margins are distances in the space of the features themselves."""


def test_every_id_has_a_margin_and_float64_stays_float64(made) -> None:
    """Stable ids need both of a quantizer, see `models.stable`."""
    name, quantizer, z = made
    quantizer = quantizer.eval().double()
    with watch_decisions() as found, Watcher() as watcher:
        ids = quantizer.quantize(z.double()).ids
    watcher.refuse()
    assert sum(each.ids.numel() for each in found) == ids.numel()
    margins = [each.margin for each in found]
    for margin in margins:
        assert margin is not None
        assert bool((margin >= 0).all())
    if name in PLAIN:
        (margin,) = margins
        assert margin is not None
        least = margin.reshape(*z.shape[:-1], -1).amin(-1)
        assert float(least.max()) > 0
        for direction in torch.randn(20, *z.shape, dtype=torch.float64):
            moved = z.double() + torch.nn.functional.normalize(direction, dim=-1) * (0.4999 * least)[..., None]
            assert torch.equal(quantizer.quantize(moved).ids, ids)
