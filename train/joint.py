"""Joint tuning of an image tokenizer and the language model that reads it, in stages (ETT, arXiv 2505.10562).

`tokenizers_mm/llm/joint.py` holds the formulas and says which parameters the caption's gradient reaches.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from tokenizers_mm._check import fail, require
from tokenizers_mm._files import atomic_directory
from tokenizers_mm.data.sources import Batch
from tokenizers_mm.eval.image import psnr
from tokenizers_mm.llm import Batch as Rows
from tokenizers_mm.llm import FeatureProjector, MultimodalProcessor, ProjectorConfig
from tokenizers_mm.llm.batch import pad_rows
from tokenizers_mm.llm.joint import caption_batch, caption_loss, joint_loss, num_labels, read_codes
from tokenizers_mm.llm.loss import num_predicted
from tokenizers_mm.llm.records import RecordMixture, Records
from tokenizers_mm.llm.transformers_api import embeddings

from .bridge import build_language_model
from .checkpoint import resume, save_checkpoint
from .config import OptimizerConfig
from .descent import descend
from .guard import Guard, held_out
from .joint_config import PARTS, JointConfig, StageConfig
from .log import Log
from .loop import on_all_ranks, sample_batches
from .ranks import sum_counts
from .schedule import learning_rate
from .state import TrainState, adam, build_state
from .step import add, count_codes, discriminator_step, tokenizer_terms
from .weights import weighted_sum


@dataclass
class JointState:
    """The tokenizer's own state, with the step of the run, and what learns beside it.

    size: (height, width) of all images. learnable: the parameters of each part that may learn at all (a tokenizer's
    frozen tower never does). saved: the step of the last checkpoint.
    """

    config: JointConfig
    tokenizing: TrainState
    model: Any
    projector: FeatureProjector
    processor: MultimodalProcessor
    guard: Guard
    size: tuple[int, int]
    learnable: dict[str, list[nn.Parameter]] = field(default_factory=dict)
    optimizers: dict[str, torch.optim.Optimizer] = field(default_factory=dict)
    saved: int = -1

    @property
    def parts(self) -> dict[str, nn.Module]:
        """The networks by name."""
        return {"tokenizer": self.tokenizing.tokenizer, "projector": self.projector, "language_model": self.model}

    def learning(self, stage: StageConfig) -> dict[str, OptimizerConfig]:
        """The parts that learn in a stage; a tokenizer that the guard froze does not."""
        found = {part: options for part in PARTS if (options := stage.learns(part)) is not None}
        if self.guard.frozen:
            found.pop("tokenizer", None)
        return found


def run_joint(config: JointConfig) -> JointState:
    """Train to the end; leaves the model, the text tokenizer, visual_vocab.json, the projector and log.jsonl in the
    run's folder, and the image tokenizer in `tokenizer` below it."""
    accelerator = Accelerator(mixed_precision="no" if config.precision == "fp32" else config.precision)
    joint = build_joint(config, accelerator)
    state = joint.tokenizing
    if config.resume == "auto" and resume(state):
        joint.saved = state.step
    log = Log(state)
    try:
        while state.step < config.steps and not joint.guard.stopped:
            _run_stage(joint, log)
    finally:
        log.close()
    if joint.saved != state.step:
        save_checkpoint(state)
    if accelerator.is_main_process:
        save_joint(joint)
    accelerator.wait_for_everyone()
    return joint


def save_joint(joint: JointState) -> None:
    """What plain `AutoModelForCausalLM`, `FeatureProjector.load` and `tokenizers_mm.load` read."""
    out = Path(joint.config.out)
    with atomic_directory(out) as folder:
        joint.model.eval().save_pretrained(folder)
        joint.processor.save(folder)
        joint.projector.save(folder)
    joint.tokenizing.tokenizer.eval().save(out / "tokenizer")


