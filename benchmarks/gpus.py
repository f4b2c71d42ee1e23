"""Times slimtune's trainer on several cards of one machine: python benchmarks/gpus.py [W1 W2 W3 W4] [--ranks 1,2,4,8]

The unit is one card of this machine: every card trains alone, all at once, so that they are as warm as they are
together; ``times_one`` is of their mean, and ``times_slowest`` of the slowest, whose pace steps of several have. For
each other number of ranks one torchrun trains every workload by ``slimtune train``'s own recipe, a step's micro-batches
being as many as the ranks: each card has what one card alone has. Tokens a second are the median over the steps after
the first, from one log line to the next. The share of a step that the ranks come together in is by CUDA events around
it, waiting for the slower one included; the least of the ranks' is what it takes itself. ``sum_ms`` is the gradient's
sum alone, repeated. Every step compares the ranks' adapters, and the end their bytes.

``--gaps`` adds what the device waits for in ten steps of W2, by the kernels around it. ``--kills N`` kills a rank in
the middle of N runs, ``--at-once`` of them beside each other, and resumes on all ranks, every other time on half.
``--streamed TOKENS`` trains 20 layers of a 70B as all 80 are planned within 12 GiB, fetched by all cards from one
host's RAM. ``--kinds slimtune,trl`` adds TRL under DDP (W1, W2 unpacked; W3 packed). One JSON line a result; ``--out``
writes them with machine and versions.
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
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import nullcontext
from hashlib import sha256
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
STEPS = {"W2": 80, "tiny": 8, "tiny-chats": 8}
USUAL_STEPS, WARM_UP = 18, 6
GAPS_FROM, GAPS_STEPS = 60, 10
LAYERS, OF_LAYERS, WITHIN_GIB = 20, 80, 12.0
LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
PACKAGES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "triton")


class _Enough(Exception):
    """The steps are timed: the results needn't be written."""


# -- one rank ----------------------------------------------------------------------------------------------------------


def rank(names: list[str], folders: Path, count: int, kind: str) -> None:
    """Train each workload as one of ``count`` ranks; the figures go to files in ``folders``."""
    from slimtune.ranks.place import take_card, this_place

    place = this_place()
    if kind != "trl":  # accelerate chooses among all cards by LOCAL_RANK
        take_card(place)  # before torch starts CUDA
    number = int(os.environ.get("CARD", place.rank))
    for name in names:
        result = {"trl": _trl, "slimtune": _slimtune, "streamed": _streamed}[kind](name, folders, count, number)
        (folders / f"{kind}-{name}-{count}-{number}.json").write_text(json.dumps(result))


def rows_of(name: str, count: int) -> list[list[int]]:
    """Token ids of each document; enough that every step of every rank has a full micro-batch."""
    from workloads import WORKLOADS

    workload, steps = WORKLOADS[name], STEPS.get(name, USUAL_STEPS)
    rng = random.Random(1)
    lengths = workload.document_lengths(steps * count * (8 if workload.chats else 1))
    return [[rng.randrange(6, 1000) for _ in range(length)] for length in lengths]


def _slimtune(name: str, folders: Path, count: int, number: int) -> dict[str, Any]:
    import torch
    from gaps import watched
    from peers import as_messages
    from workloads import WORKLOADS

    from slimtune.config import Config
    from slimtune.recipes import finetune
    from slimtune.training.ranked import RankedTrainer

    workload, steps = WORKLOADS[name], STEPS.get(name, USUAL_STEPS)
    data = folders / f"{name}-{count}-{number}.jsonl"
    data.write_text("".join(json.dumps(as_messages(row)) + "\n" for row in rows_of(name, count)))
    data.rename(data := folders / f"{name}-{count}.jsonl")  # the same bytes from each rank
    run = folders / f"run-{name}-{count}{f'-{number}' if count == 1 else ''}"
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
    began, looked = time.perf_counter(), {}
    try:
        with (
            watched(GAPS_FROM, GAPS_STEPS) if os.environ.get("GAPS") and steps > GAPS_FROM else nullcontext() as looked
        ):
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
    if looked:
        made["gaps"] = looked
    if number == 0 or count == 1:
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


