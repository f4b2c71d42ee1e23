#!/usr/bin/env bash
# Question: does a Qwen3.5 that was made from its config carry anything from token to token in its linear attention?
#
# Its gated delta rule multiplies a state by exp(-A * softplus(a + dt_bias)) at each token.
# One would guess: a model from random weights mixes tokens like a trained one, only by random numbers; so a tiny random
# model shows whether packed documents see each other, or whether a kernel carries its states rightly.
# Behaviour: A is drawn between 0 and 16 and dt_bias is 1, so that next to nothing of a state outlives a few tokens. What
# stands beyond the reach of the short convolution is as good as gone: another token moves the logits twenty tokens later by
# less than a millionth of what it moves there with A = exp(-4).
# Why it matters: tests on such models pass with states that are lost, cut or mixed between documents. A_log must be set.
# Seen on 2026-11-29 with transformers 5.23.0, torch 2.13.0, on a CPU.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat > "$work/ask.py" <<'PYTHON'
import torch
from transformers import AutoModelForCausalLM, Qwen3_5TextConfig

config = Qwen3_5TextConfig(
    vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, linear_num_key_heads=4, linear_num_value_heads=8, linear_key_head_dim=16,
    linear_value_head_dim=16, layer_types=["linear_attention"],
)
AT, DISTANCE = 4, 20
reach = config.linear_conv_kernel_dim - 1  # tokens back that the one layer's convolution sees
assert reach < DISTANCE


def moved(memory: bool) -> float:
    """How far another token at AT moves the logits DISTANCE later, over how far it moves those at AT."""
    found = []
    for seed in range(8):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float64).eval()
        state = model.model.layers[0].linear_attn
        if seed == 0:
            print(f"A from {state.A_log.exp().min().item():.2f} to {state.A_log.exp().max().item():.2f}, dt_bias {state.dt_bias.mean().item():.2f}")
        if memory:
            state.A_log.data.fill_(-4.0)
        ids = torch.randint(0, 128, (1, AT + DISTANCE + 1))
        other = ids.clone()
        other[0, AT] = (other[0, AT] + 64) % 128
        with torch.no_grad():
            apart = (model(ids, use_cache=False).logits - model(other, use_cache=False).logits)[0].abs().amax(-1)
        found.append((apart[AT + DISTANCE] / apart[AT]).item())
    return sorted(found)[len(found) // 2]


fresh, kept = moved(False), moved(True)
print(f"{DISTANCE} tokens later: {fresh:.1e} of a token's own effect in a fresh model, {kept:.1e} with A = exp(-4)")
raise SystemExit(not fresh < 1e-4 * kept)
PYTHON
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.3.5 transformers==5.23.0
HF_HUB_OFFLINE=1 "$work/venv/bin/python" "$work/ask.py" || { echo "CHANGED since 2026-11-29"; exit 1; }
echo "as seen on 2026-11-29"
