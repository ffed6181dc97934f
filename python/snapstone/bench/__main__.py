"""`python -m snapstone.bench ...`, as torchrun starts it, is `snapstone bench ...`."""

from __future__ import annotations

import os
import sys

if __name__ == "__main__":
    os.execv(sys.executable, [sys.executable, "-m", "snapstone", "bench", *sys.argv[1:]])