def _trl(name: str, folders: Path, count: int, number: int) -> dict[str, Any]:
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
    local = 0 if count == 1 else int(os.environ["LOCAL_RANK"])
    torch.cuda.set_device(local)
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=four_bits, dtype=torch.bfloat16, device_map={"": local}
    )
    times: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            torch.cuda.synchronize()
            times.append(time.perf_counter())

    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=str(folders / f"trl-{number}"), per_device_train_batch_size=workload.rows, max_steps=steps,
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


def _streamed(name: str, folders: Path, count: int, number: int) -> dict[str, Any]:
    """Some layers of a 70B whose weights come from the RAM that the ranks of this host have in common."""
    del folders
    import torch
    from memory import GIB, document, free, lightly_wrapped, part_of, peaks

    from slimtune.engine import Engine, FusedAdamW8bit
    from slimtune.hardware import detect
    from slimtune.ranks.group import together
    from slimtune.ranks.host import here

    cuda, tokens = torch.cuda.is_available(), int(name)
    size, layers, whole = ("70b", LAYERS, OF_LAYERS) if cuda else ("tiny", 4, 8)
    with together(detect, 300.0) as ranks:
        model = lightly_wrapped(size, layers)
        free()
        began = time.perf_counter()
        with part_of(whole, (WITHIN_GIB - 0.5) * GIB if cuda else 0.0, 1 << 42):
            engine = Engine(model, dtype=torch.bfloat16 if cuda else torch.float32, tokens=tokens)
        made = {"engine_made_s": round(time.perf_counter() - began, 1), "sharing": here().sharing}
        free()
        optimizer, batch, times = FusedAdamW8bit(engine.flat, lr=1e-4), document(tokens, size), []
        for _ in range(3 if tokens > 8192 else 6):
            began = time.perf_counter()
            engine.forward_backward(batch, count * (tokens - 1))
            ranks.sum_(engine.flat.grad)
            optimizer.clip_(1.0)
            optimizer.step()
            optimizer.zero_grad()
            if cuda:
                torch.cuda.synchronize()
            times.append(time.perf_counter() - began)
        digest = float(engine.flat.data.double().sum())
        ranks.check_same({"adapter": digest}, "All ranks apply the same gradient.")
        ranks.told(None)
    step = _median(times[1:])
    made |= {"streamed": len(engine.plan.streamed), "weights_gib": round(engine.plan.streamed_bytes / GIB, 2)}
    return made | {"step_ms": round(step * 1e3, 1), "tokens_s": round(count * tokens / step), "ram_gib": _common_gib(),
                   "peak_gib": round(peaks().get("allocated_gib", 0.0), 2), "card": number}  # fmt: skip


def _common_gib() -> list[float]:
    """GiB of RAM that this process sees with others, and its part of it (Linux' Rss and Pss)."""
    sums, counts = {"Rss:": 0.0, "Pss:": 0.0}, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        words = line.split()
        if len(words) > 4 and "-" in words[0]:
            counts = "memfd:slimtune" in line
        elif counts and words[0] in sums:
            sums[words[0]] += int(words[1]) / 2**20
    return [round(value, 2) for value in sums.values()]


# -- all of them -------------------------------------------------------------------------------------------------------


def environment(**more: str) -> dict[str, str]:
    """What a process of this file is started with."""
    paths = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
    return {"OMP_NUM_THREADS": "4"} | os.environ | {"PYTHONPATH": paths} | more


def run(commands: list[tuple[list[str], dict[str, str]]], seconds: float) -> bool:
    """Run commands at once; whether all ended well in time. None is left running."""
    processes = [subprocess.Popen(*each[:1], env=each[1], start_new_session=True) for each in commands]
    until = time.monotonic() + seconds
    codes: list[int | None] = []
    for process in processes:
        try:
            codes.append(process.wait(max(0.1, until - time.monotonic())))
        except subprocess.TimeoutExpired:
            codes.append(None)
            _end(process)
    return not any(code != 0 for code in codes)


