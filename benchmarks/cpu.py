"""slimtune against TRL's stack on a CPU, on the embedded model: python benchmarks/cpu.py [--steps 5] [--rounds 2]

SmolLM2-135M in NF4 (double quantisation), LoRA r=8 on q, k, v, o, dropout 0.05, 8-bit AdamW, fp32 arithmetic, chats of
the demo. TRL: SFTTrainer's defaults on these chats, 8 a step, padded, supervised whole; with gradient checkpointing,
its default, and without. slimtune: `slimtune.finetune`, its trainer on packs of these chats, about as many tokens a
step. All in one process, by turns, so that what else the machine does meets all of them. Real tokens against the
clock, the first step left out.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peers import HERE, machine

from slimtune.hardware import detect

ROWS, LENGTH = 8, 128


def chats() -> tuple[Any, list[list[int]]]:
    """The tokenizer, and each chat's tokens."""
    from slimtune.base.embedded import EMBEDDED
    from slimtune.base.tokenizer import load_tokenizer
    from slimtune.demo import rows

    tokenizer = load_tokenizer(EMBEDDED)
    rendered = [tokenizer.apply_chat_template(row.messages, return_dict=False)[:LENGTH] for row in rows()[0]]
    return tokenizer, rendered


def load() -> Any:
    from slimtune.base.embedded import EMBEDDED
    from slimtune.base.load import load_base
    from slimtune.hardware import detect

    return load_base(EMBEDDED, detect(), compute_dtype="fp32").model


def lora() -> Any:
    from peft import LoraConfig

    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    return LoraConfig(r=8, lora_alpha=16, lora_dropout=0.05, target_modules=targets, task_type="CAUSAL_LM")


def run_trl(steps: int, *, checkpointing: bool = True) -> list[tuple[float, int]]:
    """(seconds, real tokens) of each step."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    tokenizer, rows = chats()
    rows = rows[: ROWS * steps]
    measured: list[tuple[float, int]] = []

    class Clock(TrainerCallback):
        begin = 0.0

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.begin = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
            mine = rows[state.global_step * ROWS - ROWS : state.global_step * ROWS]
            measured.append((time.perf_counter() - self.begin, sum(map(len, mine))))

    args = SFTConfig(
        output_dir=tempfile.mkdtemp(), per_device_train_batch_size=ROWS, max_steps=steps, max_length=LENGTH,
        optim="adamw_8bit", gradient_checkpointing=checkpointing, use_cpu=True, bf16=False, save_strategy="no",
        report_to="none", disable_tqdm=True, train_sampling_strategy="sequential",
    )  # fmt: skip
    data = Dataset.from_dict({"input_ids": rows})
    trainer = SFTTrainer(
        model=load(), args=args, train_dataset=data, processing_class=tokenizer, peft_config=lora(), callbacks=[Clock()]
    )
    trainer.train()
    return measured


def run_slimtune(steps: int) -> list[tuple[float, int]]:
    """(seconds, real tokens) of each step."""
    from slimtune import finetune
    from slimtune.base.embedded import EMBEDDED
    from slimtune.config import Config
    from slimtune.demo import rows

    folder = Path(tempfile.mkdtemp())
    file = folder / "chats.jsonl"
    file.write_text("".join(json.dumps({"messages": row.messages}) + "\n" for row in rows()[0]), encoding="utf-8")
    config = Config.make(
        model=EMBEDDED, data=str(file), output=folder / "run", max_steps=steps, max_length=ROWS * LENGTH // 2,
        micro_batch=1, gradient_accumulation=1, compute_dtype="fp32", save_steps=10**6, eval_share=0.0,
    )  # fmt: skip
    records = [record for record in finetune(config).metrics() if "step_seconds" in record]
    return [(record["step_seconds"], record["tokens"]) for record in records]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=2)
    asked = parser.parse_args()
    stacks = {
        "slimtune": run_slimtune,
        "trl": run_trl,
        "trl without checkpointing": partial(run_trl, checkpointing=False),
    }
    timed: dict[str, list[tuple[float, int]]] = {name: [] for name in stacks}
    for _ in range(asked.rounds):
        for name, run in stacks.items():
            timed[name] += run(asked.steps)[1:]
            print(name, [round(tokens / seconds, 1) for seconds, tokens in timed[name]], flush=True)
    rates = {name: statistics.median(tokens / seconds for seconds, tokens in steps) for name, steps in timed.items()}
    ratios = {name: round(rates["slimtune"] / rate, 2) for name, rate in rates.items()}
    print(f"tokens/s {rates}, slimtune over each {ratios}")
    about = {**machine(), "cpu": detect().name, "threads": torch.get_num_threads()}
    file = HERE / "results" / f"{about['date']}-cpu.json"
    results = {**about, "ratios": ratios, "tokens_a_second": rates, "steps": timed}
    file.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
