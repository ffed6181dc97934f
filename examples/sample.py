"""One process, no process group: loads the weights of a checkpoint that several processes wrote, and writes text."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from backends import ENGINES
from gpt import Gpt
from scale import SCALES
from trainer import SEED, weights_digest

PROMPT = b"import "


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--log", type=Path, required=True, help="prefix of the log file")
    parser.add_argument("--engine", choices=ENGINES, default="snapstone")
    parser.add_argument("--scale", choices=SCALES, default="full")
    options = parser.parse_args()
    scale = SCALES[options.scale]

    model = Gpt(scale.model)
    weights = model.state_dict()
    started = time.perf_counter()
    ENGINES[options.engine]().load({"model": weights}, options.checkpoint)
    load_s = time.perf_counter() - started
    model.load_state_dict(weights)
    generator = torch.Generator().manual_seed(SEED)
    text = model.sample(PROMPT, scale.sample_bytes, temperature=0.8, generator=generator)
    facts = {
        "weights": weights_digest(model),
        "load_s": load_s,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "text": (PROMPT + text).decode("utf-8", errors="replace"),
    }
    Path(f"{options.log}.rank-0.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main()
