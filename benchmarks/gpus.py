"""Times slimtune's trainer on several cards of one machine: python benchmarks/gpus.py [W1 W2 W3] [--ranks 1,2] [--trl]

For each number of ranks one torchrun trains every workload by ``slimtune train``'s own recipe, a step's micro-batches
being as many as the ranks: each card has what one card alone has. Tokens a second are the median over the steps after
the first, from one log line to the next. The share of a step that the ranks come together in is by CUDA events around
it, waiting for the slower one included; ``sum_ms`` is the gradient's sum alone, repeated. Every step compares the
ranks' adapters, and the end their bytes. ``--kills N`` kills a rank in the middle of a run N times, and resumes on all
ranks and on one less. One JSON line a result; ``--out`` writes them with machine and versions. ``--trl`` adds TRL under
DDP (W1, W2 unpacked; W3 packed).
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
STEPS = {"W2": 80, "tiny": 8, "tiny-chats": 8}
USUAL_STEPS, WARM_UP = 18, 6
LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
PACKAGES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "triton")


class _Enough(Exception):
    """The steps are timed: the results needn't be written."""


# -- one rank ----------------------------------------------------------------------------------------------------------


def rank(names: list[str], folders: Path, count: int, *, trl: bool) -> None:
    """Train each workload as one of ``count`` ranks; the figures go to files in ``folders``."""
    place = _place()
    for name in names:
        result = _trl(name, folders, count) if trl else _slimtune(name, folders, count, place.rank)
        kind = "trl" if trl else "slimtune"
        (folders / f"{kind}-{name}-{count}-{place.rank}.json").write_text(json.dumps(result))


def _place() -> Any:
    from slimtune.ranks.place import take_card, this_place

    place = this_place()
    take_card(place)  # before torch starts CUDA
    return place


def rows_of(name: str, count: int) -> list[list[int]]:
    """Token ids of each document; enough that every step of every rank has a full micro-batch."""
    from workloads import WORKLOADS

    workload, steps = WORKLOADS[name], STEPS.get(name, USUAL_STEPS)
    rng = random.Random(1)
    lengths = workload.document_lengths(steps * count * (8 if workload.chats else 1))
    return [[rng.randrange(6, 1000) for _ in range(length)] for length in lengths]


def _slimtune(name: str, folders: Path, count: int, number: int) -> dict[str, Any]:
    import torch
    from peers import as_messages
    from workloads import WORKLOADS

    from slimtune.config import Config
    from slimtune.recipes import finetune
    from slimtune.training.ranked import RankedTrainer

    workload, steps = WORKLOADS[name], STEPS.get(name, USUAL_STEPS)
    data = folders / f"{name}-{count}-{number}.jsonl"
    data.write_text("".join(json.dumps(as_messages(row)) + "\n" for row in rows_of(name, count)))
    data.rename(data := folders / f"{name}-{count}.jsonl")  # the same bytes from each rank
    run = folders / f"run-{name}-{count}"
    config = Config.make(
        model=str(folders / workload.size), data=str(data), output=run, overwrite=True, train_on="all",
        max_length=workload.length, micro_batch=workload.rows, gradient_accumulation=count, max_steps=steps,
        lora_r=workload.r, lora_dropout=workload.dropout, targets=workload.targets,
        engine="fused", save_steps=10 * steps, eval_share=0.0,
    )  # fmt: skip
    cuda = torch.cuda.is_available()
    together: list[Any] = []
    plain = RankedTrainer._come_together

    def timed(trainer: Any) -> None:
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        plain(trainer)
        ended.record()
        together.append((began, ended))

    sums: list[float] = []

    def observe(model: Any, tokenizer: Any) -> None:
        if sums:
            raise _Enough
        sums.append(_sum_ms(sum(each.numel() for each in model.parameters() if each.requires_grad)))

    if cuda:
        torch.cuda.reset_peak_memory_stats()
        RankedTrainer._come_together = timed  # type: ignore[method-assign]
    began = time.perf_counter()
    try:
        finetune(config, observe=observe)
    except _Enough:
        pass
    finally:
        RankedTrainer._come_together = plain  # type: ignore[method-assign]
    made: dict[str, Any] = {
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if cuda else None,
        "sum_ms": round(sums[0], 3),
        "together_ms": round(_median(begins.elapsed_time(ends) for begins, ends in together[WARM_UP:]), 3),
        "seconds": round(time.perf_counter() - began, 1),
        "device": torch.cuda.get_device_name() if cuda else "cpu",
    }
    if number == 0:
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        records = [line for line in lines if "step_seconds" in line]
        made |= {
            "steps": len(records),
            "step_ms": round(_median(record["step_seconds"] * 1e3 for record in records[WARM_UP:]), 2),
            "tokens_s": round(_median(record["tokens"] / record["step_seconds"] for record in records[WARM_UP:])),
            "losses": [round(records[0]["loss"], 4), round(records[-1]["loss"], 4)],
        }
    if cuda:
        torch.cuda.empty_cache()
    return made


