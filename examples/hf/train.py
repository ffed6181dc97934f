"""transformers' Trainer with snapstone: run it, kill it, run it again.

python examples/hf/train.py --dir run
"""

from __future__ import annotations

import argparse
import logging
import os

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from snapstone.integrations import hf


class Tokens(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 256

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = torch.randint(0, 100, (32,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": tokens, "labels": tokens}


parser = argparse.ArgumentParser()
parser.add_argument("--dir", default="run")
parser.add_argument("--steps", type=int, default=200)
options = parser.parse_args()

logging.basicConfig(level=logging.WARNING)
logging.getLogger("snapstone").setLevel(logging.INFO)  # one line when a save is staged, one when it is durable
torch.manual_seed(0)
model = GPT2LMHeadModel(
    GPT2Config(vocab_size=100, n_positions=32, n_embd=64, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
)
arguments = TrainingArguments(
    output_dir=options.dir, max_steps=options.steps, save_steps=20, save_total_limit=2, report_to=[]
)
trainer = hf.attach(Trainer(model, arguments, train_dataset=Tokens()))
saved = os.path.isdir(options.dir) and get_last_checkpoint(options.dir) is not None
trainer.train(resume_from_checkpoint=saved)
