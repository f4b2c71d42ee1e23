"""How many rows a second go from a file to packs, against TRL's own preparation of the same file?

    python benchmarks/data.py -o benchmarks/results/DATE-data-MACHINE.json            speed against TRL
    python benchmarks/data.py --scale -o benchmarks/results/DATE-data-scale-MACHINE.json   memory and the cache

Both sides read the same file of chats (lengths log-normal, mean about 370 tokens), with the embedded model's
tokenizer, into packs of 2,048 tokens: slimtune by ``examine`` and ``micro_batches``, TRL by ``load_dataset`` and
SFTTrainer's constructor with ``packing=True`` (a one-layer model of width 16, so that nothing but data counts). TRL is
timed twice: as it comes (every token supervised), and with ``assistant_only_loss`` on a template with generation marks,
which is what slimtune does. Each run is a process of its own; the clock starts after its imports. slimtune also checks
every row, which TRL doesn't.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
MAX_LENGTH = 2048


def write_chats(path: Path, rows: int) -> None:
    """Chats of one to three turns out of the project's own prose."""
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]
    words = " ".join(page.read_text(encoding="utf-8") for page in sorted(pages)).split()
    lengths = np.random.default_rng(0).lognormal(np.log(195) - 0.4, 0.9, rows).clip(10, 800)
    draw = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for length in lengths.astype(int).tolist():
            turns = draw.choice([1, 1, 1, 2, 3])
            messages = []
            for _ in range(turns):
                at, share = draw.randrange(len(words)), max(4, length // turns)
                stretch = [words[(at + offset) % len(words)] for offset in range(share)]
                messages.append({"role": "user", "content": " ".join(stretch[: share // 4])})
                messages.append({"role": "assistant", "content": " ".join(stretch[share // 4 :])})
            file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")


class Meter:
    """Wall time, processor time and peak memory since it was made."""

    def __init__(self) -> None:
        self.wall, self.usage = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)

    def read(self) -> dict[str, float]:
        now = resource.getrusage(resource.RUSAGE_SELF)
        cpu = now.ru_utime + now.ru_stime - self.usage.ru_utime - self.usage.ru_stime
        return {
            "seconds": round(time.perf_counter() - self.wall, 3),
            "cpu_seconds": round(cpu, 3),
            "peak_mb_above_start": round((now.ru_maxrss - self.usage.ru_maxrss) / 1024, 1),
        }


def run_slimtune(file: str, options: dict[str, Any]) -> dict[str, Any]:
    from slimtune.base.tokenizer import load_tokenizer
    from slimtune.config import Config
    from slimtune.data.packing import PackedBatches, micro_batches
    from slimtune.data.preflight import examine

    tokenizer = load_tokenizer("smollm2-135m")
    config = Config.make(data=file, max_length=MAX_LENGTH, eval_share=0.0, **options)
    meter = Meter()
    proof = examine(config, tokenizer)
    read = meter.read()
    batches = micro_batches(proof.train, config) if len(proof.train) else None
    assert batches is None or isinstance(batches, PackedBatches)
    facts = {key: proof.facts[key] for key in ("rows", "rows_trained", "rows_dropped", "tokens", "supervised_tokens")}
    packs = {} if batches is None else {"packs": batches.per_epoch, "fill": round(batches.fill, 4)}
    proving = {"proof_seconds": read["seconds"], "cached": proof.cached}
    return {**meter.read(), **proving, **facts, **packs, "refused": proof.refusal and str(proof.refusal)}


def run_trl(file: str, masked: bool) -> dict[str, Any]:
    import datasets
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    from slimtune.base.tokenizer import load_tokenizer

    tokenizer = load_tokenizer("smollm2-135m")
    if masked:
        whole = "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
        marked = (
            "{% if message['role'] == 'assistant' %}{{ '<|im_start|>assistant\n' }}{% generation %}"
            "{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}{% else %}" + whole + "{% endif %}"
        )
        assert whole in tokenizer.chat_template
        tokenizer.chat_template = tokenizer.chat_template.replace(whole, marked)
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **size))
    with tempfile.TemporaryDirectory() as folder:
        arguments = SFTConfig(
            output_dir=folder, use_cpu=True, bf16=False, report_to="none", disable_tqdm=True,
            packing=True, max_length=MAX_LENGTH, assistant_only_loss=masked,
        )  # fmt: skip
        meter = Meter()
        rows = datasets.load_dataset("json", data_files=file, split="train", cache_dir=folder)
        trainer = SFTTrainer(model=model, args=arguments, train_dataset=rows, processing_class=tokenizer)
        return {**meter.read(), "rows": len(rows), "packs": len(trainer.train_dataset)}


def measured(side: str, file: Path, **options: Any) -> dict[str, Any]:
    """One run in a process of its own; its cache in a folder that doesn't outlive it unless XDG_CACHE_HOME is given."""
    order = json.dumps({"side": side, "file": str(file), "options": options})
    done = subprocess.run(
        [sys.executable, __file__, "--one", order], check=True, capture_output=True, text=True, env=dict(os.environ)
    )
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    print(side, json.dumps(options), json.dumps(result), flush=True)
    return result


def one(order: str) -> None:
    wanted = json.loads(order)
    if wanted["side"] == "slimtune":
        fresh = wanted["options"].pop("fresh", True)
        with tempfile.TemporaryDirectory() as folder:
            from slimtune.data import preflight

            cache = Path(folder) if fresh else Path(wanted["file"]).parent / "cache"
            preflight.cache_folder = lambda: cache
            print(json.dumps(run_slimtune(wanted["file"], wanted["options"])))
    else:
        print(json.dumps(run_trl(wanted["file"], wanted["side"] == "trl, replies only")))


def speed(folder: Path, rows: int, repeats: int) -> dict[str, Any]:
    """slimtune and TRL in turn on one file."""
    file = folder / "chats.jsonl"
    write_chats(file, rows)
    sides = ("slimtune", "trl", "trl, replies only")
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    for _ in range(repeats):
        for side in sides:
            runs[side].append(measured(side, file))
    summary = {
        side: {
            "rows_per_second": round(rows / statistics.median(run["seconds"] for run in made)),
            "cpu_ms_per_row": round(1000 * statistics.median(run["cpu_seconds"] for run in made) / rows, 3),
            "runs": made,
        }
        for side, made in runs.items()
    }
    mine = statistics.median(run["seconds"] for run in runs["slimtune"])
    ratios = {side: round(statistics.median(run["seconds"] for run in runs[side]) / mine, 2) for side in sides[1:]}
    return {"rows": rows, "megabytes": round(file.stat().st_size / 1e6, 1), "times_as_fast": ratios, **summary}


def scale(folder: Path, short_rows: int) -> dict[str, Any]:
    """Memory on many short rows and on one line of a gigabyte; the second run from the cache."""
    made: dict[str, Any] = {}
    for rows in (short_rows // 10, short_rows):
        file = folder / "short.jsonl"
        with file.open("w", encoding="utf-8") as out:
            for number in range(rows):
                out.write(f'{{"text": "Row {number} is short."}}\n')
        made[f"{rows:,} short rows"] = measured("slimtune", file)
        file.unlink()
    file = folder / "line.jsonl"
    with file.open("w", encoding="utf-8") as out:
        out.write('{"text": "')
        for _ in range(1000):
            out.write("word " * 200_000)
        out.write('"}\n')
    made["one line of 1 GB"] = measured("slimtune", file)
    file.unlink()
    file = folder / "chats.jsonl"
    write_chats(file, 100_000)
    made["100,000 chats, first run"] = measured("slimtune", file, fresh=False)
    made["100,000 chats, second run"] = measured("slimtune", file, fresh=False)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, help="file for the results")
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--scale", action="store_true")
    parser.add_argument("--short-rows", type=int, default=10_000_000)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        one(asked.one)
        return
    from slimtune.run.environment import library_versions

    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        made = scale(place, asked.short_rows) if asked.scale else speed(place, asked.rows, asked.repeats)
    result = {
        "date": datetime.now(UTC).date().isoformat(),
        "cores": len(os.sched_getaffinity(0)),
        "processor": platform.processor() or platform.machine(),
        "load_average_at_end": [round(value, 2) for value in os.getloadavg()],
        "versions": library_versions(),
        **made,
    }
    text = json.dumps(result, indent=2)
    if asked.output:
        asked.output.parent.mkdir(parents=True, exist_ok=True)
        asked.output.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
