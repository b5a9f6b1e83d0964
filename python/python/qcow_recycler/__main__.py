"""``python -m qcow_recycler`` is the command ``qcow-recycler``."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
