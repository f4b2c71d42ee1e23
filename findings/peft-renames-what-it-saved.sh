#!/usr/bin/env bash
# Question: does PEFT read back all of the adapter that it has just saved, where Laguna's linear layers are adapted?
#
# One would guess: yes, its names in the file are those that it has in the model.
# Behaviour: of Laguna the adapter of each shared expert is left as a new one begins, and a warning names what
# is missing. On reading, PEFT renames an adapter as Transformers renames the published checkpoints of a model. One of
# Laguna's rules is "mlp.shared_expert." becomes "mlp.shared_experts.", whose dots stand for any letter: the name that is
# right already gets another dot. set_peft_model_state_dict does the same, and the keys that it gives back alone tell.
# Why it matters: a model that was trained answers by a part of its adapter, and a training that goes on loses it.
# Seen on 2026-11-30 with peft 0.21.2, transformers 5.23.0 and torch 2.13.0, on a CPU.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat > "$work/ask.py" <<'PYTHON'
import copy
import sys
import warnings

import peft
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from transformers import AutoConfig, AutoModelForCausalLM

warnings.simplefilter("ignore")
torch.manual_seed(0)
config = AutoConfig.for_model(
    "laguna", vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_attention_heads_per_layer=[4, 4], num_key_value_heads=2, head_dim=8, num_experts=4, num_experts_per_tok=2,
    moe_intermediate_size=32, shared_expert_intermediate_size=32, layer_types=["full_attention"] * 2,
    mlp_layer_types=["dense", "sparse"], max_position_embeddings=64, pad_token_id=0,
)
model = AutoModelForCausalLM.from_config(config).eval()
fresh, other = copy.deepcopy(model), copy.deepcopy(model)
settings = {"r": 2, "target_modules": "all-linear", "init_lora_weights": False, "task_type": "CAUSAL_LM"}
trained = get_peft_model(model, LoraConfig(**settings)).eval()
trained.save_pretrained(sys.argv[1])
read = PeftModel.from_pretrained(fresh, sys.argv[1]).eval()
again = get_peft_model(other, LoraConfig(**settings)).eval()
told = set_peft_model_state_dict(again, get_peft_model_state_dict(trained))


def apart(one, two):
    ids = torch.arange(2, 12)[None]
    with torch.no_grad():
        return not torch.equal(one(input_ids=ids).logits, two(input_ids=ids).logits)


def lost(of):
    own = dict(of.named_parameters())
    names = [name for name, value in trained.named_parameters() if "lora_" in name and not torch.equal(value, own[name])]
    return len(names), all("shared_experts" in name for name in names)


print(f"peft {peft.__version__}, transformers {transformers.__version__}")
print("  read from its file: tensors that aren't what was saved, all of shared experts:", lost(read))
print("  set from a dictionary, the same:", lost(again), "unexpected, such as", told.unexpected_keys[0])
print("  answers differ:", apart(trained, read), apart(trained, again))
raise SystemExit((lost(read), lost(again), apart(trained, read), apart(trained, again)) != ((6, True), (6, True), True, True))
PYTHON
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check \
  torch==2.13.0 numpy==2.3.5 transformers==5.23.0 peft==0.21.2
HF_HUB_OFFLINE=1 "$work/venv/bin/python" "$work/ask.py" "$work/adapter" 2> "$work/errors" ||
  { tail -3 "$work/errors"; echo "CHANGED since 2026-11-30"; exit 1; }
echo "as seen on 2026-11-30"
