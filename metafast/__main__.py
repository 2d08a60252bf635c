"""``python -m metafast`` is ``metafast``."""

import sys

from metafast.cli import main

if __name__ == "__main__":
    sys.exit(main())
