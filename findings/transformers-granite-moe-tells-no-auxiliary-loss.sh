#!/usr/bin/env bash
# Question: what auxiliary loss do Granite MoE's routers tell in Transformers 5.17, asked by output_router_logits=True?
#
# The config has router_aux_loss_coef, the class documents aux_loss, and other mixtures (Mixtral here) tell about 2 for two
# chosen experts of an even router.
# One would guess: Granite MoE tells the like.
# Behaviour: 5.17 collects no router logits of it, and aux_loss is the integer 0; a loss of one's own that adds it balances
# nothing and says nothing. Given labels, its forward raises AttributeError ('int' object has no attribute 'to'). 5.23 tells it.
# Why it matters: with a version that a floor like transformers>=5.17 allows, experts are trained without what keeps them
# balanced, though it was asked for.
# Seen on 2026-11-29 with torch 2.13.0 and transformers 5.17.0 and 5.23.0, on a CPU.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat > "$work/ask.py" <<'PYTHON'
import torch
import transformers
from transformers import AutoModelForCausalLM, GraniteMoeConfig, MixtralConfig

sizes = dict(
    vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, router_aux_loss_coef=0.5,
)
ids = torch.arange(3, 19)[None]
told, with_labels = {}, {}
for kind in (GraniteMoeConfig, MixtralConfig):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(kind(**sizes)).train()
    told[kind.model_type] = float(model(input_ids=ids, output_router_logits=True).aux_loss)
    try:
        model(input_ids=ids, labels=ids, output_router_logits=True)
        with_labels[kind.model_type] = "computes"
    except AttributeError as error:
        with_labels[kind.model_type] = str(error)
print(f"transformers {transformers.__version__}: auxiliary loss {told}; given labels: {with_labels}")
silent = told["granitemoe"] == 0.0 and "no attribute 'to'" in with_labels["granitemoe"]
raise SystemExit(silent != (transformers.__version__ == "5.17.0") or told["mixtral"] < 1.0)
PYTHON
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.3.5
for version in 5.17.0 5.23.0; do
  "$work/venv/bin/pip" install --quiet --disable-pip-version-check "transformers==$version"
  HF_HUB_OFFLINE=1 "$work/venv/bin/python" "$work/ask.py" || { echo "CHANGED since 2026-11-29"; exit 1; }
done
echo "as seen on 2026-11-29"
