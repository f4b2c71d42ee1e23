"""What `slimtune plan` says a run takes beside what its steps took on a card.

    python benchmarks/plan.py OUT.json [CASE...]
    python benchmarks/plan.py --check FILE...

The first measures on this machine's GPU, which nothing else may use: random weights in published shapes, the engine
alone, a few steps each; what was allocated and reserved at most, and what isn't the allocator's, which nvidia-smi shows
besides. The second tells today's forecasts, made without a card, beside steps that were measured before (with as much
RAM as they need). $BUDGET seconds (240) are kept; cases that have no room are left out.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # as the commands do it

import decoders
import torch
from memory import document, free, peaks, steps
from peft import LoraConfig, get_peft_model
from workloads import ATTENTION, SIZES, make_model

from slimtune.base.load import load_base
from slimtune.config import Config
from slimtune.engine import Engine
from slimtune.engine.ram import ram_to_lock
from slimtune.hardware import CARDS, detect
from slimtune.run.environment import library_versions
from slimtune.training.forecast import Forecaster
from tests.training.headers import headers

CUDA, GIB = torch.cuda.is_available(), 2**30
BEGAN, BUDGET = time.perf_counter(), float(os.environ.get("BUDGET", "240"))
PLENTY = 130.0
"""GiB, where no memory is given."""


class Case(NamedTuple):
    """One run."""

    shape: str
    rows: int
    length: int
    memory: float | None = None
    """GiB."""
    targets: str | tuple[str, ...] = "auto"
    r: int = 8
    precision: str = "auto"

    @property
    def name(self) -> str:
        """As the results have it."""
        within = "" if self.memory is None else f" @{self.memory:g}"
        many = f" r{self.r}" if self.targets == "all-linear" else ""
        return f"{self.shape} {self.rows}x{self.length}{many}{' fp8' * (self.precision == 'fp8')}{within}"


CASES = (
    Case("moe", 4, 2048, 3.2), Case("moe", 4, 2048, 5.1), Case("moe", 4, 2048),
    Case("8b", 1, 2048, 4.5, "all-linear", 32), Case("8b", 1, 16384, 10.0, "all-linear", 32),
    Case("8b", 1, 32768, 11.0, "all-linear", 32), Case("8b", 1, 32768, 11.0, "all-linear", 16, "fp8"),
    Case("1.8b", 1, 512, 1.0), Case("1.8b", 2, 512), Case("1.8b", 8, 2048), Case("1.8b", 8, 2048, 3.9),
    Case("7b", 4, 2048, 8.0), Case("7b", 4, 2048), Case("gemma3", 4, 2048, 3.5), Case("gemma3", 4, 2048),
    Case("qwen3.5", 4, 2048, None, ATTENTION),
)  # fmt: skip


def folder_of(case: Case, scratch: Path, *, weights: bool) -> Path:
    """A folder of the shape: of headers alone, or with random weights."""
    import transformers

    folder = scratch / case.shape
    if folder.exists():
        return folder
    if case.shape in SIZES:
        values = SIZES[case.shape if CUDA or not weights else "tiny"]
        config: Any = transformers.Qwen2Config(
            **values, max_position_embeddings=1 << 20, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2
        )
    elif weights:
        decoders.make_folder(folder, case.shape)
        return folder
    else:
        name, options = decoders.SHAPES[case.shape]
        config = getattr(transformers, name)(**options, max_position_embeddings=32768, bos_token_id=1, eos_token_id=2)
    return headers(folder, config)


def base_of(shape: str, folder: Path) -> Any:
    if shape in SIZES:
        return make_model(shape if CUDA else "tiny")
    return load_base(str(folder), detect(), compute_dtype="bf16" if CUDA else "fp32").model


def forecaster_of(case: Case, folder: Path) -> Forecaster:
    targets = case.targets if isinstance(case.targets, str) else list(case.targets)
    return Forecaster(
        Config.make(
            model=str(folder), max_length=case.length, micro_batch=case.rows, pack_tokens=case.rows * case.length,
            targets=targets, lora_r=case.r, train_on="all", gradient_accumulation=1, precision=case.precision,
        )
    )  # fmt: skip


def told(case: Case, folder: Path, ram: int) -> dict[str, Any]:
    """What the plan says, GiB and seconds."""
    card = detect().card if CUDA else CARDS["H200"]
    forecast = forecaster_of(case, folder).forecast(card, int((case.memory or PLENTY) * GIB), ram)
    return {
        "planned": forecast.nbytes / GIB, "planned_shown": forecast.shown_bytes / GIB,
        "planned_ram": forecast.locked_bytes / GIB, "planned_s": forecast.step_seconds,
        "streamed": forecast.streamed_layers, "in_ram": forecast.ram_layers,
    }  # fmt: skip


def measured(case: Case, model: Any, targets: Any) -> dict[str, Any]:
    """What a run's steps take."""
    lora = LoraConfig(r=case.r, lora_alpha=2 * case.r, target_modules=targets, task_type="CAUSAL_LM")
    wrapped = get_peft_model(model, lora).train()
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    free()
    tokens = case.rows * case.length
    engine = Engine(
        wrapped, dtype=torch.bfloat16 if CUDA else torch.float32, tokens=tokens, longest=case.length,
        memory=None if case.memory is None else int(case.memory * GIB), fp8=case.precision == "fp8",
    )  # fmt: skip
    batch = document(tokens, case.shape if case.shape in SIZES and CUDA else "tiny")
    batch["position_ids"] = torch.arange(case.length).repeat(case.rows)[None]
    free()
    seconds, taken = steps(engine, batch, 2 if case.length > 16384 else 4), peaks()
    vacant, total = torch.cuda.mem_get_info() if CUDA else (0, 0)
    context = (total - vacant - torch.cuda.memory_reserved()) / GIB if CUDA else 0.0
    allocated, reserved = (taken.get(f"{name}_gib", 1.0) for name in ("allocated", "reserved"))
    planned, plan = sum(engine.parts.values()) / GIB, engine.plan
    del engine
    wrapped.unload()
    return {
        "planned_engine": planned, "allocated": allocated, "reserved": reserved, "context": context,
        "shown": reserved + context, "step_s": seconds, "ram": plan.locked_bytes / GIB, "sparing": plan.sparing,
        "recorded": not (plan.in_ram or plan.streamed), "keep": "".join(str(int(level)) for level in plan.keep),
        "part_tokens": plan.part_tokens, "mlp_tokens": plan.mlp_tokens, "head_tokens": plan.head_tokens,
    }  # fmt: skip


