#!/usr/bin/env bash
# Question: does it matter to a merge into a 4-bit base whether the model has answered before?
#
# One would guess: no. An evaluation changes no weight, and PEFT merges into what bitsandbytes' dequantize_4bit gives.
# Behaviour: on a CPU with AVX512-BF16 the first forward of a Linear4bit in eval mode puts its bytes into another order for
# the CPU's product and leaves it so. dequantize_4bit reads them as if they were in the old one, without an error, and so
# does PEFT: an adapter that changes nothing, merged after one answer, makes a weight that has little to do with the base's.
# state_dict() puts the order back; dequantize_4bit and PEFT's merge don't.
# Why it matters: trying a model before merging it gives a broken one, in silence; on another CPU the same script is right.
# Seen on 2026-11-29 with torch 2.13.0, peft 0.21.2, bitsandbytes 0.50.2, on a CPU with AVX512-BF16 (others: nothing to see).
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
from bitsandbytes.functional import has_avx512bf16
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, get_peft_model
from torch import nn

warnings.filterwarnings("ignore")
if not has_avx512bf16():
    print("this CPU has no AVX512-BF16: nothing to see here")
    sys.exit(0)

x = torch.ones(2, 256, dtype=torch.bfloat16)


def merged(answers_first: bool) -> torch.Tensor:
    """What the merged layer gives; the adapter's B is zero, so that it changes nothing."""
    torch.manual_seed(0)
    base = nn.Sequential(Linear4bit(256, 128, bias=False, quant_type="nf4", compute_dtype=torch.bfloat16))
    base.load_state_dict({"0.weight": torch.randn(128, 256)})
    base.is_loaded_in_4bit = True
    model = get_peft_model(base.to("cpu"), LoraConfig(target_modules=["0"])).eval()
    if answers_first:
        with torch.no_grad():
            model(x)
    whole = model.merge_and_unload().train()
    with torch.no_grad():
        return whole(x).float()


fresh, after = merged(False), merged(True)
apart = float((after - fresh).norm() / fresh.norm())
print(f"merged after an answer, against merged at once: {apart:.2f} of the result apart")
as_seen = apart > 0.5
print("as seen on 2026-11-29" if as_seen else "CHANGED since 2026-11-29")
sys.exit(not as_seen)
PYTHON