def build_joint(config: JointConfig, accelerator: Accelerator) -> JointState:
    """Everything from the configuration, on the accelerator's device."""
    state = build_state(config.for_tokenizer(), accelerator)
    tokenizer = state.tokenizer
    size = tokenizer.image_size or config.data.image_size
    if size is None:
        fail("config.data.image_size", "the size of the images, for this tokenizer", "nothing")
    tokenizer.check_size(*size)
    require(len(tokenizer.streams(*size)) > 0, "config.tokenizer", "one with codes", "a continuous one")
    model, processor = build_language_model(config.language_model, tokenizer)
    dims = (read_codes(tokenizer, torch.zeros(1, 3, *size)).shape[-1],)
    width = embeddings(model).weight.shape[1]
    if config.joint.projector_from:
        projector = FeatureProjector.load(config.joint.projector_from)
        fitting = projector.config.dims == dims and projector.config.width == width
        require(fitting, "config.joint.projector_from", f"one from {dims} to {width} channels", projector.config)
    else:
        projector = FeatureProjector(ProjectorConfig(dims, width, config.joint.activation))
    device = accelerator.device
    guard = Guard(config.joint.guard, held_out(config.joint.guard, size))
    joint = JointState(config, state, model.to(device), projector.to(device), processor, guard, size)
    joint.learnable = {
        part: [p for p in module.parameters() if p.requires_grad] for part, module in joint.parts.items()
    }
    if state.objective.captions is not None:
        joint.learnable["tokenizer"] += list(state.objective.captions.parameters())
    state.others = {"language_model": model, "projector": projector, "guard": guard}
    _new_optimizers(joint, config.joint.stages[0])
    return joint


def _new_optimizers(joint: JointState, stage: StageConfig) -> None:
    """Fresh ones for all parts; those of frozen parts hold nothing."""
    for part in PARTS:
        joint.optimizers[part] = adam(joint.learnable[part], stage.learns(part) or OptimizerConfig())
    joint.tokenizing.optimizer = joint.optimizers["tokenizer"]
    for part in ("projector", "language_model"):
        joint.tokenizing.others[f"{part}_optimizer"] = joint.optimizers[part]


def set_learning(joint: JointState, learning: Sequence[str]) -> None:
    """Free the parameters of the parts that learn; frozen parts are in eval mode and collect no gradients."""
    for part, module in joint.parts.items():
        module.train(part in learning)
        for parameter in joint.learnable[part]:
            parameter.requires_grad_(part in learning)


def _run_stage(joint: JointState, log: Log) -> None:
    """From where the run stands to the end of its stage, or to where the guard stops it."""
    config, state, guard = joint.config, joint.tokenizing, joint.guard
    index, within = config.place(state.step)
    stage = config.joint.stages[index]
    if within == 0:
        _new_optimizers(joint, stage)
    _look_before(joint, log)
    started, before = time.perf_counter(), state.seconds
    batches = _record_batches(joint, stage, within) if stage.records else sample_batches(state)
    while within < stage.steps and not guard.stopped:
        set_learning(joint, list(joint.learning(stage)))
        step_batches = [next(batches) for _ in range(config.accumulate)]
        report = joint_step(joint, stage, within, step_batches)
        within += 1
        state.step += 1
        state.seconds = on_all_ranks(before + time.perf_counter() - started, state.accelerator.device)
        skipped = [name for batch in step_batches if isinstance(batch, Batch) for name in batch.skipped]
        log.step(state, report | {"stage": float(index)}, skipped, state.take_usage)
        ends = within == stage.steps
        if "tokenizer" in joint.learning(stage) and (within % config.joint.guard.every == 0 or ends):
            line = guard.look(joint.parts, state.step)
            log.note(state, line, guard.message(state.step) if guard.crossed else "")
        _look_before(joint, log)
        if config.save_every and state.step % config.save_every == 0:
            save_checkpoint(state)
            joint.saved = state.step


def _look_before(joint: JointState, log: Log) -> None:
    """The guard's first look, when the next step is the first of a joint stage; a checkpoint taken there holds it."""
    state = joint.tokenizing
    index, _ = joint.config.place(state.step)
    ahead = joint.config.joint.stages[index:]
    if ahead and ahead[0].stage == "joint" and not joint.guard.before:
        log.note(state, joint.guard.look(joint.parts, state.step))


