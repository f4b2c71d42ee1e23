#!/usr/bin/env bash
# Question: does Gemma 2 give the same logits by its default attention as by the eager one in Transformers 5.17?
#
# Gemma 2 caps its attention scores by tanh (attn_logit_softcapping), as its technical report has it.
# One would guess: attn_implementation changes speed, and the logits agree to rounding.
# Behaviour: the default, sdpa, is handed the cap and leaves it out without a word; eager applies it. 5.23 refuses sdpa for
# this model and takes eager by default.
# Why it matters: with a version that a floor like transformers>=5.17 allows, training and answering use another model.
# Seen on 2026-11-29 with torch 2.13.0 and transformers 5.17.0 and 5.23.0, on a CPU.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat > "$work/ask.py" <<'PYTHON'
import torch
import transformers
from transformers import AutoModelForCausalLM, Gemma2Config

config = Gemma2Config(
    vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, attn_logit_softcapping=2.0, initializer_range=0.5, query_pre_attn_scalar=1,
)
torch.manual_seed(0)
model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
ids = torch.arange(20)[None]
default = model.config._attn_implementation
with torch.no_grad():
    by_default = model(ids).logits
    model.set_attn_implementation("eager")
    by_eager = model(ids).logits
share = float((by_default - by_eager).abs().max() / by_eager.abs().max())
print(f"transformers {transformers.__version__}: default {default}, largest difference from eager {share:.2g} of the largest")
expected = {"5.17.0": ("sdpa", True), "5.23.0": ("eager", False)}[transformers.__version__]
raise SystemExit((default, share > 1e-3) != expected)
PYTHON
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.3.5
for version in 5.17.0 5.23.0; do
  "$work/venv/bin/pip" install --quiet --disable-pip-version-check "transformers==$version"
  HF_HUB_OFFLINE=1 "$work/venv/bin/python" "$work/ask.py" || { echo "CHANGED since 2026-11-29"; exit 1; }
done
echo "as seen on 2026-11-29"
