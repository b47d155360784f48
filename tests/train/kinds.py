"""A tiny run of every kind of objective, and processes that run them. Not a test by itself."""

import copy
import hashlib
import importlib
import json
import multiprocessing
import os
import signal
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from benchmarks.tiny import tokenflow_config as tiny_config
from tests.cases import ROOT
from tests.llm.fakes import words
from tokenizers_mm.data.scenes import make_scene
from tokenizers_mm.models import TokenFlow
from train.checkpoint import list_checkpoints, read_checkpoint
from train.config import RunConfig, parse_config
from train.engine import local, whole

KINDS = ("reconstruction", "mar", "language", "joint")
FILES = {"reconstruction": "debug", "mar": "mar_scenes", "language": "language_debug", "joint": "joint_debug"}
GPT2 = {"n_embd": 32, "n_layer": 1, "n_head": 2, "resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1}

SMALLER: dict[str, dict[str, Any]] = {
    "reconstruction": {
        "batch_size": 4,
        "accumulate": 1,
        "objective.data.workers": 0,
        "objective.loss.gan_start": 2,
        "objective.revival.every": 2,
        "objective.model.config.semantic_encoder.options.drop_path_rate": 0.3,
        "objective.model.config.semantic_encoder.options.depth": 2,
        "objective.optimizer.schedule": "constant",
    },
    "mar": {
        "batch_size": 4,
        "ema": 0.9,
        "objective.data.image_size": [32, 32],
        "objective.model.encoder": {
            "token_dim": 16, "width": 32, "depth": 1, "heads": 2, "grid": [4, 4], "num_buffers": 4, "num_classes": 1,
            "dropout": 0.1,
        },
        "objective.model.decoder": {
            "encoder_width": 32, "width": 32, "depth": 1, "heads": 2, "grid": [4, 4], "num_buffers": 4, "dropout": 0.1,
        },
        "objective.model.denoiser": {"token_dim": 16, "condition_dim": 32, "width": 32, "depth": 1},
        "objective.autoencoder.steps": 3,
        "objective.scenes": 0,
        "objective.captions.buckets": 64,
        "objective.optimizer.schedule": "constant",
    },
    "language": {
        "objective.language_model.kind": "gpt2",
        "objective.language_model.config": GPT2,
        "objective.projector": "gelu",
        "objective.optimizer.schedule": "constant",
    },
    "joint": {
        "objective.language_model.kind": "gpt2",
        "objective.language_model.config": GPT2,
        "objective.stages": [
            {"stage": "align", "steps": 2, "projector": {"lr": 0.003}},
            {
                "stage": "joint",
                "steps": 4,
                "tokenizer": {"lr": 0.0005},
                "projector": {"lr": 0.003},
                "language_model": {"lr": 0.003},
            },
            {"stage": "chat", "steps": 2, "language_model": {"lr": 0.001}},
        ],
        "objective.loss.gan_start": 1,
        "objective.loss.weights.entropy": 0.0,
        "objective.guard": {"every": 2, "pictures": 4, "max_psnr_drop": 30.0},
    },
}  # fmt: skip


def without_dropout(kind: str) -> dict[str, Any]:
    """Edits for tests that compare runs whose batches are divided differently."""
    if kind == "reconstruction":
        return {
            "objective.model.config.semantic_encoder.options.drop_path_rate": 0.0,
            "objective.model.config.quantizer.entropy_temperature": None,
            "objective.loss.weights.entropy": 0.0,  # it, captions and batch norm mix the samples of a batch
            "objective.loss.weights.semantic": 0.0,
            "objective.loss.semantic": "none",
            "objective.loss.text_encoder": {},
            "objective.loss.discriminator.norm": "none",
            "objective.loss.adaptive": False,
            "objective.optimizer.lr": 0.0003,
        }
    if kind == "mar":
        return {"objective.model.encoder.dropout": 0.0, "objective.model.decoder.dropout": 0.0}
    still = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    edits: dict[str, Any] = {"objective.language_model.config": GPT2 | still}
    if kind == "joint":
        edits |= {"objective.loss.discriminator.norm": "none", "objective.loss.adaptive": False}
    return edits


def edited(data: dict[str, Any], edits: dict[str, Any]) -> dict[str, Any]:
    """A copy with values at dotted keys replaced."""
    data = copy.deepcopy(data)
    for key, value in edits.items():
        *path, last = key.split(".")
        place = data
        for name in path:
            place = place.setdefault(name, {})
        place[last] = copy.deepcopy(value)
    return data


def make_place(place: Path) -> Path:
    """A tokenizer, a text tokenizer and records."""
    torch.manual_seed(0)
    TokenFlow.from_config(tiny_config()).eval().save(place / "tokenizer")
    captions = [make_scene(index).caption for index in range(100)]
    words(captions, mask_token="<mask>").save_pretrained(str(place / "text"))
    lines = []
    for index in range(6):
        scene = make_scene(index)
        scene.render(32).save(place / f"{index}.png")
        image = {"image": f"{index}.png", "learn": False, "features": True}
        lines.append({"content": [image, {"text": scene.caption}]})
    (place / "records.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    ids = [{"content": [{"text": make_scene(i).caption, "learn": False}, {"image": f"{i}.png"}]} for i in range(6)]
    (place / "ids.jsonl").write_text("\n".join(json.dumps(line) for line in ids))
    return place


def plain(kind: str, place: Path, out: Path, edits: dict[str, Any] | None = None) -> dict[str, Any]:
    """Configuration of a tiny run of 8 steps as a plain mapping."""
    data = yaml.safe_load((ROOT / "configs" / f"{FILES[kind]}.yaml").read_text())
    common: dict[str, Any] = {"out": str(out), "log_every": 1, "save_every": 2, "sample_every": 0, "keep": 2}
    common |= {} if kind == "joint" else {"steps": 8}
    if kind in ("language", "joint"):
        common |= {"objective.tokenizer": str(place / "tokenizer")}
        common |= {"objective.language_model.text_tokenizer": str(place / "text")}
    if kind == "language":
        common |= {"objective.records": [{"path": str(place / "records.jsonl")}]}
    return edited(data, {**SMALLER[kind], **common, **(edits or {})})


def tiny(kind: str, place: Path, out: Path, edits: dict[str, Any] | None = None) -> RunConfig:
    """Configuration of a tiny run."""
    return parse_config(plain(kind, place, out, edits))


def final(out: Path) -> dict[str, Any]:
    """Contents of the newest checkpoint."""
    return read_checkpoint(list_checkpoints(out)[-1][1])


def assert_same(a: Any, b: Any, atol: float = 0.0, where: str = "") -> None:
    """Two contents of checkpoints, but for the time; tensors bit for bit unless atol is given."""
    if isinstance(a, torch.Tensor):
        torch.testing.assert_close(a, b, rtol=0, atol=atol, msg=lambda text: f"{where}: {text}")
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for name in a:
            if name not in ("seconds", "stage_seconds", "data_wait"):
                assert_same(a[name], b[name], atol, f"{where}/{name}")
    elif isinstance(a, list):
        assert len(a) == len(b), where
        for index, (one, other) in enumerate(zip(a, b, strict=True)):
            assert_same(one, other, atol, f"{where}/{index}")
    elif isinstance(a, float):
        assert a == pytest.approx(b, abs=atol, rel=1e-5 if atol else 0), where
    else:
        assert a == b, where


_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.train.kinds", "train.loop", "train.objectives.joint", "train.objectives.mar"])


def start(
    data: dict[str, Any],
    file: Path,
    rank: int = 0,
    world: int = 1,
    port: int = 0,
    kill_at: tuple[str, int] | None = None,
) -> Any:
    """A process that runs the training program on a configuration, written to `file` first.

    kill_at: name of a function, and the number of its call at whose end the process kills itself.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(data))
    process = _CONTEXT.Process(target=_program, args=(str(file), rank, world, port, kill_at))
    process.start()
    return process


def run_ranks(data: dict[str, Any], file: Path, world: int) -> list[int]:
    """Run on several processes over gloo; returns their exit codes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = [start(data, file.with_name(f"{rank}_{file.name}"), rank, world, port) for rank in range(world)]
    for process in processes:
        process.join(300)
    return [process.exitcode for process in processes]


def same_on_all_ranks(data: dict[str, Any], file: Path, world: int) -> bool:
    """Run on several processes; whether all networks, averages and moments end equal to the bit on all of them."""
    assert run_ranks(data | {"keep": 99}, file, world) == [0] * world, Path(
        f"{file.with_name(f'0_{file.name}')}.stderr"
    ).read_text()
    return len({file.with_name(f"{rank}_{file.name}.hash").read_text() for rank in range(world)}) == 1


def _hash(state: Any) -> str:
    found = hashlib.sha256()
    named = {f"{n}.{k}": v for n, network in state.objective.networks.items() for k, v in network.state_dict().items()}
    for name, tensor in sorted(named.items()):
        if "running_" not in name and "num_batches" not in name:  # batch norm's own, per rank, of the discriminator
            found.update(name.encode() + whole(tensor.detach()).cpu().contiguous().numpy().tobytes())
    return found.hexdigest()


def _share_here(state: Any) -> float:
    """Share of the values of networks and moments that this process holds."""
    held = [p for network in state.objective.networks.values() for p in network.parameters()]
    for optimizer in state.optimizers.values():
        held += [value for moments in optimizer.state.values() for value in moments.values()]
    return sum(local(tensor).numel() for tensor in held) / sum(tensor.numel() for tensor in held)


def _kill_at(name: str, number: int) -> None:
    """Let the process die at the end of a call of a function."""
    module, _, function = name.rpartition(".")
    place = importlib.import_module(module)
    whole, left = getattr(place, function), [number]

    def call(*arguments: Any, **options: Any) -> Any:
        found = whole(*arguments, **options)
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        return found

    setattr(place, function, call)


def _program(file: str, rank: int, world: int, port: int, kill_at: tuple[str, int] | None) -> None:
    if world > 1:
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world),
            "LOCAL_WORLD_SIZE": str(world),
        }
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"ACCELERATE_USE_CPU": "true"}
    torch.set_num_threads(1)
    if kill_at is not None:
        _kill_at(*kill_at)
    sys.stderr = open(f"{file}.stderr", "w")  # noqa: SIM115 (read by the test)
    from train import __main__ as program

    def run(config: Any) -> Any:
        state = whole_run(config)
        Path(f"{file}.hash").write_text(_hash(state))
        Path(f"{file}.share").write_text(str(_share_here(state)))
        return state

    whole_run, program.run = program.run, run
    code = program.main([file])
    sys.stderr.flush()
    sys.exit(code)
