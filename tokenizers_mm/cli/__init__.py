"""`tokenizers-mm VERB`: exit code 0 on success, 2 for bad usage or input (one sentence), 1 for a failure of ours.

Every verb is a module with `SUMMARY`, `add_arguments(command)` and `run(options)`. Nothing heavy is imported at the top
of any: `--help` and wrong usage answer without torch.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from tokenizers_mm import __version__
from tokenizers_mm.cli import (
    compare,
    completion,
    configs,
    convert,
    decode,
    demo,
    doctor,
    encode,
    explore,
    export,
    export_checkpoint,
    info,
    push,
    tokenize,
    train,
)
from tokenizers_mm.cli import eval as evaluate
from tokenizers_mm.cli.boundary import TRACEBACK as TRACEBACK
from tokenizers_mm.cli.boundary import guarded as guarded
from tokenizers_mm.cli.imports import run_imports, split_imports
from tokenizers_mm.cli.options import SHIPPED as SHIPPED

VERBS: dict[str, Any] = {
    "info": info,
    "encode": encode,
    "decode": decode,
    "tokenize": tokenize,
    "eval": evaluate,
    "compare": compare,
    "convert": convert,
    "train": train,
    "configs": configs,
    "export-checkpoint": export_checkpoint,
    "export": export,
    "explore": explore,
    "push": push,
    "doctor": doctor,
    "demo": demo,
    "completion": completion,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb. Its options and arguments come in any order; `--import FILE` runs a file of the caller's first."""
    arguments, files = split_imports(sys.argv[1:] if arguments is None else arguments)
    verb = arguments[0] if arguments and arguments[0] in VERBS else None
    if verb is None:
        options = parser().parse_args(arguments)  # help, version, or a usage error
        verb = options.verb
    elif getattr(VERBS[verb], "OWN_ARGUMENTS", False):
        options = argparse.Namespace(arguments=arguments[1:])
    else:
        command = argparse.ArgumentParser(prog=f"tokenizers-mm {verb}", description=VERBS[verb].SUMMARY)
        VERBS[verb].add_arguments(command)
        asked = {"-h", "--help"} & set(arguments)  # while it mixes, argparse hides the defaults that help shows
        options = (command.parse_args if asked else command.parse_intermixed_args)(arguments[1:])

    def run() -> int | None:
        run_imports(files)
        return VERBS[verb].run(options)

    return guarded(f"tokenizers-mm {verb}", run)


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        print(f"tokenizers-mm {__version__}")
        parser.exit()


def parser() -> argparse.ArgumentParser:
    """The parser of all verbs."""
    whole = argparse.ArgumentParser(
        prog="tokenizers-mm",
        description="Visual tokenizers that carry meaning and pixels.",
        epilog="--import FILE, with any verb: run a Python file that registers parts of your own first.",
    )
    whole.add_argument("--version", action=_Version, nargs=0, help="print the version and end")
    verbs = whole.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, module in VERBS.items():
        module.add_arguments(verbs.add_parser(name, help=module.SUMMARY, description=module.SUMMARY))
    return whole