def joint_step(joint: JointState, stage: StageConfig, within: int, batches: Sequence[Batch | Rows]) -> dict[str, float]:
    """One step of every part that learns over the micro-batches; returns what to report.

    within: the step of the stage. The caption loss is the mean over the labels of all micro-batches of all ranks, L_vq
    the mean over the micro-batches: neither how they are cut nor how they are shared out changes what is learned.
    """
    state, progress = joint.tokenizing, within / stage.steps
    accelerator, learning = state.accelerator, joint.learning(stage)
    gan = "tokenizer" in learning and state.discriminator is not None and within >= joint.config.loss.gan_start
    counts = [_num_labels(joint, batch) for batch in batches]
    total = max(1, int(sum_counts(torch.tensor([sum(counts)], device=accelerator.device))))
    pairs: list[tuple[Tensor, Tensor]] = []
    report: dict[str, float] = {}
    captions = torch.zeros(1, dtype=torch.float64, device=accelerator.device)
    for batch, count in zip(batches, counts, strict=True):
        with accelerator.autocast():
            caption, own, values, pair = batch_losses(joint, batch, "tokenizer" in learning, gan)
            share = count / total * accelerator.num_processes  # the ranks' gradients are averaged
            loss = joint_loss(caption * share, own / len(batches), joint.config.joint.alpha)
            if loss.requires_grad:  # not so where a batch has no captions, or no images for the projector to learn from
                accelerator.backward(loss)
        captions += caption.detach() * count / total
        add(report, values, 1 / len(batches))
        pairs += pair
    mean = float(sum_counts(captions))
    report |= {"caption": mean, "loss": mean + joint.config.joint.alpha * report.get("vq", 0.0)} if sum(counts) else {}
    for part, options in learning.items():
        rate = learning_rate(options, within, progress)
        report[f"grad_norm_{part}"] = descend(joint.optimizers[part], rate, options.clip, state.step)
        report[f"lr_{part}"] = rate
    if gan:
        own_options = joint.config.discriminator_optimizer or learning["tokenizer"]
        rate = learning_rate(own_options, within - joint.config.loss.gan_start, progress)
        report |= discriminator_step(state, pairs, rate, own_options.clip)
    return report


def batch_losses(
    joint: JointState, batch: Batch | Rows, tuned: bool, gan: bool
) -> tuple[Tensor, Tensor, dict[str, Tensor], list[tuple[Tensor, Tensor]]]:
    """L_cap of a micro-batch (0 without captions), its L_vq (0 where the tokenizer is not `tuned`), terms to report,
    and the images and reconstructions for the discriminator."""
    state = joint.tokenizing
    zero = torch.zeros((), device=state.accelerator.device)
    if isinstance(batch, Rows):
        return caption_loss(joint.model, joint.projector, batch.to(zero.device)), zero, {}, []
    x = batch.images.to(zero.device)
    output = state.tokenizer(x) if tuned else None
    vectors = read_codes(state.tokenizer, x, output)
    rows = caption_batch(joint.processor, vectors, joint.size, batch.captions, joint.config.joint.prompt)
    caption = zero if rows is None else caption_loss(joint.model, joint.projector, rows.to(zero.device))
    if output is None:
        return caption, zero, {}, []
    terms = tokenizer_terms(state, x, output, batch, gan)
    own = weighted_sum(terms, joint.config.loss.weights)
    count_codes(state, dict(output.quantized))
    image = output.image.detach()
    return caption, own, terms | {"vq": own, "psnr": psnr(image.float(), x).mean()}, [(x, image)]


def _num_labels(joint: JointState, batch: Batch | Rows) -> int:
    if isinstance(batch, Rows):
        return num_predicted(batch.labels)
    return num_labels(joint.processor, batch.captions)


def _record_batches(joint: JointState, stage: StageConfig, within: int) -> Iterator[Rows]:
    """Rows of a stage's records, from a step of the stage on; every rank has its own."""
    config, accelerator = joint.config, joint.tokenizing.accelerator
    tokenizer = joint.tokenizing.tokenizer
    mixture = RecordMixture([(Records(r.path, tokenizer, r.outside), r.weight) for r in stage.records], config.seed)
    micro = within * config.accumulate
    while True:
        first = (micro * accelerator.num_processes + accelerator.process_index) * config.batch_size
        rows = joint.processor.rows([mixture[first + place] for place in range(config.batch_size)])
        yield pad_rows(rows, joint.processor.pad)
        micro += 1
