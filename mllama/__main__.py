"""``python -m mllama``."""

import sys

from mllama.cli import main

if __name__ == "__main__":
    sys.exit(main())
