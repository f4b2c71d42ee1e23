"""Are the defaults right for few rows? python benchmarks/defaults.py [MODEL] [--seconds 190] [--workers 12] [--parts …]

Trains MODEL (SmolLM2-135M) on small tasks (benchmarks/tasks.py) with a grid of learning rates, documents to a step and
epochs, and with slimtune's defaults, each by `slimtune train`'s own recipe, and scores its greedy replies to 48
questions that it wasn't trained on. The defaults were chosen by the part ``choose``; by ``prove``, on other tasks, they
are judged: their score over that of the grid's best. Every training is a line of JSON; the last lines are the shares.
``--tiny`` takes a few steps of each, to see the script work.
"""

from __future__ import annotations

import itertools
import json
import random
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tasks import TASKS, score
from workers import measure, options_of

CHOSEN_ON = ("home", "dates", "labels")
PROVEN_ON = ("orders", "sorting")
MODELS: dict[str, dict[str, Any]] = {
    "nf4, attention, r 8": {},
    "16 bits, all-linear, r 16": {"quantization": "none", "targets": "all-linear", "lora_r": 16},
}
"""Two ways to adapt one model: as by default, and with three times the adapter on unquantised weights."""
RATES = (2e-4, 1e-3, 3e-3)
AMOUNTS = ((4, 60), (4, 160))
"""(documents to a step, steps)."""
SEEDS = (1,)
_REPLY_TOKENS = 40
_PADDING = 64


def jobs(parts: list[str]) -> Iterator[dict[str, Any]]:
    """Every training of these parts, shuffled within a part, so that one that is cut short has some of all: ``choose``
    and ``prove`` are grids, ``defaults`` what slimtune does by itself."""
    for part in parts:
        made = list(_jobs(part))
        random.Random(part).shuffle(made)
        yield from made


def _jobs(part: str) -> Iterator[dict[str, Any]]:
    tasks = {"choose": CHOSEN_ON, "prove": PROVEN_ON}.get(part, (*PROVEN_ON, *CHOSEN_ON))
    for model, task in itertools.product(MODELS, tasks):
        common = {"task": task, "model": model}
        if part == "defaults":
            yield from ({**common, "seed": seed} for seed in SEEDS)
            continue
        for (documents, steps), rate in itertools.product(AMOUNTS, RATES):
            yield {**common, "seed": 1, "rate": rate, "documents": documents, "max_steps": steps}


def trained(job: dict[str, Any], base: str, *, tiny: bool) -> dict[str, Any]:
    """One training, and the score of what it made."""
    from slimtune.base.tokenizer import load_tokenizer
    from slimtune.config import Config
    from slimtune.recipes import finetune
    from slimtune.use.ask import ask

    train, test = (part[:12] if tiny else part for part in TASKS[job["task"]].pairs())
    asked = [
        [{"role": "user", "content": question}, {"role": "assistant", "content": answer}] for question, answer in train
    ]
    values: dict[str, Any] = {
        **MODELS[job["model"]],
        "seed": job["seed"],
        "save_steps": 10_000,
        "eval_steps": 10_000,
        "samples": 0,
    }
    if "rate" in job:
        tokenizer = load_tokenizer(base)
        lengths = [len(tokenizer.apply_chat_template(messages)["input_ids"]) for messages in asked]
        tokens = max(max(lengths), job["documents"] * statistics.fmean(lengths))
        values |= {
            "learning_rate": job["rate"], "max_steps": job["max_steps"], "gradient_accumulation": 1,
            "pack_tokens": _PADDING * -(-round(tokens) // _PADDING),
        }  # fmt: skip
    if tiny:
        values |= {"max_steps": 2}
    replies: list[list[str]] = []

    def look(model: Any, tokenizer: Any) -> None:
        if not replies:  # before the training
            replies.append([])
            return
        replies.append(ask(model, tokenizer, [[{"role": "user", "content": q}] for q, _ in test], _REPLY_TOKENS))

    with tempfile.TemporaryDirectory() as name:
        file = Path(name) / "rows.jsonl"
        file.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in asked))
        run = finetune(Config.make(model=base, data=str(file), output=Path(name) / "run", **values), observe=look)
        config, facts = run.config(), run.read_json(run.facts_file)
    verdict = facts["verdict"]
    return {
        **job,
        "score": statistics.fmean(score(reply, answer) for reply, (_, answer) in zip(replies[-1], test, strict=True)),
        "exact": statistics.fmean(
            reply.strip() == answer for reply, (_, answer) in zip(replies[-1], test, strict=True)
        ),
        "loss": (verdict["end"] or {}).get("value"),
        "start": (verdict["start"] or {}).get("value"),
        "outcome": verdict["outcome"],
        "steps": facts["training"]["steps"],
        "decided": [config.learning_rate, config.pack_tokens, config.gradient_accumulation, config.epochs],
        "example": replies[-1][0],
    }


def shares(results: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """For each task and model: the defaults' mean score over that of the grid's best."""
    for task in TASKS:
        for model in MODELS:
            found = [r for r in results if (r["task"], r["model"]) == (task, model)]
            own = [r["score"] for r in found if "rate" not in r]
            grid = [r for r in found if "rate" in r]
            if own and grid:
                best = max(grid, key=lambda r: r["score"])
                yield {
                    "task": task, "model": model, "of": len(grid), "defaults": own, "best": best["score"],
                    "best_is": [best["rate"], best["documents"], best["max_steps"]],
                    "share": statistics.fmean(own) / max(best["score"], 1e-9),
                }  # fmt: skip


def main() -> None:
    parser = options_of(__doc__)
    parser.add_argument("--parts", nargs="+", choices=["choose", "prove", "defaults"], default=["defaults", "prove"])
    options = parser.parse_args()
    todo = list(jobs(options.parts))
    if options.tiny:
        todo = todo[:: max(1, len(todo) // 4)]
    measure(options, todo, trained, shares)


if __name__ == "__main__":
    main()
