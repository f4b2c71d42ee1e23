#!/usr/bin/env bash
# Question: two ranks of torch.distributed each train a model of their own and save it into a folder of their own, with
# save_pretrained(folder), whose is_main_process is True unless one says otherwise. What is in the two folders?
#
# One would guess: a model in each. is_main_process is the argument that says who writes, and both ranks gave it.
# Behaviour: rank 0's folder holds config.json, generation_config.json and the weights; rank 1's folder is made and stays
# empty, without an error or a warning. Once a process group is there, save_pretrained asks for rank 0 as well, whatever
# is_main_process says; config.save_pretrained and PEFT's save_pretrained write on both ranks.
# Why it matters: what a rank trained alone (one setting of a sweep a GPU, one fold, one member of an ensemble) is lost
# when the process ends, and the first that tells is a load that finds no config.json.
# Seen on 2026-11-29 with transformers 5.23.0, peft 0.21.2, torch 2.13.0, on a CPU, by gloo.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check \
  torch==2.13.0 transformers==5.23.0 peft==0.21.2 accelerate==1.15.0 numpy==2.3.5
cat >"$work/ranks.py" <<'PYTHON'
import sys
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import distributed, multiprocessing
from transformers import LlamaConfig, LlamaForCausalLM


def rank(number: int, folder: str) -> None:
    here = Path(folder)
    distributed.init_process_group("gloo", init_method=f"file://{here}/meet", rank=number, world_size=2)
    torch.manual_seed(number)
    config = LlamaConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=64)
    model = LlamaForCausalLM(config)
    model.save_pretrained(here / f"model-{number}", is_main_process=True)
    config.save_pretrained(here / f"config-{number}")
    get_peft_model(model, LoraConfig(target_modules=["q_proj"])).save_pretrained(here / f"adapter-{number}")
    distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    here = Path(sys.argv[1])
    multiprocessing.spawn(rank, args=(str(here),), nprocs=2)
    files = {f"{what}-{n}": sorted(f.name for f in (here / f"{what}-{n}").iterdir())
             for what in ("model", "config", "adapter") for n in (0, 1)}
    for name, found in files.items():
        print(f"{name}: {', '.join(found) or 'nothing'}")
    as_seen = (
        "model.safetensors" in files["model-0"] and not files["model-1"]
        and all("config.json" in files[f"config-{n}"] for n in (0, 1))
        and all("adapter_model.safetensors" in files[f"adapter-{n}"] for n in (0, 1))
    )
    print("as seen on 2026-11-29" if as_seen else "CHANGED since 2026-11-29")
    sys.exit(not as_seen)
PYTHON
mkdir "$work/out"
HF_HUB_OFFLINE=1 "$work/venv/bin/python" -W ignore "$work/ranks.py" "$work/out"
