"""`tokenizers-mm VERB`: exit code 0 on success, 2 for bad usage or input (one sentence), 1 for a failure of ours.

Every verb is a module with `SUMMARY`, `add_arguments(command)` and `run(options)`. Nothing heavy is imported at the top
of any: `--help` and wrong usage answer without torch.
"""

import argparse
import sys
from collections.abc import Sequence
from importlib import metadata
from typing import Any

from tokenizers_mm.cli import compare, convert, decode, demo, doctor, encode, explore, export, info, train
from tokenizers_mm.cli import eval as evaluate
from tokenizers_mm.cli.boundary import TRACEBACK as TRACEBACK
from tokenizers_mm.cli.boundary import guarded as guarded
from tokenizers_mm.cli.options import SHIPPED as SHIPPED

VERBS: dict[str, Any] = {
    "info": info,
    "encode": encode,
    "decode": decode,
    "eval": evaluate,
    "compare": compare,
    "convert": convert,
    "train": train,
    "export": export,
    "explore": explore,
    "doctor": doctor,
    "demo": demo,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    verb = VERBS.get(arguments[0]) if arguments else None
    if getattr(verb, "OWN_ARGUMENTS", False):
        options = argparse.Namespace(verb=arguments[0], arguments=arguments[1:])
    else:
        options = _parser().parse_args(arguments)
    return guarded(f"tokenizers-mm {options.verb}", lambda: VERBS[options.verb].run(options))


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        print(f"tokenizers-mm {metadata.version('tokenizers_mm')}")
        parser.exit()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tokenizers-mm", description="Visual tokenizers that carry meaning and pixels."
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and end")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, module in VERBS.items():
        module.add_arguments(verbs.add_parser(name, help=module.SUMMARY, description=module.SUMMARY))
    return parser
