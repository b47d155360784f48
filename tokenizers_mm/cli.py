"""`tokenizers-mm VERB`: exit code 0 on success, 2 for bad usage or input (one sentence), 1 for a failure of ours.

Nothing heavy is imported at the top: `--help` and wrong usage answer without torch.
"""

import argparse
import io
import itertools
import os
import runpy
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tokenizers_mm._check import fail, shorten

PROGRAM = "tokenizers_mm.train"
"""The training program is not part of the library; the wheel installs it beside it."""

SHIPPED = "tokenizers_mm/demo-64"
"""Tokenizer of `encode`, `decode`, `eval` and `export` by default; it is in the package."""

TRACEBACK = "TOKENIZERS_MM_TRACEBACK"
"""Environment variable: where it is set, an error ends with Python's traceback too."""

NO_DEVICE = (
    "No CUDA GPUs",
    "no NVIDIA driver",
    "not compiled with",
    "not linked with support for",
    "invalid device ordinal",
    "device type at start of device string",
    "Invalid device",
    "PyTorch is not built with",
)
"""Parts of what torch says (as RuntimeError or AssertionError) of a device that is not there."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments[:1] == ["train"]:
        return guarded("tokenizers-mm train", lambda: _program(PROGRAM, arguments[1:]))
    options = _parser().parse_args(arguments)
    return guarded(f"tokenizers-mm {options.verb}", lambda: options.run(options))


def guarded(program: str, run: Callable[[], int | None]) -> int:
    """The boundary of every command: run it, and turn an error into one sentence on stderr and an exit code.

    program: what the sentence begins with. Returns: the code of `run` (None is 0); 2 for bad input, files, devices and
    memory; 130 after an interrupt; 141 where the reader of stdout is gone; 1 for a failure of ours.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):  # file names that are no UTF-8 can be printed
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        code = run() or 0
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        message, code = "interrupted", 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes once more
        return 141
    except Exception as error:  # the one place of the command line where any error may end
        if os.environ.get(TRACEBACK):
            traceback.print_exc()
        message, code = explain(error)
    print(f"{program}: {message}", file=sys.stderr)
    return code


def explain(error: Exception) -> tuple[str, int]:
    """One sentence for an error, and the exit code: 2 for what the caller can mend, 1 for a failure of ours."""
    text, kind = str(error), type(error).__name__
    if "in DataLoader worker process" in text:  # the traceback of the worker, its last line `Type: message`
        text = text.strip().splitlines()[-1]
        text = text.partition(": ")[2] or text
    if isinstance(error, UnicodeDecodeError):
        return f"text: expected {error.encoding}, got byte 0x{error.object[error.start]:02x} at {error.start}", 2
    if isinstance(error, MemoryError) or kind == "OutOfMemoryError" or "not enough memory" in text:
        return f"memory: expected enough for this input, got {shorten(text or kind)}", 2
    if isinstance(error, OSError) and error.filename is not None:
        return f"{printable(error.filename)}: {error.strerror or kind}", 2
    if isinstance(error, (ValueError, FloatingPointError)):
        return shorten(printable(text), 1000) or kind, 2
    if isinstance(error, ImportError):
        return f"expected an optional package to be installed, got {shorten(text)}", 2
    if isinstance(error, OSError) or kind == "SafetensorError":
        return f"file: expected one that can be read and written, got {shorten(text or kind)}", 2
    if isinstance(error, (RuntimeError, AssertionError)) and any(part in text for part in NO_DEVICE):
        return f"device: expected one that torch can use here, got {shorten(text)}", 2
    if "DataLoader worker" in text:
        return f"workers: expected processes that live to the end, got {shorten(text)}", 2
    frame = traceback.extract_tb(error.__traceback__)[-1]
    where = f"{Path(frame.filename).name}:{frame.lineno}"
    return f"a failure of tokenizers_mm: {kind}: {shorten(text)} (at {where}; {TRACEBACK}=1 shows more)", 1


def printable(name: Any) -> str:
    """A file name or text as characters that every stream takes; bytes that are no UTF-8 are escaped."""
    text = os.fsdecode(name) if isinstance(name, (bytes, os.PathLike)) else str(name)
    return text.encode("utf-8", errors="backslashreplace").decode()


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from importlib import metadata

        print(f"tokenizers-mm {metadata.version('tokenizers_mm')}")
        parser.exit()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tokenizers-mm", description="Visual tokenizers that carry meaning and pixels."
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and end")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(name: str, run: Any, summary: str) -> argparse.ArgumentParser:
        command = verbs.add_parser(name, help=summary, description=summary)
        command.set_defaults(run=run)
        return command

    command = verb("info", _info, "Say what a tokenizer is.")
    command.add_argument("tokenizer", help="directory or hub id")

    command = verb("encode", _encode, "Images to ids.")
    command.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="image files and folders of them")
    _tokenizer_option(command)
    _fit_option(command)
    command.add_argument("--strict", action="store_true", help="end at the first image that cannot be encoded")
    command.add_argument(
        "--out", type=Path, default=Path("ids.safetensors"), help="a .safetensors or .npz file (default: %(default)s)"
    )

    command = verb("decode", _decode, "Ids to images.")
    command.add_argument("ids", type=Path, help="a file that `encode` wrote")
    _tokenizer_option(command)
    command.add_argument("--out-dir", type=Path, default=Path("decoded"), help="folder (default: %(default)s)")

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
    command.add_argument(
        "--tokenizer",
        default=SHIPPED,
        help="directory, hub id, or a tokenizer of the package (default: %(default)s, for 64 x 64 pixels)",
    )
    command.add_argument("--device", help="for example cuda")


