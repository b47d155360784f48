"""Compiled networks, recomputed activations, float16, checkpoints of a thread, copies of sharded networks."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn

import train.checkpoint
import train.loop
from tests.train.kinds import assert_same, final, make_place, tiny, without_dropout
from tokenizers_mm.layers.attention import Block
from tokenizers_mm.layers.conv import ResBlock
from train.checkpoint import Checkpoints, list_checkpoints
from train.engine import blocks, filled, skeleton
from train.loop import run
from train.optim import descend
from train.state import State, build_state
from train.step import train_step

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def place(one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_place(tmp_path_factory.mktemp("place"))


@pytest.fixture(autouse=True)
def _one_precision() -> Iterator[None]:
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


def stepped(kind: str, place: Path, out: Path, edits: dict[str, Any], steps: int = 2) -> State:
    state = build_state(tiny(kind, place, out, edits), Accelerator(cpu=True))
    batches = state.objective.batches(0, 0)
    for _ in range(steps):
        train_step(state, [next(batches)])
    return state


@pytest.mark.parametrize("kind", ["reconstruction", "mar", "language"])
def test_recomputed_activations_change_nothing_but_memory(kind: str, place: Path, tmp_path: Path) -> None:
    """Bit for bit, dropout on; the graph holds fewer bytes."""
    states, held = {}, {}
    first = {"objective.autoencoder.steps": 0} if kind == "mar" else {}
    for again in (False, True):
        kept: list[int] = []

        def keep(tensor: torch.Tensor, kept: list[int] = kept) -> torch.Tensor:
            kept.append(tensor.numel() * tensor.element_size())
            return tensor

        edits = {**first, "gradient_checkpointing": again, "objective.loss.gan_start": 99}
        if kind != "reconstruction":
            del edits["objective.loss.gan_start"]
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            states[again] = stepped(kind, place, tmp_path, edits).state_dict()
        held[again] = sum(kept)
    assert_same(states[False], states[True])
    assert held[True] < 0.8 * held[False]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # of the compiler
@pytest.mark.parametrize(
    ("kind", "backend"),
    [
        ("reconstruction", "eager"),
        ("mar", "eager"),
        ("language", "eager"),
        pytest.param("reconstruction", "aot_eager", marks=pytest.mark.full),
    ],
)
def test_compiled_networks_learn_the_same(
    kind: str, backend: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[str] = []

    def note(module: nn.Module, *arguments: Any, **options: Any) -> None:
        compiled.append(type(module).__name__)
        whole(module, *arguments, **options)

    whole = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", note)
    off = without_dropout(kind)
    plain = stepped(kind, place, tmp_path, off)
    assert not compiled
    found = stepped(kind, place, tmp_path, off | {"compile": backend})
    parts = {"reconstruction": {"SemanticEncoder", "PixelEncoder", "SemanticDecoder", "PixelDecoder"},
             "mar": {"MAREncoder", "MARDecoder", "TokenDenoiser", "PixelEncoder", "PixelDecoder"},
             "language": {"GPT2LMHeadModel"}}[kind]  # fmt: skip
    assert parts <= set(compiled)
    assert not {"SharedIndexQuantizer", "MultiScaleQuantizer", "PatchGAN", "CaptionEmbedding"} & set(compiled)
    assert_same(plain.state_dict(), found.state_dict(), atol=2e-5)
    torch.compiler.reset()


def test_blocks_are_found_whoever_wrote_them() -> None:
    inner = nn.Sequential(Block(8, 2), nn.Linear(8, 8), nn.ModuleList([ResBlock(8, 8, lambda c: nn.GroupNorm(1, c))]))
    network = nn.Sequential(nn.ModuleDict({"a": inner}), nn.TransformerEncoderLayer(8, 2))
    assert [type(block).__name__ for block in blocks(network)] == ["Block", "ResBlock", "TransformerEncoderLayer"]


def test_a_skeleton_filled_is_the_network() -> None:
    """Tied weights stay tied, buffers are copied, and nothing is shared with the network."""
    torch.manual_seed(0)
    network: Any = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))
    network[2].weight = network[0].weight
    empty = skeleton(network)
    assert all(p.is_meta for p in empty.parameters())
    copy: Any = filled(empty, network)
    assert_same(dict(network.state_dict()), dict(copy.state_dict()))
    assert copy[2].weight is copy[0].weight
    x = torch.randn(5, 4)
    expected = network(x)
    with torch.no_grad():
        network[0].weight.zero_()
    assert torch.equal(copy(x), expected)


def test_float16_needs_cuda_and_its_scaler_leaves_out_steps(place: Path, tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match=r"config\.precision: expected fp32 or bf16 on a CPU, got fp16"):
            build_state(tiny("reconstruction", place, tmp_path, {"precision": "fp16"}))
    weight = nn.Parameter(torch.ones(2))
    optimizer, scaler = torch.optim.SGD([weight]), torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale((weight * torch.tensor([1.0, torch.inf])).sum()).backward()
    assert descend(optimizer, 0.5, 1.0, scaler) == float("inf")
    assert torch.equal(weight.detach(), torch.ones(2))
    assert scaler.get_scale() == 4.0
    scaler.scale((weight * torch.tensor([3.0, 4.0])).sum()).backward()
    assert descend(optimizer, 0.5, 1.0, scaler) == pytest.approx(5.0)
    torch.testing.assert_close(weight.detach(), 1 - 0.5 * torch.tensor([0.6, 0.8]), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "edits", "message"),
    [
        ("joint", {"engine": "fsdp"}, "config.engine: expected ddp for joint tuning"),
        ("language", {"engine": "fsdp", "objective.learns": "new_rows"}, "config.engine: expected ddp for learns: new"),
        ("reconstruction", {"engine": "fsdp", "precision": "fp16"}, "config.precision: expected fp32 or bf16 for eng"),
        ("reconstruction", {"trackers": ["wandb"]}, r"config.trackers: expected installed packages \(pip install wan"),
        ("reconstruction", {"trackers": ["paper"]}, r"config.trackers\[0\]: expected one of"),
    ],
)
def test_what_does_not_go_together_is_refused(
    kind: str, edits: dict[str, Any], message: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=message):
        build_state(tiny(kind, place, tmp_path, edits))


def test_a_checkpoint_of_a_thread_is_that_of_its_step(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training goes on while it is written, and what is written does not change with it."""
    edits = {"steps": 4, "save_every": 2, "keep": 3}
    run(tiny("reconstruction", place, tmp_path / "plain", edits))
    write, gate, steps = train.checkpoint._write, threading.Event(), []
    whole = train.loop.train_step

    def slowly(folder: Path, config: Any, *contents: Any) -> None:
        assert gate.wait(60)
        write(folder, config, *contents)

    def step(state: State, batches: Any) -> Any:
        steps.append((state.step, len(list_checkpoints(tmp_path / "thread"))))
        if state.step == 3:
            gate.set()
        return whole(state, batches)

    monkeypatch.setattr("train.checkpoint._write", slowly)
    monkeypatch.setattr("train.loop.train_step", step)
    run(tiny("reconstruction", place, tmp_path / "thread", edits | {"async_save": True}))
    assert steps == [(0, 0), (1, 0), (2, 0), (3, 0)]
    for (_, a), (_, b) in zip(list_checkpoints(tmp_path / "plain"), list_checkpoints(tmp_path / "thread"), strict=True):
        assert_same(train.checkpoint.read_checkpoint(a), train.checkpoint.read_checkpoint(b))
    assert final(tmp_path / "thread")["counters"]["step"] == 4


def test_an_error_of_the_writing_thread_ends_the_run(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = build_state(tiny("reconstruction", place, tmp_path, {"async_save": True}))

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("train.checkpoint.save_tensors", full)
    checkpoints = Checkpoints()
    checkpoints.save(state)
    with pytest.raises(ValueError, match="checkpoint of step 0: expected to be written, got OSError"):
        checkpoints.save(state)
    checkpoints.close()
    assert not list((tmp_path / "checkpoints").iterdir())
