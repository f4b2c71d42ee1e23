"""Does rehearsing keep what a base could, and what does it cost?

    python benchmarks/rehearse.py [MODEL] [--seconds 190] [--tasks labels,dates,home] [--seeds 1,2,3]

Trains MODEL (SmolLM2-135M) on small tasks (benchmarks/tasks.py) with several seeds, with ``rehearse`` and without, else
by slimtune's defaults. Of each: the package's general set before and after (the share of the base's score that is
kept), the task's score on 48 questions that it wasn't trained on, the held-out loss with its interval, and the seconds.
The last lines are the means, and by task what rehearsing costs its score over all seeds. ``--tiny`` takes a few steps
of each.
"""

from __future__ import annotations

import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tasks import TASKS, score
from workers import measure, options_of

TRAINED_ON = "labels,dates,home"
WAYS = ((0.1, 96, 4, 0.25), (0.0, 0, 0, 1.0))
"""(share of the rows, fewest answers, passes over them, what a token of theirs counts): what slimtune does, and
nothing. Others can be put here; 20 passes are one in every epoch."""
SEEDS = "1,2,3"
_REPLY_TOKENS, _GENERAL_TOKENS = 40, 48
_base_general: list[float] = []
"""The base's score of each general question, once a process."""


def trained(job: dict[str, Any], base: str, *, tiny: bool) -> dict[str, Any]:
    """One training, and what its model can."""
    from slimtune import plan, recipes
    from slimtune.config import Config
    from slimtune.use import rehearse
    from slimtune.use.ask import ask
    from slimtune.use.general import GENERAL

    rehearse.LEAST, rehearse.ANSWER_WEIGHT, plan.ANSWER_PASSES = job["least"], job["weight"], job["passes"]

    train, test = (part[:24] if tiny else part for part in TASKS[job["task"]].pairs())
    general = GENERAL[:6] if tiny else GENERAL
    found: dict[str, Any] = {}

    def general_scores(model: Any, tokenizer: Any) -> list[float]:
        replies = ask(model, tokenizer, [question.messages for question in general], _GENERAL_TOKENS)
        return [float(question.is_right(reply)) for question, reply in zip(general, replies, strict=True)]

    def look(model: Any, tokenizer: Any) -> None:
        if not found:  # before the training
            if not _base_general:
                _base_general.extend(general_scores(model, tokenizer))
            found["began"] = time.monotonic()
            return
        found["took"] = time.monotonic() - found["began"]
        replies = ask(model, tokenizer, [[{"role": "user", "content": q}] for q, _ in test], _REPLY_TOKENS)
        found["scores"] = [score(r, answer) for r, (_, answer) in zip(replies, test, strict=True)]
        found["general"] = general_scores(model, tokenizer)

    with tempfile.TemporaryDirectory() as name:
        file, began = Path(name) / "rows.jsonl", time.monotonic()
        rows = (
            {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
            for question, answer in train
        )
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        values: dict[str, Any] = {
            "save_steps": 10_000,
            "eval_steps": 10_000,
            "samples": 0,
            **({"max_steps": 2} if tiny else {}),
        }
        config = Config.make(
            model=base, data=str(file), output=Path(name) / "run", seed=job["seed"], rehearse=job["share"],
            **values,
        )  # fmt: skip
        run = recipes.finetune(config, observe=look)
        facts = run.read_json(run.facts_file)
        whole = time.monotonic() - began
    verdict, could = facts["verdict"], sum(_base_general)
    return {
        **job,
        "score": statistics.fmean(found["scores"]),
        "scores": [round(each, 4) for each in found["scores"]],
        "base_general": could / len(general),
        "general": sum(found["general"]) / len(general),
        "kept": sum(found["general"]) / max(1.0, could),
        "kept_of_the_right": sum(map(min, found["general"], _base_general)) / max(1.0, could),
        "loss": verdict["end"],
        "outcome": verdict["outcome"],
        "engine": facts["training"]["engine"],
        "steps": facts["training"]["steps"],
        "tokens": facts["training"]["tokens"],
        "rehearsed": facts["data"].get("rehearsed"),
        "training_seconds": round(found["took"], 1),
        "run_seconds": round(whole, 1),
    }


def summary(results: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Means over seeds and tasks, by amount; and beside the run of the same task and seed without rehearsing: of how
    many the score is the same or better, by the 95 % interval of the difference over the questions, and of how many the
    held-out loss lies within that run's interval. Then by task, over its seeds."""
    import numpy as np

    from slimtune.run.interval import bootstrap

    without = {(r["task"], r["seed"]): r for r in results if not r["share"]}
    for share, least, passes, weight in WAYS:
        found = [
            r for r in results if (r["share"], r["least"], r["passes"], r["weight"]) == (share, least, passes, weight)
        ]
        pairs = [(r, without[key]) for r in found if (key := (r["task"], r["seed"])) in without]
        pairs = [(r, other) for r, other in pairs if r["loss"] and other["loss"]]
        if pairs:
            yield {
                "share": share, "least": least, "passes": passes, "weight": weight, "runs": len(found),
                **{
                    key: round(statistics.fmean(r[key] for r in found), 4)
                    for key in ("kept", "kept_of_the_right", "general", "score", "training_seconds", "run_seconds")
                },
                "least_kept": min(r["kept"] for r in found),
                "loss": round(statistics.fmean(r["loss"]["value"] for r, _ in pairs), 4),
                "score_kept": sum(
                    bootstrap(np.subtract(r["scores"], o["scores"])).high >= 0 for r, o in pairs if "scores" in o
                ),
                "no_worse_than_without": sum(r["loss"]["value"] <= o["loss"]["high"] for r, o in pairs),
            }  # fmt: skip
        for task in sorted({r["task"] for r, _ in pairs} if share else ()):
            mine = [(r, o) for r, o in pairs if r["task"] == task]
            apart = np.concatenate([np.subtract(r["scores"], o["scores"]) for r, o in mine])
            around = bootstrap(apart)
            yield {
                "share": share, "task": task, "seeds": len(mine),
                "kept": round(statistics.fmean(r["kept"] for r, _ in mine), 4),
                "score": round(statistics.fmean(r["score"] for r, _ in mine), 4),
                "score_without": round(statistics.fmean(o["score"] for _, o in mine), 4),
                "score_apart": [round(each, 4) for each in (apart.mean(), around.low, around.high)],
                "steps": [r["steps"] for r, _ in mine], "steps_without": [o["steps"] for _, o in mine],
            }  # fmt: skip


def main() -> None:
    parser = options_of(__doc__)
    parser.add_argument("--tasks", default=TRAINED_ON)
    parser.add_argument("--seeds", default=SEEDS)
    options = parser.parse_args()
    seeds = map(int, options.seeds.split(","))
    jobs = [
        {"task": task, "seed": seed, "share": share, "least": least, "passes": passes, "weight": weight}
        for (share, least, passes, weight), task, seed in itertools.product(WAYS, options.tasks.split(","), seeds)
    ]
    if options.tiny:
        jobs = [jobs[0], jobs[-1]]
    measure(options, jobs, trained, summary)


if __name__ == "__main__":
    main()
