#!/usr/bin/env bash
# Question: do two LoRA adapters on one module's parameters both train when those parameters are bitsandbytes' 4 bits?
#
# A mixture of experts holds two weights a module, gate_up_proj and down_proj. PEFT adapts both by target_parameters, one
# wrapper around the other, and bitsandbytes packs such weights by bitsandbytes.nn.parametrize.replace_parameter_4bit.
# One would guess: as with 16-bit experts, both adapters change the result and both get a gradient.
# Behaviour: the inner adapter is left out of the forward pass without a word: no gradient (None), no effect. The outer
# wrapper turns torch's parametrisation cache on; registering the inner one reads the parameter that bitsandbytes has
# parametrised already, and that value, without the adapter, is what the cache hands out from then on.
# Why it matters: half of an experts' adapter stays as it began, and the loss falls all the same.
# Seen on 2026-11-29 with torch 2.13.0, transformers 5.23.0, peft 0.21.2, bitsandbytes 0.50.2, on a CPU.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check \
  torch==2.13.0 transformers==5.23.0 peft==0.21.2 bitsandbytes==0.50.2 accelerate==1.15.0 numpy==2.3.5
HF_HUB_OFFLINE=1 "$work/venv/bin/python" - <<'PYTHON'
import sys
import warnings

import torch
from bitsandbytes.nn.parametrize import replace_parameter_4bit
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

warnings.filterwarnings("ignore")
config = Qwen3MoeConfig(
    vocab_size=256, hidden_size=64, intermediate_size=128, moe_intermediate_size=64, num_hidden_layers=1,
    num_attention_heads=4, num_key_value_heads=2, head_dim=16, num_experts=4, num_experts_per_tok=2,
)
module = "model.layers.0.mlp.experts"
ids = torch.arange(16)[None]


def gradients(four_bit: bool) -> dict[str, bool]:
    """Which of the two adapters' B matrices get a gradient, by the parameter that they adapt."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    if four_bit:
        for name in ("gate_up_proj", "down_proj"):
            replace_parameter_4bit(model.get_submodule(module), name, quant_type="nf4")
    lora = LoraConfig(r=4, target_modules=[], target_parameters=[f"{module}.gate_up_proj", f"{module}.down_proj"])
    wrapped = get_peft_model(model, lora)
    wrapped.train()
    wrapped(input_ids=ids, labels=ids).loss.backward()
    found = {}
    for part in wrapped.modules():
        if hasattr(part, "parameter_name"):
            gradient = part.lora_B["default"].weight.grad
            found[part.parameter_name] = gradient is not None and bool(gradient.abs().max() > 0)
    return found


wide, packed = gradients(False), gradients(True)
print("experts in 32 bits, gradient for each adapter:", wide)
print("experts in 4 bits,  gradient for each adapter:", packed)
as_seen = all(wide.values()) and sorted(packed.values()) == [False, True]
print("as seen on 2026-11-29" if as_seen else "CHANGED since 2026-11-29")
sys.exit(not as_seen)
PYTHON
