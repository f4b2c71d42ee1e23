#!/usr/bin/env bash
# Question: does SFTTrainer's default loss equal the model's own for a model that caps its logits?
#
# RecurrentGemma caps its logits by tanh, and its config calls that logits_soft_cap (Gemma 2: final_logit_softcapping).
# One would guess: a trainer's loss is the model's own loss on the same tokens.
# Behaviour: TRL computes head and loss together and applies the cap only where the config has Gemma 2's name; here it is
# left out without a word. The mean loss hardly moves at a model's start, the gradients do.
# Why it matters: the adapter is trained for other logits than those that generate will take.
# Seen on 2026-11-29 with trl 1.16.0, transformers 5.23.0, torch 2.13.0, on a CPU.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat > "$work/ask.py" <<'PYTHON'
import tempfile

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, RecurrentGemmaConfig
from tokenizers import Tokenizer, models
from trl import SFTConfig, SFTTrainer

config = RecurrentGemmaConfig(
    vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, lru_width=64,
    attention_window_size=32, logits_soft_cap=1.0, w_init_variance_scale=1.0, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)
torch.manual_seed(0)
model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
for parameter in model.parameters():
    if parameter.ndim == 2:
        parameter.data.normal_(0, 0.3)
words = {f"w{index}": index for index in range(128)}
tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w3")), pad_token="w0", eos_token="w2")
rows = Dataset.from_dict({"input_ids": [list(range(4, 40))]})
args = SFTConfig(output_dir=tempfile.mkdtemp(), use_cpu=True, bf16=False, report_to="none", max_steps=1, per_device_train_batch_size=1)
trainer = SFTTrainer(model=model, args=args, train_dataset=rows, processing_class=tokenizer)
batch = next(iter(trainer.get_train_dataloader()))
model.eval()
with torch.no_grad():
    theirs = float(trainer.compute_loss(model, dict(batch)))
    logits = model(input_ids=batch["input_ids"]).logits[0, :-1].float()
    own = float(torch.nn.functional.cross_entropy(logits, batch["labels"][0, 1:]))
print(f"largest logit of the model {float(logits.abs().max()):.2f}; its own loss {own:.4f}, the trainer's {theirs:.4f}")
raise SystemExit(abs(own - theirs) < 1e-2 * own)
PYTHON
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.3.5 transformers==5.23.0 trl==1.16.0 datasets==4.8.4
HF_HUB_OFFLINE=1 "$work/venv/bin/python" "$work/ask.py" || { echo "CHANGED since 2026-11-29"; exit 1; }
echo "as seen on 2026-11-29"
