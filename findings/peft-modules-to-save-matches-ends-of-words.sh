#!/usr/bin/env bash
# Question: which modules does PEFT train whole for modules_to_save=["norm"] of a Llama?
#
# One would guess: those called norm, here the one before the head, as target_modules=["norm"] takes a name for a whole
# name or the last part of a path.
# Behaviour: modules_to_save takes every name that ends with these letters: input_layernorm and post_attention_layernorm of
# each layer too. target_modules=["proj"] of the same model finds nothing, and says so.
# Why it matters: more trains, and more is saved, than was asked for.
# Seen on 2026-11-29 with peft 0.21.2, transformers 5.23.0 and torch 2.13.0, on a CPU.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat > "$work/ask.py" <<'PYTHON'
import peft
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM


def model():
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, pad_token_id=0,
        )
    )


wrapped = get_peft_model(model(), LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["norm"]))
whole = sorted(name for name, module in wrapped.named_modules() if type(module).__name__ == "ModulesToSaveWrapper")
try:
    get_peft_model(model(), LoraConfig(r=2, target_modules=["proj"]))
    by_end = "found"
except ValueError:
    by_end = "ValueError"
print(f"peft {peft.__version__}")
print('  modules_to_save=["norm"]:', *(name.removeprefix("base_model.model.model.") for name in whole))
print('  target_modules=["proj"]:', by_end)
raise SystemExit((len(whole), by_end) != (5, "ValueError"))
PYTHON
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check \
  torch==2.13.0 numpy==2.3.5 transformers==5.23.0 peft==0.21.2
HF_HUB_OFFLINE=1 "$work/venv/bin/python" "$work/ask.py" || { echo "CHANGED since 2026-11-29"; exit 1; }
echo "as seen on 2026-11-29"
