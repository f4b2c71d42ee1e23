"""How many tokens a second does `slimtune generate` make, against plain `model.generate` in batches of 8 in file order?

Both sides answer the same 64 prompts, greedily, with the same adapter on the same base; both are warmed up first. Two
baselines: the base in 4 bits as training loads it, and the same values unpacked, as slimtune computes on a CPU, so
that the gain of unpacking and the gain of the engine are seen apart. In 16 bits the shape of a batch changes how sums
are rounded, in Transformers as well: so its replies in batches of 4 are compared with its own in batches of 8, all of
them with its replies in fp32, and where two replies part, the two tokens' logits are.

    python benchmarks/generate.py ADAPTER -o benchmarks/results/DATE-generate-MACHINE.json
"""

from __future__ import annotations

import argparse
import json
import math
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from slimtune.adapter.files import attach_adapter
from slimtune.base.load import load_base
from slimtune.demo import rows
from slimtune.hardware import detect
from slimtune.run.environment import library_versions
from slimtune.run.quiet import upstream_to_log
from slimtune.use.general import GENERAL
from slimtune.use.generate import generate
from slimtune.use.load import Opened, open_model
from slimtune.use.sampling import Sampling

BATCH = 8


def conversations() -> list[list[dict[str, str]]]:
    """64 prompts of the package's own: 44 general questions and the demo's 20 held-out requests, mixed."""
    held_out = [row.messages[:1] for row in rows()[1]]
    general = [question.messages for question in GENERAL]
    mixed = [item for pair in zip(general, held_out, strict=False) for item in pair]
    return mixed + general[len(held_out) :]


def plain(opened: Opened, model: Any, prompts: list[list[int]], new: int, size: int = BATCH) -> list[list[int]]:
    """Transformers' generate, ``size`` prompts at a time, in file order, padded on the left."""
    config = Sampling(max_new_tokens=new).generation_config(opened, new)
    replies = []
    for start in range(0, len(prompts), size):
        batch = prompts[start : start + size]
        width = max(map(len, batch))
        ids = torch.tensor([[opened.pad_id] * (width - len(p)) + p for p in batch], device=opened.device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in batch], device=opened.device)
        with torch.inference_mode():
            made = model.generate(ids, attention_mask=mask, generation_config=config)
        for row in made[:, width:].tolist():
            ends = [at for at, token in enumerate(row) if token in opened.stop_ids]
            replies.append(row[: ends[0]] if ends else row)
    return replies


def ours(opened: Opened, prompts: list[list[int]], new: int) -> list[list[int]]:
    replies = {reply.index: reply.ids for reply in generate(opened, prompts, Sampling(max_new_tokens=new))}
    return [replies[index] for index in range(len(prompts))]


def equal(some: list[list[int]], others: list[list[int]]) -> int:
    """How many replies are the same."""
    return sum(a == b for a, b in zip(some, others, strict=True))


@torch.inference_mode()
def steps_apart(opened: Opened, prompt: list[int], one: list[int], other: list[int]) -> float:
    """Where two replies part: the two tokens' logits' distance, in steps of bf16 at their size."""
    same = next(i for i, (a, b) in enumerate(zip([*one, -1], [*other, -1], strict=False)) if a != b)
    ids = torch.tensor([prompt + one[:same]], device=opened.device)
    logits = opened.model(ids).logits[0, -1].float()
    # A reply that ends here chose a stop token.
    a, b = (logits[reply[same : same + 1] or list(opened.stop_ids)].max() for reply in (one, other))
    step = 2.0 ** (math.floor(math.log2(max(a.abs(), b.abs()))) - 7)
    return float((a - b).abs()) / step


def in_4_bits(opened: Opened, dtype: str) -> Any:
    """The same base and adapter as training holds them: nothing unpacked."""
    model: Any = load_base(str(opened.found.base), detect(), compute_dtype=dtype).model
    model.config.use_cache = True
    return (attach_adapter(model, opened.found.adapter) if opened.found.adapter else model).eval()


def timed(run: Any, *arguments: Any) -> tuple[list[list[int]], float, float]:
    """Replies, seconds on the clock, seconds of the CPU: the latter hold on a machine that others use too."""
    started, worked = time.perf_counter(), time.process_time()
    replies = run(*arguments)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return replies, time.perf_counter() - started, time.process_time() - worked


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target")
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--dtype", choices=["fp32", "bf16", "fp16"])
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--baseline", choices=["packed", "unpacked"], help="only one of the two baselines")
    options = parser.parse_args()
    hardware = detect()
    dtype = options.dtype or hardware.compute_dtype
    with upstream_to_log(None):
        opened = open_model(options.target, dtype=dtype)
        prompts = [opened.prompt_ids(messages) for messages in conversations()]
        sides: dict[str, tuple[Any, ...]] = {"slimtune": (ours, opened, prompts, options.new)}
        if options.baseline != "packed":
            sides["transformers, unpacked"] = (plain, opened, opened.model, prompts, options.new)
        if options.baseline != "unpacked":
            sides["transformers, 4 bits"] = (plain, opened, in_4_bits(opened, dtype), prompts, options.new)
        results: dict[str, Any] = {}
        outputs: dict[str, list[list[int]]] = {}
        for name, (run, *arguments) in sides.items():
            run(*arguments[:-2], prompts[:BATCH], 4)  # warm up
            clock, cpu = [], []
            for _ in range(options.repeat):
                outputs[name], took, worked = timed(run, *arguments)
                clock.append(round(took, 2))
                cpu.append(round(worked, 2))
            # On one CPU thread, a second of the CPU is a second on the clock of a machine at rest.
            best = min(cpu if torch.get_num_threads() == 1 and not torch.cuda.is_available() else clock)
            tokens = sum(map(len, outputs[name])) + len(prompts)
            results[name] = {
                "seconds": clock, "cpu_seconds": cpu, "tokens": tokens, "tokens_per_second": round(tokens / best, 1),
            }  # fmt: skip
            print(name, results[name], flush=True)
        mine = outputs["slimtune"]
        in_16_bits: dict[str, Any] = {}
        if dtype != "fp32":
            baseline = next(name for name in outputs if name.startswith("transformers"))
            again = plain(opened, sides[baseline][2], prompts, options.new, BATCH // 2)
            exact_model = open_model(options.target, dtype="fp32")
            exact = plain(exact_model, exact_model.model, prompts, options.new)
            apart = [
                steps_apart(opened, prompt, a, b)
                for prompt, a, b in zip(prompts, mine, outputs[baseline], strict=True)
                if a != b
            ]
            in_16_bits = {
                "transformers_in_batches_of_4_equal_to_8": equal(again, outputs[baseline]),
                "equal_to_transformers_in_fp32": {
                    **{name: equal(replies, exact) for name, replies in outputs.items()},
                    "transformers in batches of 4": equal(again, exact),
                },
                "where_replies_part_bf16_steps_apart": sorted(round(distance, 2) for distance in apart),
            }
    record = {
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": hardware.name,
        "threads": torch.get_num_threads(),
        "versions": library_versions(),
        "model": opened.found.base.name,
        "dtype": dtype,
        "prompts": len(prompts),
        "max_new_tokens": options.new,
        "equal_replies": {name: equal(mine, theirs) for name, theirs in outputs.items()},
        **in_16_bits,
        "speedup": {
            name: round(results["slimtune"]["tokens_per_second"] / result["tokens_per_second"], 2)
            for name, result in results.items()
        },
        "results": results,
    }
    print(json.dumps(record, indent=2))
    if options.output:
        options.output.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
