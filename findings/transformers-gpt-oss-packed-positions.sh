#!/usr/bin/env bash
# Question: does gpt-oss keep two documents apart that are packed into one row with positions beginning anew?
#
# Transformers tells packed documents by position_ids, and TRL's padding-free batches and packs rely on it.
# One would guess: as in Llama, the second document's logits don't depend on the first one.
# Behaviour: in Llama they don't; in gpt-oss they do, without a word: its forward makes the masks without the positions.
# Why it matters: packed training of gpt-oss mixes documents, its gradients are far off and its loss looks normal.
# Seen on 2026-11-29 with torch 2.13.0 and transformers 5.23.0, on a CPU.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0 numpy==2.3.5
HF_HUB_OFFLINE=1 "$work/venv/bin/python" - <<'PYTHON'
import sys

import torch
from transformers import AutoModelForCausalLM, GptOssConfig, LlamaConfig

common = dict(
    vocab_size=128, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16,
)
configs = {
    "llama": LlamaConfig(**common),
    "gpt_oss": GptOssConfig(**common, num_local_experts=4, num_experts_per_tok=2),
}
positions = torch.cat([torch.arange(12), torch.arange(20)])[None]


@torch.no_grad()
def change(config) -> float:
    """How much the second document's logits change with the tokens of the first, of the largest logit."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    second = torch.randint(3, 128, (20,))
    packs = [torch.cat([torch.randint(3, 128, (12,)), second])[None] for _ in range(2)]
    one, other = (model(input_ids=pack, position_ids=positions, use_cache=False).logits[0, 12:] for pack in packs)
    return float((one - other).abs().max() / one.abs().max())


changes = {name: change(config) for name, config in configs.items()}
print("change of the second document's logits with its neighbour, of the largest:", changes)
as_seen = changes["llama"] < 1e-5 and changes["gpt_oss"] > 1e-3
print("as seen on 2026-11-29" if as_seen else "CHANGED since 2026-11-29")
sys.exit(not as_seen)
PYTHON
