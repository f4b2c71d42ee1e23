"""The study note's script, whole: Qwen1.5-1.8B-Chat in 4 bits, a LoRA adapter, TRL's SFTTrainer, an adapter-only save.

This is the plain stack, with nothing of slimtune in it; `slimtune train` does the same four parts with the same
numbers.

usage: python notes_qwen15.py [MODEL [DATA.jsonl [OUTPUT [MAX_STEPS]]]]
"""

import sys
from pathlib import Path

import torch
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from trl import SFTConfig, SFTTrainer

defaults = ["Qwen/Qwen1.5-1.8B-Chat", str(Path(__file__).with_name("requests.jsonl")), "notes-run", "-1"]
model_id, data_file, output_dir, max_steps = sys.argv[1:] + defaults[len(sys.argv) - 1 :]
on_gpu = torch.cuda.is_available()
has_bf16 = on_gpu and torch.cuda.is_bf16_supported(including_emulation=False)
compute_dtype = (torch.bfloat16 if has_bf16 else torch.float16) if on_gpu else torch.float32

# 1. The base in 4 bits, its tokenizer, the data.
bnb_config = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=compute_dtype,
)
model = AutoModelForCausalLM.from_pretrained(
    model_id, quantization_config=bnb_config, device_map="auto", dtype=compute_dtype
)
tokenizer = AutoTokenizer.from_pretrained(model_id)
dataset = load_dataset("json", data_files=data_file, split="train")


def formatting_prompts_func(example: dict) -> str:
    """One row's conversation as text, by the model's own chat template."""
    return tokenizer.apply_chat_template(example["messages"], tokenize=False)


# 2. The adapter: r=8, alpha=2r, on the four projections of attention.
peft_config = LoraConfig(
    r=8,
    lora_alpha=16,
    lora_dropout=0.05,
    target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
    task_type="CAUSAL_LM",
)

# 3. SFTTrainer wraps the model in the adapter by itself: there is no get_peft_model here.
training_args = SFTConfig(
    output_dir=output_dir,
    optim="paged_adamw_8bit" if on_gpu else "adamw_8bit",
    learning_rate=2e-4,
    max_steps=int(max_steps),
    bf16=has_bf16,
    fp16=on_gpu and not has_bf16,
    use_cpu=not on_gpu,
    logging_steps=1,
    report_to="none",
)
trainer = SFTTrainer(
    model=model,
    args=training_args,
    train_dataset=dataset,
    peft_config=peft_config,
    formatting_func=formatting_prompts_func,
    processing_class=tokenizer,
)

# 4. Train, and save: what is saved is the adapter, not the base.
trainer.train()
trainer.save_model(output_dir)
