"""Models of a published size that take no room: what is planned before a download reads no more of them."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

__all__ = ["headers"]


def headers(folder: Path, config: Any) -> Path:
    """A folder of ``config`` and of a file in bf16 that is its header, and a hole of the weights' size behind it."""
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    header, at = {}, 0
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        nbytes = 2 * tensor.numel()
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [at, at + nbytes]}
        at += nbytes
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + at)
    return folder
