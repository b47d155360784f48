"""`python -m train CONFIG [key=value ...]`, the same as `tokenizers-mm train`; also under `accelerate launch`."""

import sys

from tokenizers_mm.config import read_yaml

from .config import read_config
from .loop import run


def main(arguments: list[str]) -> int:
    """Read the configuration and train. Bad input ends with one sentence and code 2."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: tokenizers-mm train CONFIG [key=value ...]", file=sys.stderr)
        return 0 if arguments else 2
    try:
        keys = read_yaml(arguments[0], arguments[1:]).keys()
        if "joint" in keys:
            from .joint import run_joint  # needs transformers
            from .joint_config import read_joint_config

            run_joint(read_joint_config(arguments[0], arguments[1:]))
        elif "language_model" in keys:
            from .bridge import read_bridge_config, run_bridge  # needs transformers

            run_bridge(read_bridge_config(arguments[0], arguments[1:]))
        else:
            run(read_config(arguments[0], arguments[1:]))
    except (ValueError, FloatingPointError) as error:
        print(f"tokenizers-mm train: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
