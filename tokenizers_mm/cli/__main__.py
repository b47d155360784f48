"""`python -m tokenizers_mm.cli`."""

import sys

from tokenizers_mm.cli import main

sys.exit(main())
