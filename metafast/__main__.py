"""``python -m metafast`` is ``metafast``."""

import os
import sys

from metafast.cli import main

if __name__ == "__main__":
    code = main()
    if os.environ.get("WORLD_SIZE", "1") == "1":
        sys.exit(code)
    # Under torchrun: gloo's threads drop the last collective's tensors when they come to it, for which they want the
    # interpreter; one that asks while it is being torn down ends the process with SIGABRT (pytorch/pytorch#179291).
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