def _fit_option(command: argparse.ArgumentParser, default: str = "") -> None:
    told = default or f"refuse, but crop for {SHIPPED}"
    command.add_argument(
        "--fit",
        choices=("refuse", "crop", "pad", "resize"),
        default=default,
        help=f"for images of another size (default: {told})",
    )


def _load(options: argparse.Namespace) -> Any:
    from tokenizers_mm.checkpoints.store import load  # after the arguments are known to be good

    return load(options.tokenizer, device=getattr(options, "device", None))


def _info(options: argparse.Namespace) -> None:
    from tokenizers_mm._summary import describe, read_lines

    lines = read_lines(Path(options.tokenizer))
    if lines is None:
        tokenizer = _load(options)
        from tokenizers_mm.config import to_mapping  # with torch, as all that follows
        from tokenizers_mm.models.saving import summarize

        lines = describe(tokenizer.family, summarize(tokenizer), to_mapping(tokenizer.provenance))
    print("\n".join(lines))


def _encode(options: argparse.Namespace) -> None:
    from tokenizers_mm.data.codes import check_output, write_codes
    from tokenizers_mm.data.sources import list_images

    check_output(options.out)
    fit = options.fit or ("crop" if options.tokenizer == SHIPPED else "refuse")
    paths: list[Path] = []
    for path in options.images:
        paths += list_images(path) if path.is_dir() else [path]
    tokenizer = _load(options)
    skipped: list[str] = []
    tolerant = len(paths) > 1 and not options.strict
    report = (lambda _, error: _skip(error, skipped)) if tolerant else None
    found: dict[int, Any] = {}
    for indices, batch in tokenizer.encode_batches(paths, fit, report):
        found.update(zip(indices, batch.to("cpu").unbind(), strict=True))
    if not found:
        fail("images", "at least one readable image", f"none ({len(skipped)} refused)")
    order = sorted(found)
    write_codes(options.out, [found[i] for i in order], [printable(paths[i]) for i in order], tokenizer.family)
    count = f"{len(found)} images" + (f", {len(skipped)} skipped" if skipped else "")
    print(f"{options.out}: {count}")


def _skip(error: ValueError, skipped: list[str]) -> None:
    skipped.append(printable(error))
    print(f"skipped: {skipped[-1]}", file=sys.stderr)


def _decode(options: argparse.Namespace) -> None:
    import torch

    from tokenizers_mm._images import tensor_to_images
    from tokenizers_mm.data.codes import read_codes
    from tokenizers_mm.eval.pictures import save_picture
    from tokenizers_mm.models.base import BATCH_PIXELS
    from tokenizers_mm.types import join_codes

    items = list(read_codes(options.ids))
    tokenizer = _load(options)
    limit = BATCH_PIXELS.get(tokenizer.device.type, BATCH_PIXELS["cuda"])
    done = 0
    while done < len(items):
        first = items[done]
        continuous = not tokenizer.streams(first.height, first.width)
        if continuous != (first.grid is not None):
            kind = "latents" if continuous else "ids"
            fail("ids", f"{kind}, which a {tokenizer.family} tokenizer decodes", f"the other kind in {options.ids}")
        most = max(1, limit // (first.height * first.width))
        alike: list[Any] = list(itertools.takewhile(first.is_like, items[done : done + most]))
        codes = join_codes([item.codes(tokenizer.streams) for item in alike])
        with torch.no_grad():
            images = tokenizer.decode(codes.to(tokenizer.device))
        for index, image in enumerate(tensor_to_images(images), done):
            save_picture(image, options.out_dir / f"{index:05d}.png")
        done += len(alike)
    print(f"{options.out_dir}: {done} images")


def _eval(options: argparse.Namespace) -> None:
    from tokenizers_mm._files import file_place, write_json
    from tokenizers_mm.data.sources import list_images
    from tokenizers_mm.eval.report import evaluate

    file_place(options.out)
    paths = list_images(options.images)
    report = evaluate(_load(options), paths, options.fit, options.inception)
    write_json(options.out, report)
    for message in report["skipped"]:
        print(f"skipped: {message}", file=sys.stderr)
    quality = "infinite" if report["psnr"] is None else f"{report['psnr']:.2f} dB"
    print(f"{options.out}: {report['images']} images, PSNR {quality}, SSIM {report['ssim']:.4f}")


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