def _median(values: Any) -> float:
    values = list(values)
    return statistics.median(values) if values else 0.0


def _sum_ms(numbers: int) -> float:
    """Milliseconds of one sum of so many fp32 numbers over the ranks; 0 alone."""
    import torch
    from torch import distributed as dist

    if not dist.is_initialized() or not torch.cuda.is_available():
        return 0.0
    tensor = torch.zeros(numbers, device="cuda")
    for _ in range(5):
        dist.all_reduce(tensor)
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(20):
        dist.all_reduce(tensor)
    torch.cuda.synchronize()
    return (time.perf_counter() - began) / 20 * 1e3


def _trl(name: str, folders: Path, count: int) -> dict[str, Any]:
    """TRL's SFTTrainer on the 4-bit base, as accelerate shares it out under torchrun."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, TrainerCallback
    from trl import SFTConfig, SFTTrainer
    from workloads import WORKLOADS

    workload, steps = WORKLOADS[name], STEPS.get(name, USUAL_STEPS)
    rows, folder = rows_of(name, count), str(folders / workload.size)
    four_bits = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=four_bits, dtype=torch.bfloat16, device_map={"": 0}
    )
    times: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            torch.cuda.synchronize()
            times.append(time.perf_counter())

    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=str(folders / "trl"), per_device_train_batch_size=workload.rows, max_steps=steps,
            max_length=workload.length, packing=workload.chats, optim="paged_adamw_8bit", learning_rate=2e-4, bf16=True,
            gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False}, report_to="none",
            save_strategy="no", logging_steps=steps, disable_tqdm=True, ddp_find_unused_parameters=False,
        ),
        train_dataset=Dataset.from_list([{"input_ids": row} for row in rows]),
        processing_class=AutoTokenizer.from_pretrained(folder),
        peft_config=LoraConfig(
            r=workload.r, lora_alpha=2 * workload.r, lora_dropout=workload.dropout, task_type="CAUSAL_LM",
            target_modules=list(workload.targets),
        ),
        callbacks=[Clock()],
    )  # fmt: skip
    trainer.train()
    step = _median(after - before for before, after in zip(times[WARM_UP:], times[WARM_UP + 1 :], strict=False))
    tokens = workload.rows * workload.length * count  # a pack's padding counted, which is TRL's favour
    return {"step_ms": round(step * 1e3, 2), "tokens_s": round(tokens / step), "peak_gib": round(
        torch.cuda.max_memory_allocated() / 2**30, 2), "device": torch.cuda.get_device_name()}  # fmt: skip


# -- all of them -------------------------------------------------------------------------------------------------------


def launch(count: int, *arguments: str, seconds: float) -> bool:
    """Run this file, or a command's module, as ``count`` ranks; whether they ended well in time."""
    command = [*LAUNCH, "--nproc-per-node", str(count), *arguments]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])}
    environment.setdefault("OMP_NUM_THREADS", "4")
    with subprocess.Popen(command, env=environment, start_new_session=True) as process:
        try:
            return process.wait(seconds) == 0
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return False


def measure(names: list[str], folders: Path, counts: list[int], kinds: list[str], until: float) -> list[dict[str, Any]]:
    """Every workload on every number of ranks."""
    results: list[dict[str, Any]] = []
    alone: dict[tuple[str, str], float] = {}
    for count in counts:
        for kind in kinds:
            more = ["--trl"] if kind == "trl" else []
            work = [str(Path(__file__)), *names, "--rank", str(folders), str(count), *more]
            launch(count, *work, seconds=max(10.0, until - time.monotonic()))
            for name in names:
                files = [folders / f"{kind}-{name}-{count}-{number}.json" for number in range(count)]
                if not all(map(Path.is_file, files)):
                    say(results, {"kind": kind, "workload": name, "ranks": count, "error": "not measured"})
                    continue
                each = [json.loads(file.read_text()) for file in files]
                result = {"kind": kind, "workload": name, "ranks": count, **each[0]}
                result["peak_gib"] = [one["peak_gib"] for one in each]
                if "together_ms" in result:
                    result["together_share"] = round(result["together_ms"] / result["step_ms"], 4)
                if count == 1:
                    alone[kind, name] = result["tokens_s"]
                elif (kind, name) in alone:
                    result["times_one"] = round(result["tokens_s"] / alone[kind, name], 3)
                say(results, result)
    return results


