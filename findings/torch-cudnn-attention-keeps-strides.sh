#!/usr/bin/env bash
# Question: two backward passes through torch's attention by cuDNN get gradients of the same numbers, the second laid out
# in memory otherwise than the first (as a transpose of a tensor [B, S, H, D]). Do they give the same dq, dk and dv?
#
# One would guess: yes, or an error; strides don't change what a tensor holds.
# Behaviour: the second pass is wrong by more than the gradients' own size, without a word; the same gradient laid out as
# the first one was is right again. torch keeps cuDNN's plan of a backward by q, k and v, and the plan reads the output
# and its gradient by the strides that they had when it was made.
# Why it matters: two layers of a model whose outputs are laid out differently share a plan, and one of them trains wrong.
# Seen on 2026-11-29 with torch 2.11.0 (cuDNN 9.19), on an NVIDIA H200. It needs such a GPU; a torch 2.11.0 that is
# installed is taken (it is 3 GB), else the pinned one is installed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python=python3
if [ "$(python3 -c 'import torch; print(torch.__version__.split("+")[0])' 2>/dev/null)" != 2.11.0 ]; then
  python3 -m venv "$work/venv"
  python="$work/venv/bin/python"
  "$work/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.11.0 numpy==2.3.5
fi
"$python" - <<'PYTHON'
import sys

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0):
    print("no GPU of compute capability 9.0 or more: nothing to see here")
    sys.exit(0)

torch.manual_seed(0)
q, k, v = (torch.randn(1, 8, 512, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
first = torch.randn(1, 8, 512, 64, device="cuda", dtype=torch.bfloat16)
other = first.transpose(1, 2).contiguous().transpose(1, 2)
assert torch.equal(first, other)


def gradients(given: torch.Tensor, backend: SDPBackend) -> list[torch.Tensor]:
    with sdpa_kernel(backend):
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    return [each.float() for each in torch.autograd.grad(out, (q, k, v), given)]


expected = gradients(first, SDPBackend.FLASH_ATTENTION)
apart = []
for name, given in (("first", first), ("the same, laid out otherwise", other), ("first again", first)):
    found = gradients(given, SDPBackend.CUDNN_ATTENTION)
    apart.append(max(float((a - b).norm() / b.norm()) for a, b in zip(found, expected)))
    print(f"{name}, strides {tuple(given.stride())}: {apart[-1]:.4f} of the gradients' size from FlashAttention's")
as_seen = apart[0] < 0.01 and apart[1] > 0.5 and apart[2] < 0.01
print("as seen on 2026-11-29" if as_seen else "CHANGED since 2026-11-29")
sys.exit(not as_seen)
PYTHON