def errors(row: dict[str, Any]) -> dict[str, float]:
    return {
        "error_allocated": row["planned"] / row["allocated"] - 1,
        "error_shown": row["planned_shown"] / row["shown"] - 1,
    }


def say(row: dict[str, Any]) -> dict[str, Any]:
    row = {key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()}
    print(json.dumps(row), flush=True)
    return row


def check(files: list[str], scratch: Path) -> None:
    cases = {case.name: case for case in CASES}
    for file in files:
        for row in json.loads(Path(file).read_text(encoding="utf-8"))["results"]:
            case = cases.get(row.get("case", "").replace("@1.0", "@1"))
            if case is not None and "shown" in row:
                now = told(case, folder_of(case, scratch, weights=False), 1 << 40)
                say({"case": case.name, "measured": row["shown"], "planned_shown": now["planned_shown"],
                     **errors({**row, **now})})  # fmt: skip


def main() -> None:
    arguments = sys.argv[1:]
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        if arguments[:1] == ["--check"]:
            check(arguments[1:], scratch)
            return
        out, wanted, rows = Path(arguments[0]), set(arguments[1:]), []
        model, made = None, ""
        for case in (case for case in CASES if not wanted or case.name in wanted):
            if time.perf_counter() - BEGAN > BUDGET - (30 if case.shape != made else 15):
                say({"case": case.name, "left_out": True})
                continue
            folder = folder_of(case, scratch, weights=True)
            if made != case.shape:
                model = None
                free()
                model, made = base_of(case.shape, folder), case.shape
            if not CUDA:
                case = case._replace(length=64, memory=None, precision="auto")
            forecast = told(case, folder, ram_to_lock())
            all_of_it = case.targets == "all-linear"
            targets: Any = case.targets if all_of_it else list(forecaster_of(case, folder).targets)
            row = {"case": case.name, **forecast, **measured(case, model, targets)}
            rows.append(say({**row, **errors(row), "after_s": time.perf_counter() - BEGAN}))
            gpu = torch.cuda.get_device_name() if CUDA else "cpu"
            facts: dict[str, Any] = {"date": date.today().isoformat(), "gpu": gpu, "versions": library_versions()}
            facts |= {"what": "the plan beside measured steps, GiB", "results": rows}
            out.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