def say(results: list[dict[str, Any]], result: dict[str, Any]) -> None:
    """A result, as it comes."""
    results.append(result)
    print(json.dumps(result), flush=True)


def kills(folders: Path, count: int, wanted: int, until: float) -> list[dict[str, Any]]:
    """Kill a rank in the middle of a run, all runs at once: the others end by themselves, and each run goes on to the
    uninterrupted one's adapter."""
    from hashlib import sha256

    from peers import as_messages, make_folder

    make_folder("tiny", folders / "tiny")
    rng = random.Random(7)
    data = folders / "kills.jsonl"
    rows = [as_messages([rng.randrange(1000) for _ in range(60)]) for _ in range(96)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--max-length", "64", "--micro-batch", "2", "--gradient-accumulation", str(count), "--max-steps", "600",
               "--save-steps", "10", "--eval-share", "0", "--deterministic", "--train-on", "all"]  # fmt: skip

    def command(run: Path) -> list[str]:
        return ["-m", "slimtune", "train", str(folders / "tiny"), str(data), "-o", str(run), *options]

    def killed(number: int) -> dict[str, Any]:
        run, victim = folders / f"killed-{number}", number % count
        process = subprocess.Popen([*LAUNCH, "--nproc-per-node", str(count), *command(run)], start_new_session=True)
        metrics, wait = run / "metrics.jsonl", random.Random(number).uniform(0.0, 1.0)
        while process.poll() is None and not (metrics.exists() and metrics.read_text().count("step_seconds") > 15):
            time.sleep(0.05)
        time.sleep(wait)
        os.kill(_worker(process.pid, victim), signal.SIGKILL)
        began = time.monotonic()
        made = {"kind": "kill", "victim": victim, "ranks": count, "code": process.wait(90)}
        made["ended_s"] = round(time.monotonic() - began, 1)
        left = max(20.0, until - time.monotonic())
        return made | {"resumed": launch(count, "-m", "slimtune", "resume", str(run), seconds=left)}

    def digest(run: Path) -> str:
        file = run / "adapter" / "adapter_model.safetensors"
        return sha256(file.read_bytes()).hexdigest() if file.exists() else "none"

    results: list[dict[str, Any]] = []
    whole = folders / "whole"
    with ThreadPoolExecutor(wanted + 1) as pool:
        uninterrupted = pool.submit(launch, count, *command(whole), seconds=max(20.0, until - time.monotonic()))
        trials = [pool.submit(killed, number) for number in range(wanted)]
        for number, trial in enumerate(trials):
            made = trial.result()
            equal = uninterrupted.result() and digest(folders / f"killed-{number}") == digest(whole)
            say(results, made | {"equal": equal})
    return results


def _worker(agent: int, number: int) -> int:
    """The process of a rank among the children of its agent."""
    import psutil

    for child in psutil.Process(agent).children():
        if child.environ().get("RANK") == str(number):
            return child.pid
    raise ProcessLookupError(number)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("workloads", nargs="*", default=["W1", "W3", "W2"])
    options.add_argument("--ranks", default="1,2")
    options.add_argument("--trl", action="store_true")
    options.add_argument("--kills", type=int, default=0)
    options.add_argument("--seconds", type=float, default=3600.0, help="most that all of it may take")
    options.add_argument("--out", type=Path)
    options.add_argument("--rank", nargs=2, metavar=("FOLDERS", "COUNT"), help=argparse.SUPPRESS)
    chosen = options.parse_args()
    sys.path.insert(0, str(HERE))
    if chosen.rank is not None:
        rank(chosen.workloads, Path(chosen.rank[0]), int(chosen.rank[1]), trl=chosen.trl)
        return
    until = time.monotonic() + chosen.seconds
    from peers import make_folder
    from workloads import WORKLOADS

    with tempfile.TemporaryDirectory() as scratch:
        folders = Path(scratch)
        for size in {WORKLOADS[name].size for name in chosen.workloads}:
            make_folder(size, folders / size)
        counts = [int(count) for count in chosen.ranks.split(",")]
        kinds = ["slimtune", "trl"] if chosen.trl else ["slimtune"]
        results = measure(chosen.workloads, folders, counts, kinds, until)
        if chosen.kills:
            results += kills(folders, max(counts), chosen.kills, until)
    if chosen.out:
        versions = {name: importlib.metadata.version(name) for name in PACKAGES if _installed(name)}
        content = {"date": datetime.date.today().isoformat(), "results": results, "versions": versions}
        chosen.out.write_text(json.dumps(content, indent=1) + "\n")


def _installed(name: str) -> bool:
    try:
        return bool(importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return False


if __name__ == "__main__":
    main()
