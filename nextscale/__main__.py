"""`python -m nextscale`: the command line, in the form that torchrun and accelerate launch need."""

from __future__ import annotations

import sys

from nextscale.cli import main

if __name__ == "__main__":
    sys.exit(main())