def _end(process: subprocess.Popen[bytes]) -> None:
    """A launcher passes a request to end on to its ranks, which are in sessions of their own."""
    process.terminate()
    try:
        process.wait(15)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def measure(names: list[str], folders: Path, counts: list[int], kind: str, until: float) -> list[dict[str, Any]]:
    """Every workload on one card, all cards at once, and on other numbers of them."""
    from slimtune.ranks.place import cards_here

    results: list[dict[str, Any]] = []
    units: dict[str, list[float]] = {}
    for count in counts:
        work = [str(Path(__file__)), *names, "--rank", str(folders), str(count), kind]
        if count > 1:
            commands = [([*LAUNCH, "--nproc-per-node", str(count), *work], environment())]
        else:  # each sees one card, and is told of no other
            cards = (cards_here() or [""] * max(counts))[: max(counts)]
            each_sees = [environment(CARD=str(at), CUDA_VISIBLE_DEVICES=card) for at, card in enumerate(cards)]
            commands = [([sys.executable, *work], each) for each in each_sees]
        run(commands, max(10.0, until - time.monotonic()))
        for name in names:
            numbers = range(count if count > 1 else max(counts))
            files = [folders / f"{kind}-{name}-{count}-{number}.json" for number in numbers]
            if not all(map(Path.is_file, files)):
                say(results, {"kind": kind, "workload": name, "ranks": count, "error": "not measured"})
                continue
            each = [json.loads(file.read_text()) for file in files]
            result = {"kind": kind, "workload": name, "ranks": count, **each[0]}
            for key in ("peak_gib", "together_ms", "ram_gib", "engine_made_s", "gaps"):
                if key in each[0]:
                    result[key] = [one.get(key) for one in each]
            if count == 1:
                units[name] = [one["tokens_s"] for one in each]
                result |= {"tokens_s": round(statistics.mean(units[name])), "each_tokens_s": units[name]}
            elif "together_ms" in result:
                own, step = min(result["together_ms"]), result["step_ms"]
                result |= {
                    "together_share": round(own / step, 4),
                    "waited_share": round(max(result["together_ms"]) / step, 4),
                }
            if count > 1 and name in units:
                result["times_one"] = round(result["tokens_s"] / statistics.mean(units[name]), 3)
                result["times_slowest"] = round(result["tokens_s"] / min(units[name]), 3)
            say(results, result)
    return results


def say(results: list[dict[str, Any]], result: dict[str, Any]) -> None:
    """A result, as it comes."""
    results.append(result)
    print(json.dumps(result), flush=True)


def kills(folders: Path, count: int, wanted: int, at_once: int, until: float) -> list[dict[str, Any]]:
    """Kill a rank in the middle of a run, several runs beside each other: the other ranks end by themselves, and the
    run goes on to the uninterrupted one's adapter, on as many ranks or, every other time, on half of them.

    A card has ranks of several runs, and no two of one: it is starting that takes the time.
    """
    from peers import as_messages, make_folder

    from slimtune.ranks.place import cards_here

    make_folder("tiny", folders / "tiny")
    rng, cards = random.Random(7), cards_here()
    data = folders / "kills.jsonl"
    rows = [as_messages([rng.randrange(1000) for _ in range(60)]) for _ in range(96)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--max-length", "64", "--micro-batch", "2", "--gradient-accumulation", str(count), "--save-steps", "10",
               "--max-steps", "100", "--eval-share", "0", "--deterministic", "--train-on", "all"]  # fmt: skip

    def start(name: str, ranks: int, group: int, *words: str) -> subprocess.Popen[bytes]:
        """``slimtune`` on the ``group``-th of as many cards as a run takes."""
        groups = max(1, len(cards) // count)
        own = ",".join(cards[group % groups * count :][:ranks])
        spread = ["--gpus", str(ranks)] if ranks > 1 else []
        with (folders / f"{name}.log").open("a") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "slimtune", *words, *spread], stdout=log, stderr=log, start_new_session=True,
                env=environment(**({"CUDA_VISIBLE_DEVICES": own} if cards else {})),
            )  # fmt: skip

    def train(name: str, group: int) -> subprocess.Popen[bytes]:
        words = ("train", str(folders / "tiny"), str(data), "-o", str(folders / name), *options)
        return start(name, count, group, *words)

    def killed(number: int) -> dict[str, Any]:
        name, victim, began = f"killed-{number}", number // 2 % count, time.monotonic()
        path, made = folders / name, {"kind": "kill", "number": number, "victim": victim, "ranks": count}
        chance = random.Random(number)
        steps = chance.randrange(5, 50)
        with train(name, number) as process:
            while process.poll() is None and _steps(path) < steps:
                if time.monotonic() > until:
                    _end(process)
                time.sleep(0.02)
            if process.poll() is None:
                time.sleep(chance.uniform(0.0, 0.1))
                made["at_step"] = _steps(path)
                os.kill(_worker(process.pid, victim), signal.SIGKILL)
                killed_at = time.monotonic()
                made["started_s"] = round(killed_at - began, 1)
                made["code"] = _ended(process, until)
                made["ended_s"] = round(time.monotonic() - killed_at, 1)
        made["resumed_on"] = on = count // 2 if number % 2 else count
        resumed_at = time.monotonic()
        with start(name, on, number, "resume", str(path)) as process:
            made["resume_code"] = _ended(process, until)
        made |= {"resume_s": round(time.monotonic() - resumed_at, 1), "steps": _steps(path)}
        made["equal"] = whole.result() == 0 and digest(name) == digest("whole") != "none"
        if made.get("code") != 75 or made["resume_code"] or not made["equal"]:
            made["log"] = (folders / f"{name}.log").read_text()[-1500:]
        return made

    def digest(name: str) -> str:
        file = folders / name / "adapter" / "adapter_model.safetensors"
        return sha256(file.read_bytes()).hexdigest() if file.exists() else "none"

    results: list[dict[str, Any]] = []
    with ThreadPoolExecutor(at_once + 1) as pool:
        whole = pool.submit(lambda: _ended(train("whole", 0), until))
        for each in as_completed([pool.submit(killed, number) for number in range(wanted)]):
            say(results, each.result())
    if whole.result() != 0:
        say(results, {"kind": "kill", "error": (folders / "whole.log").read_text()[-1500:]})
    return results


