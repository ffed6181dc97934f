"""Runs a script of Megatron-LM with its torch_dist checkpoints through the engine; arguments are the script's own.

torchrun --nproc-per-node 8 examples/megatron/launch.py pretrain_gpt.py --ckpt-format torch_dist --async-save ...
"""

from __future__ import annotations

import os
import runpy
import sys

from snapstone.integrations import megatron

script = os.path.abspath(sys.argv[1])
sys.argv = sys.argv[1:]
sys.path.insert(0, os.path.dirname(script))  # the checkout: `import megatron`
megatron.install()
runpy.run_path(script, run_name="__main__")
