"""`python -m lightning_autosp COMMAND`: the same as `autosp COMMAND`."""

import sys

from lightning_autosp.cli import main

if __name__ == "__main__":
    sys.exit(main())
