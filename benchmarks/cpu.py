"""slimtune against TRL's stack on a CPU, on the embedded model: python benchmarks/cpu.py [--steps 5]

SmolLM2-135M in NF4 (double quantisation), LoRA r=8 on q, k, v, o, dropout 0.05, 8-bit AdamW, fp32 arithmetic, chats of
the demo. TRL: SFTTrainer's defaults on the same chats, 8 a step, padded, gradient checkpointing as it is by default;
slimtune: Engine and optimizer on packs of the same chats. Both in one process, one after the other. Counted are real
tokens against the process's CPU seconds, which another program's load changes little, and against the clock.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from peers import HERE, machine

ROWS, LENGTH = 8, 128


def clocks() -> tuple[float, float]:
    return time.process_time(), time.perf_counter()


def chats() -> tuple[Any, list[list[int]]]:
    """The tokenizer, and each chat's tokens."""
    from slimtune.base.embedded import EMBEDDED
    from slimtune.base.load import load_tokenizer
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


def run_trl(steps: int) -> list[tuple[float, float, int]]:
    """(CPU seconds, seconds, real tokens) of each step."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    tokenizer, rows = chats()
    rows = rows[: ROWS * steps]
    measured: list[tuple[float, float, int]] = []

    class Clock(TrainerCallback):
        begin = (0.0, 0.0)

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.begin = clocks()

        def on_step_end(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
            cpu, wall = clocks()
            mine = rows[state.global_step * ROWS - ROWS : state.global_step * ROWS]
            measured.append((cpu - self.begin[0], wall - self.begin[1], sum(map(len, mine))))

    args = SFTConfig(
        output_dir=tempfile.mkdtemp(), per_device_train_batch_size=ROWS, max_steps=steps, max_length=LENGTH,
        optim="adamw_8bit", use_cpu=True, bf16=False, save_strategy="no", report_to="none", disable_tqdm=True,
        train_sampling_strategy="sequential",
    )  # fmt: skip
    data = Dataset.from_dict({"input_ids": rows})
    trainer = SFTTrainer(
        model=load(), args=args, train_dataset=data, processing_class=tokenizer, peft_config=lora(), callbacks=[Clock()]
    )
    trainer.train()
    return measured


def run_slimtune(steps: int) -> list[tuple[float, float, int]]:
    """(CPU seconds, seconds, real tokens) of each step."""
    from peft import get_peft_model

    from slimtune.engine import Engine, FusedAdamW8bit

    _, rows = chats()
    model = get_peft_model(load(), lora()).train()
    engine = Engine(model, dtype=torch.float32, tokens=ROWS * LENGTH, longest=LENGTH)
    optimizer = FusedAdamW8bit(engine.flat, lr=2e-4)
    measured = []
    for step in range(steps):
        pack = rows[step * ROWS : (step + 1) * ROWS]
        begin = clocks()
        ids = torch.tensor([token for row in pack for token in row])[None]
        positions = torch.cat([torch.arange(len(row)) for row in pack])[None]
        labels = ids.masked_fill(positions == 0, -100)
        batch = {"input_ids": ids, "labels": labels, "position_ids": positions}
        float(engine.forward_backward(batch, int((labels != -100).sum())))
        optimizer.clip_(1.0)
        optimizer.step()
        optimizer.zero_grad()
        cpu, wall = clocks()
        measured.append((cpu - begin[0], wall - begin[1], ids.numel()))
    return measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5)
    steps = parser.parse_args().steps
    stacks: dict[str, Callable[[int], list[tuple[float, float, int]]]] = {"slimtune": run_slimtune, "trl": run_trl}
    results = {}
    for name, run in stacks.items():
        timed = run(steps)[1:]
        results[name] = {
            "tokens_a_cpu_second": statistics.median(tokens / cpu for cpu, _, tokens in timed),
            "tokens_a_second": statistics.median(tokens / wall for _, wall, tokens in timed),
            "steps": timed,
        }
        print(name, json.dumps({key: value for key, value in results[name].items() if key != "steps"}), flush=True)
    ratios = {key: results["slimtune"][key] / results["trl"][key] for key in ("tokens_a_cpu_second", "tokens_a_second")}
    print(ratios)
    about = {**machine(), "cpu": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
    file = HERE / "results" / f"{about['date']}-cpu.json"
    file.write_text(json.dumps({**about, "ratio": ratios, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