def _ended(process: subprocess.Popen[bytes], until: float) -> int | None:
    """A process's exit code; none if it had to be ended, as the time was over."""
    try:
        return process.wait(max(0.1, until - time.monotonic()))
    except subprocess.TimeoutExpired:
        _end(process)
        return None


def _steps(path: Path) -> int:
    """The last step that a run has told of."""
    metrics = path / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True) if metrics.exists() else []
    told = [json.loads(line) for line in lines if line.endswith("\n")]
    return max((line["step"] for line in told if "loss" in line), default=0)


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
    options.add_argument("--kinds", default="slimtune", help="slimtune, trl or both, with a comma")
    options.add_argument("--gaps", action="store_true")
    options.add_argument("--kills", type=int, default=0)
    options.add_argument("--at-once", type=int, default=10, help="runs of --kills beside each other")
    options.add_argument("--streamed", metavar="TOKENS", action="append", default=[])
    options.add_argument("--seconds", type=float, default=3600.0, help="most that all of it may take")
    options.add_argument("--out", type=Path)
    options.add_argument("--rank", nargs=3, metavar=("FOLDERS", "COUNT", "KIND"), help=argparse.SUPPRESS)
    chosen = options.parse_args()
    sys.path.insert(0, str(HERE))
    if chosen.rank is not None:
        folders, count, kind = chosen.rank
        rank(chosen.workloads, Path(folders), int(count), kind)
        return
    until = time.monotonic() + chosen.seconds
    from peers import make_folder
    from workloads import WORKLOADS

    if chosen.gaps:
        os.environ["GAPS"] = "1"
    names = [name for name in chosen.workloads if name != "none"]  # for the other results alone
    with tempfile.TemporaryDirectory() as scratch:
        folders = Path(scratch)
        os.environ["XDG_CACHE_HOME"] = str(folders / "cache")  # what is kept of these bases goes with them
        for size in {WORKLOADS[name].size for name in names}:
            make_folder(size, folders / size)
        counts = [int(count) for count in chosen.ranks.split(",")]
        results: list[dict[str, Any]] = []
        for kind in chosen.kinds.split(",") if names else ():
            results += measure(names, folders, counts, kind, until)
        if chosen.streamed:
            results += measure(chosen.streamed, folders, counts, "streamed", until)
        if chosen.kills:
            results += kills(folders, max(counts), chosen.kills, chosen.at_once, until)
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
