#!/usr/bin/env bash
# Question: do a text's logits depend on which texts a model has read before, each in a forward pass of its own?
#
# A rope of the type dynamic stretches its angles where a text is longer than max_position_embeddings, by its length.
# One would guess: each forward pass takes the length of its own text, as it does with longrope.
# Behaviour: the angles of the longest text so far stay until a text comes that is shorter than max_position_embeddings; a
# text between both gets them instead of its own. Training on such documents then hangs on their order.
# Why it matters: a loss, an evaluation and a resumed run differ by what was read before, and nothing says so.
# Seen on 2026-11-30 with torch 2.13.0 and transformers 5.17.0 and 5.23.0, on a CPU.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat > "$work/ask.py" <<'PYTHON'
import torch
import transformers
from transformers import AutoModelForCausalLM, LlamaConfig

config = LlamaConfig(
    vocab_size=99, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    max_position_embeddings=32, initializer_range=0.2,
    rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
)
torch.manual_seed(0)
model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
text, longer, short = (torch.randint(3, 99, (1, length)) for length in (40, 90, 20))
with torch.no_grad():
    first = model(text).logits
    model(longer)
    behind_longer = model(text).logits
    model(short)
    behind_short = model(text).logits
apart = [float((other - first).abs().max() / first.abs().max()) for other in (behind_longer, behind_short)]
print(f"transformers {transformers.__version__}: behind a longer text {apart[0]:.2g} of the largest logit off, "
      f"behind a short one {apart[1]:.2g}")
raise SystemExit(not (apart[0] > 0.01 and apart[1] < 1e-5))
PYTHON
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.3.5
for version in 5.17.0 5.23.0; do
  "$work/venv/bin/pip" install --quiet --disable-pip-version-check "transformers==$version"
  HF_HUB_OFFLINE=1 "$work/venv/bin/python" "$work/ask.py" || { echo "CHANGED since 2026-11-30"; exit 1; }
done
echo "as seen on 2026-11-30"
