#!/usr/bin/env bash
# Question: does a sliding_window that is left over in a Llama config change anything?
#
# LlamaConfig has no such field and LlamaModel's attention and masks no window; a config.json may hold the key all the
# same, where a model was turned into a Llama from another class.
# One would guess: it is kept as an unknown key and ignored.
# Behaviour: without a cache it is ignored. With the default cache generate() forgets what is outside the window, and
# says other tokens, greedily, from the window's length on; no warning.
# Why it matters: what a model was trained and evaluated with (no cache) isn't what it answers with.
# Seen on 2026-11-29 with torch 2.13.0 and transformers 5.23.0, on a CPU.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat > "$work/ask.py" <<'PYTHON'
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

SIZES = dict(
    vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=256, eos_token_id=None, pad_token_id=0, initializer_range=0.3,
)
torch.manual_seed(0)
plain = LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
left_over = LlamaForCausalLM(LlamaConfig(**SIZES, sliding_window=16)).eval()
left_over.load_state_dict(plain.state_dict())
prompt = torch.randint(2, 97, (1, 40))


def said(model, use_cache):
    return model.generate(prompt, max_new_tokens=30, do_sample=False, use_cache=use_cache)[0, 40:]


with torch.no_grad():
    same_logits = bool(torch.equal(plain(prompt, use_cache=False).logits, left_over(prompt, use_cache=False).logits))
seen = {
    "logits without a cache are the same": same_logits,
    "plain: with and without a cache the same tokens": torch.equal(said(plain, True), said(plain, False)),
    "left over: with and without a cache the same tokens": torch.equal(said(left_over, True), said(left_over, False)),
}
print(f"transformers {transformers.__version__}")
for what, is_so in seen.items():
    print(f"  {what}: {is_so}")
raise SystemExit(list(seen.values()) != [True, True, False])
PYTHON
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.3.5 transformers==5.23.0
HF_HUB_OFFLINE=1 "$work/venv/bin/python" "$work/ask.py" || { echo "CHANGED since 2026-11-29"; exit 1; }
echo "as seen on 2026-11-29"
