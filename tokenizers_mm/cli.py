"""`tokenizers-mm VERB`: exit code 0 on success, 2 for bad usage or input (one sentence), 1 for a failure of ours."""

import argparse
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tokenizers_mm._check import fail
from tokenizers_mm._images import tensor_to_images
from tokenizers_mm.types import ImageCodes, ImageLatents

PROGRAM = "tokenizers_mm.train"
"""The training program is not part of the library; the wheel installs it beside it."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments[:1] == ["train"]:
        return _program(PROGRAM, arguments[1:])
    options = _parser().parse_args(arguments)
    try:
        return options.run(options) or 0
    except ValueError as error:
        print(f"tokenizers-mm {options.verb}: {error}", file=sys.stderr)
        return 2
    except ImportError as error:
        print(
            f"tokenizers-mm {options.verb}: expected an optional package to be installed, got {error}", file=sys.stderr
        )
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tokenizers-mm", description="Visual tokenizers that carry meaning and pixels."
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(name: str, run: Any, summary: str) -> argparse.ArgumentParser:
        command = verbs.add_parser(name, help=summary, description=summary)
        command.set_defaults(run=run)
        return command

    command = verb("info", _info, "Say what a tokenizer is.")
    command.add_argument("tokenizer", help="directory or hub id")

    command = verb("encode", _encode, "Images to ids.")
    command.add_argument("images", nargs="+", type=Path, metavar="IMAGE")
    _tokenizer_option(command)
    _fit_option(command)
    command.add_argument("--out", type=Path, required=True, help="a .safetensors file")

    command = verb("decode", _decode, "Ids to images.")
    command.add_argument("ids", type=Path, help="a file that `encode` wrote")
    _tokenizer_option(command)
    command.add_argument("--out-dir", type=Path, required=True)

    command = verb("eval", _eval, "Metrics over a folder of images, as JSON.")
    _tokenizer_option(command)
    _fit_option(command, default="crop")
    command.add_argument("--images", type=Path, required=True)
    command.add_argument("--inception", help="weights file for rFID (default: torch.hub's cache)")
    command.add_argument("--out", type=Path, required=True)

    command = verb("convert", _convert, "A published checkpoint into our format.")
    command.add_argument("family", metavar="FAMILY", help="tokenflow, dualvitok or mar")
    command.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help=".pt, .pth, .bin, .ckpt or .safetensors")
    command.add_argument("options", nargs="*", metavar="key=value", help="what the file cannot say, see the family")
    command.add_argument("--out", type=Path, required=True)
    command.add_argument("--config", type=Path, help="JSON: the dimensions of an unpublished size")

    verbs.add_parser("train", help="Train: CONFIG [key=value ...].", add_help=False)
    command = verb("export", _export, "Encode and decode as graphs, compared with the model.")
    _tokenizer_option(command)
    command.add_argument("--format", choices=("torch", "onnx"), required=True)
    command.add_argument("--size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"), help="where any size is taken")
    command.add_argument("--batch-size", type=int, default=1)
    command.add_argument("--out", type=Path, required=True)

    verb("doctor", _doctor, "Versions, device, kernels, and what is missing.")
    command = verb("demo", _demo, "Train a small tokenizer on real photographs and look at it (minutes, CPU).")
    command.add_argument("--out", type=Path, default=Path("runs/demo"))
    command.add_argument("--quick", action="store_true", help="a first look in a minute")
    return parser


def _tokenizer_option(command: argparse.ArgumentParser) -> None:
    command.add_argument("--tokenizer", required=True, help="directory or hub id")
    command.add_argument("--device", help="for example cuda")


def _fit_option(command: argparse.ArgumentParser, default: str = "refuse") -> None:
    command.add_argument(
        "--fit", choices=("refuse", "crop", "pad", "resize"), default=default, help="for pictures of another size"
    )


def _load(options: argparse.Namespace) -> Any:
    from tokenizers_mm.checkpoints.store import load  # after the arguments are known to be good

    return load(options.tokenizer, device=getattr(options, "device", None))


def _info(options: argparse.Namespace) -> None:
    tokenizer = _load(options)
    size = tokenizer.image_size
    print(f"family       {tokenizer.family}")
    print(f"parameters   {sum(p.numel() for p in tokenizer.parameters()):,}")
    print(f"image size   {f'{size[0]} x {size[1]}' if size else f'any multiple of {tokenizer.size_multiple}'}")
    for stream in tokenizer.streams(*size) if size else ():
        grids = " ".join(f"{rows}x{columns}" for rows, columns in stream.grids)
        print(f"stream       {stream.name}: {stream.num_ids} ids, {stream.codebook_size} codes, grids {grids}")
    for name in ("source", "license", "sha256", "notice"):
        if value := getattr(tokenizer.provenance, name):
            print(f"{name:<12} {value}")


def _encode(options: argparse.Namespace) -> None:
    from safetensors.torch import save_file

    from tokenizers_mm._files import atomic_path

    tokenizer = _load(options)
    codes = tokenizer.encode(options.images, fit=options.fit)
    facts = {"height": str(codes.height), "width": str(codes.width), "family": tokenizer.family}
    tensors = {"ids": codes.ids} if isinstance(codes, ImageCodes) else {"latents": codes.values}
    if isinstance(codes, ImageLatents):
        facts |= {"rows": str(codes.grid[0]), "columns": str(codes.grid[1])}
    with atomic_path(options.out) as temporary:
        save_file({k: v.cpu().contiguous() for k, v in tensors.items()}, temporary, metadata=facts)
    print(f"{options.out}: {len(codes)} x {next(iter(tensors.values())).shape[1]}")


@torch.no_grad()
def _decode(options: argparse.Namespace) -> None:
    from safetensors import SafetensorError, safe_open

    from tokenizers_mm.eval.pictures import save_picture

    if not options.ids.is_file():
        fail("ids", "a file that `encode` wrote", f"no file {options.ids}")
    try:
        with safe_open(options.ids, framework="pt") as file:
            facts = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError) as error:
        fail("ids", "a whole file that `encode` wrote", f"{options.ids} ({error})")
    if not {"ids", "latents"} & tensors.keys() or not {"height", "width"} <= facts.keys():
        fail("ids", "a file that `encode` wrote", str(options.ids))
    tokenizer = _load(options)
    height, width = int(facts["height"]), int(facts["width"])
    if "ids" in tensors:
        images = tokenizer.decode_ids(tensors["ids"], height, width)
    elif tokenizer.streams(height, width) or not {"rows", "columns"} <= facts.keys():
        fail("ids", f"ids, which a {tokenizer.family} tokenizer decodes", f"latents in {options.ids}")
    else:
        grid = int(facts["rows"]), int(facts["columns"])
        images = tokenizer.decode(ImageLatents(tensors["latents"], height, width, grid).to(tokenizer.device))
    for index, image in enumerate(tensor_to_images(images)):
        save_picture(image, options.out_dir / f"{index:05d}.png")
    print(f"{options.out_dir}: {len(images)} images")


def _eval(options: argparse.Namespace) -> None:
    from tokenizers_mm._files import write_json
    from tokenizers_mm.data.sources import list_images
    from tokenizers_mm.eval.report import evaluate

    paths = list_images(options.images)
    report = evaluate(_load(options), paths, options.fit, options.inception)
    write_json(options.out, report)
    for message in report["skipped"]:
        print(f"skipped: {message}", file=sys.stderr)
    print(f"{options.out}: {report['images']} images, PSNR {report['psnr']:.2f} dB, SSIM {report['ssim']:.4f}")


def _convert(options: argparse.Namespace) -> None:
    from tokenizers_mm.checkpoints.convert import convert
    from tokenizers_mm.models.loading import read_json

    config = None if options.config is None else read_json(options.config)
    bad = [item for item in options.options if "=" not in item]
    if bad:
        fail("option", "key=value", bad[0])
    extra = dict(item.split("=", 1) for item in options.options)
    print(convert(options.family, options.checkpoint, options.out, config, **extra))


def _export(options: argparse.Namespace) -> None:
    from tokenizers_mm.export.graph import export

    size = tuple(options.size) if options.size else None
    print(export(_load(options), options.format, options.out, size, options.batch_size))


def _doctor(options: argparse.Namespace) -> None:
    from tokenizers_mm import doctor

    print("\n".join(doctor.report()))


def _demo(options: argparse.Namespace) -> int:
    return _program(f"{PROGRAM}.demo", ["--out", str(options.out), *(["--quick"] if options.quick else [])])


def _program(module: str, arguments: list[str]) -> int:
    """Run a module of the training program as `python -m` would, in this process."""
    before = sys.argv
    sys.argv = [module, *arguments]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    finally:
        sys.argv = before
    return 0


if __name__ == "__main__":
    sys.exit(main())
