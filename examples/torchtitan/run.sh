#!/usr/bin/env bash
# torchtitan's debug model with asynchronous checkpoints of snapstone, from a checkout of torchtitan, which has the
# tokenizer and the data. Again resumes from the newest checkpoint in outputs/checkpoint.
set -euo pipefail

torchrun --nproc-per-node "${NGPU:-8}" -m torchtitan.train --module llama3 --config llama3_debugmodel \
  --checkpoint.enable --checkpoint.interval 5 --checkpoint.async_mode async \
  --override.imports snapstone.integrations.torchtitan.use "$@"
