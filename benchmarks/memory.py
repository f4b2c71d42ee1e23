"""What little memory takes: layers' inputs and weights in RAM beside the same in the GPU's memory.

    python benchmarks/memory.py [CASE...]

An 8B's shape in NF4, every linear layer adapted with r=32, one document a step, random weights and tokens; the engine
alone. Each case prints a JSON line and is left out where $BUDGET (seconds, 600) has no room for it:

- ``equal``: gradients with inputs and weights in RAM and without, deterministic kernels, to the bit; without, twice;
  and with copies that wait for nothing, which must show.
- ``streamed-SIZE-TOKENS-GIB``: 20 layers of a 70B (r=8 on q, k, v, o), computed as all 80 of them are planned for an
  80 GiB card with the weights resident, and for GIB with them in RAM: tokens a second of both, and peaks.
- ``least-SIZE-TOKENS-GIB``: a whole model (r=8 on q, k, v, o) with the allocator capped at GIB.
- ``price-TOKENS``: eight layers that keep their inputs alone, as they are, sparing, in RAM, and what attention gave in
  RAM too: tokens a second, peaks.
- ``fits-TOKENS-GIB``: all 32 layers with the allocator capped at GIB: plan, tokens a second, peaks by phase.

With $OUT set, the lines are written to memory.json there too.
"""

from __future__ import annotations

import gc
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts; kernels that repeat need it
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # as the commands do it

import torch
from torch import Tensor, nn
from workloads import SIZES, Workload, add_lora, make_model

from slimtune.engine import Engine, FusedAdamW8bit
from slimtune.engine import engine as engine_module
from slimtune.engine.blocks import Keep, Memory
from slimtune.engine.memory import MemoryPlan, plan_memory
from slimtune.engine.offload import CopiesBeside

CUDA = torch.cuda.is_available()
DEFAULT = (
    "equal", "streamed-70b-16384-12", "streamed-70b-2048-12", "least-1.8b-512-1.5", "least-8b-2048-5", "price-16384",
    "price-65536", "fits-65536-13.8", "fits-131072-24",
)  # fmt: skip
GIB = 2**30
BEGAN, BUDGET = time.perf_counter(), float(os.environ.get("BUDGET", "600"))
SIZE = "8b" if CUDA else "tiny"
DTYPE = torch.bfloat16 if CUDA else torch.float32
LINES: list[dict[str, Any]] = []


def say(case: str, **what: Any) -> None:
    rounded = {key: round(value, 4) if isinstance(value, float) else value for key, value in what.items()}
    LINES.append({"case": case, **rounded, "after_s": round(time.perf_counter() - BEGAN, 1)})
    print(json.dumps(LINES[-1]), flush=True)


def left() -> float:
    return BUDGET - (time.perf_counter() - BEGAN)


def wrapped(layers: int) -> nn.Module:
    workload = Workload("document", SIZE, 1, 1, targets="all-linear", r=32, dropout=0.0)
    return add_lora(make_model(SIZE, layers=layers), workload).train()


def lightly_wrapped(size: str, layers: int | None) -> nn.Module:
    return add_lora(make_model(size, layers=layers), Workload("document", size, 1, 1, dropout=0.0)).train()


def document(tokens: int, size: str = SIZE) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, SIZES[size]["vocab_size"], (1, tokens), generator=generator)
    return {"input_ids": ids, "labels": ids, "position_ids": torch.arange(tokens)[None]}


@contextmanager
def plans(*, attended: bool = False, **changes: Any) -> Iterator[None]:
    """Within this, every plan has these values instead of its own; what attention gave is in RAM too, if asked for."""

    def changed(layers: Any, *args: Any, **options: Any) -> MemoryPlan:
        plan = replace(plan_memory(layers, *args, **options), **changes)
        if not attended:
            return plan
        memory = Memory(plan.part_tokens, plan.mlp_tokens, options["ways"], plan.padded_room, plan.sparing)
        sizes = tuple(layers[index].kept_bytes(memory, Keep.ATTENDED) for index in plan.in_ram)
        keep = tuple(Keep.ATTENDED if index in plan.in_ram else level for index, level in enumerate(plan.keep))
        return replace(plan, ram_sizes=sizes, keep=keep)

    with mock.patch.object(engine_module, "plan_memory", changed):
        yield


MEANS = ((False, False, False), (True, False, False), (True, True, False), (True, True, True))
"""Sparing or not, inputs in RAM or not, what attention gave too or not."""
NAMES = dict(zip(MEANS, ("as they are", "sparing", "sparing, in RAM", "what attention gave too"), strict=True))


def least(layers: int, tokens: int, sparing: bool, ram: bool) -> dict[str, Any]:
    """The parts of a plan that keeps inputs alone."""
    away = tuple(range(layers - 1)) if ram else ()
    size = tokens * SIZES[SIZE]["hidden_size"] * DTYPE.itemsize
    return {
        "keep": (Keep.INPUT,) * layers, "kept_weights": 0, "mlp_tokens": min(tokens, 8192), "head_tokens": 1024,
        "in_ram": away, "ram_sizes": (size,) * len(away), "sparing": sparing,
    }  # fmt: skip


def free() -> None:
    gc.collect()
    if CUDA:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peaks() -> dict[str, float]:
    if not CUDA:
        return {}
    return {
        "allocated_gib": torch.cuda.max_memory_allocated() / GIB,
        "reserved_gib": torch.cuda.max_memory_reserved() / GIB,
    }


def steps(engine: Engine, batch: dict[str, Tensor], count: int) -> float:
    """Seconds of the fastest of ``count`` whole steps."""
    optimizer, times = FusedAdamW8bit(engine.flat, lr=1e-4), []
    for _ in range(count):
        begin = time.perf_counter()
        engine.forward_backward(batch, batch["labels"].numel() - 1)
        optimizer.clip_(1.0)
        optimizer.step()
        optimizer.zero_grad()
        if CUDA:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return min(times)


def begin_at_once(self: CopiesBeside, pairs: Sequence[tuple[Tensor, Tensor]]) -> torch.cuda.Event:
    """What is wrong: a copy that doesn't wait for who still reads its target, or writes its source."""
    with torch.cuda.stream(self._stream):
        for target, source in pairs:
            target.copy_(source, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record(self._stream)
    return copied


def equal() -> None:
    layers, tokens = (6, 8192) if CUDA else (5, 128)
    model = wrapped(layers)

    def gradients(sparing: bool, ram: bool, streamed: bool = False, *, attended: bool = False) -> Tensor:
        away: dict[str, Any] = {"streamed": tuple(range(layers))} if streamed else {}
        away["attended"] = attended
        with plans(**least(layers, tokens, sparing, ram), **away):
            engine = Engine(model, dtype=DTYPE, tokens=tokens, graphs=False)
        for _ in range(2):  # the second one writes to places that the first one's were read from
            engine.forward_backward(document(tokens), tokens)
        found = engine.flat.grad.cpu()
        del engine
        free()
        return found

    torch.use_deterministic_algorithms(True)
    plain, sparing, again = gradients(False, False), gradients(True, False), gradients(True, False)
    away, streamed, both = gradients(True, True), gradients(True, False, True), gradients(True, True, True)
    attended = gradients(True, True, True, attended=True)
    with mock.patch.object(CopiesBeside, "begin", begin_at_once):
        broken = gradients(True, False, True) if CUDA else plain.neg()
    torch.use_deterministic_algorithms(False)
    same = {"repeats": again, "inputs_in_ram": away, "weights_in_ram": streamed, "both": both, "all": attended}
    equal_to = {name: torch.equal(sparing, found) for name, found in same.items()}
    shows = not torch.equal(sparing, broken)
    say(
        "equal", ok=all(equal_to.values()) and shows, **equal_to, too_early_shows=shows,
        sparing_error=float((sparing - plain).norm() / plain.norm()), norm=float(plain.norm()),
    )  # fmt: skip


def cut_to(count: int, plan: MemoryPlan, stored: Sequence[int]) -> MemoryPlan:
    """A whole model's plan for so many layers like its own, of so many bytes as they are stored."""
    times, sizes = len(plan.keep) // count, dict(zip(plan.in_ram, plan.ram_sizes, strict=True))
    streamed = tuple(index for index in range(count) if index * times in plan.streamed)
    in_ram = tuple(index for index in range(count - 1) if index * times in sizes)
    return replace(
        plan, keep=plan.keep[::times], kept_weights=plan.kept_weights // times, in_ram=in_ram, streamed=streamed,
        ram_sizes=tuple(sizes[index * times] for index in in_ram),
        streamed_bytes=sum(stored[index] for index in streamed),
        spared_bytes=sum(stored[index] for index in streamed) - (2 * max(stored) if streamed else 0),
    )  # fmt: skip


@contextmanager
def part_of(whole: int, budget: float, ram: int) -> Iterator[dict[str, MemoryPlan]]:
    """Within this, an engine of a few layers computes as those of ``whole`` like them would, within a budget."""
    made: dict[str, MemoryPlan] = {}

    def cut(layers: Any, tokens: int, vocabulary: int, _: float, **options: Any) -> MemoryPlan:
        count, times, stored = len(layers), whole // len(layers), list(options["stored"])
        device = torch.cuda.memory_allocated() if CUDA else sum(stored)
        room = budget - device - (times - 1) * sum(stored)
        options |= {"stored": stored * times, "ram": ram}
        plan = made["whole"] = plan_memory(list(layers) * times, tokens, vocabulary, room, **options)
        made["room"] = room  # type: ignore[assignment]
        return cut_to(count, plan, stored)

    with mock.patch.object(engine_module, "plan_memory", cut):
        yield made


def streamed(case: str, size: str, tokens: int, gib: float) -> None:
    layers, whole = (20, 80) if CUDA else (4, 8)
    size = size if CUDA else "tiny"
    model, rates = lightly_wrapped(size, layers), []
    # Of a card CUDA takes half a GiB.
    budgets = (79.5, gib - 0.5) if CUDA else (79.5, 0.0)
    for what, budget, ram in zip(("resident", "streamed"), budgets, (0, 1 << 42), strict=True):
        free()
        with part_of(whole, budget * GIB, ram) as made:
            begin = time.perf_counter()
            engine = Engine(model, dtype=DTYPE, tokens=tokens)
            took = time.perf_counter() - begin
        free()
        plan, count = made["whole"], 3 if tokens > 8192 else 8
        seconds = steps(engine, document(tokens, size), count)
        rates.append(tokens / seconds)
        say(
            case, what=what, layers=layers, whole=whole, fits=plan.nbytes <= made["room"], streamed=len(plan.streamed),
            in_ram=len(plan.in_ram), sparing=plan.sparing, keep="".join(str(int(level)) for level in plan.keep),
            kept_weights=plan.kept_weights, part_tokens=plan.part_tokens, mlp_tokens=plan.mlp_tokens,
            ram_gib=(plan.streamed_bytes + plan.ram_bytes) / GIB, tokens_s=rates[-1], step_s=seconds,
            engine_made_s=took, **peaks(),
        )  # fmt: skip
        del engine
    say(case, what="share", of_resident=rates[1] / rates[0])


def least_memory(case: str, size: str, tokens: int, gib: float) -> None:
    size = size if CUDA else "tiny"
    model = lightly_wrapped(size, None)
    free()
    base = torch.cuda.memory_allocated() if CUDA else 0
    engine = Engine(model, dtype=DTYPE, tokens=tokens, memory=int((gib - 0.5 * CUDA) * GIB), ram=1 << 42)
    free()
    planned, plan = sum(engine.parts.values()) / GIB, engine.plan
    seconds = steps(engine, document(tokens, size), 5)
    taken = peaks()
    context = 0.0
    if CUDA:
        vacant, total = torch.cuda.mem_get_info()
        context = (total - vacant - torch.cuda.memory_reserved()) / GIB
    say(
        case, ok=engine.least_memory is None or not CUDA, base_gib=base / GIB, planned_gib=planned,
        error=planned / taken["allocated_gib"] - 1 if CUDA else 0.0, streamed=len(plan.streamed),
        in_ram=len(plan.in_ram), mlp_tokens=plan.mlp_tokens, head_tokens=plan.head_tokens, tokens_s=tokens / seconds,
        step_s=seconds, context_gib=context, **taken,
    )  # fmt: skip


def price(case: str, tokens: int) -> None:
    layers, rates = (8 if CUDA else 2), []
    model = wrapped(layers)
    for *means, attended in MEANS:
        free()
        with plans(**least(layers, tokens, *means), attended=attended):
            begin = time.perf_counter()
            engine = Engine(model, dtype=DTYPE, tokens=tokens, graphs=False)
            made = time.perf_counter() - begin
        seconds = steps(engine, document(tokens), 2 if tokens > 16384 else 4)
        rates.append(tokens / seconds)
        say(
            case, what=NAMES[*means, attended], layers=layers, tokens_s=rates[-1], step_s=seconds, engine_made_s=made,
            pinned_gib=engine.plan.ram_bytes / GIB, **peaks(),
        )  # fmt: skip
        del engine
    say(
        case, what="price", price_of_sparing=1 - rates[1] / rates[0], price_of_ram=1 - rates[2] / rates[1],
        gain_by_attention=rates[3] / rates[2] - 1,
    )  # fmt: skip


def fits(case: str, tokens: int, gib: float) -> None:
    layers = 32 if CUDA else 2
    free()
    try:
        model = wrapped(layers)
        free()
        if CUDA:
            total = torch.cuda.get_device_properties(0).total_memory
            torch.cuda.set_per_process_memory_fraction(gib * GIB / total)
        base = torch.cuda.memory_allocated() if CUDA else 0
        begin = time.perf_counter()
        engine = Engine(model, dtype=DTYPE, tokens=tokens, memory=int(gib * GIB), graphs=False)
        plan, made = engine.plan, time.perf_counter() - begin
        planned = (base if engine.least_memory is None else engine.least_memory) / GIB
        say(
            case, what="planned", base_gib=base / GIB,
            planned_gib={part: round(size / GIB, 3) for part, size in engine.parts.items()},
            least_gib=planned, in_ram=len(plan.in_ram), pinned_gib=plan.ram_bytes / GIB,
            mlp_tokens=plan.mlp_tokens, head_tokens=plan.head_tokens,
            keep="".join(str(int(level)) for level in plan.keep), engine_made_s=made, used_gib=engine._used() / GIB,
        )  # fmt: skip
        said = sum(engine.parts.values()) / GIB
        phases = _phases(engine) if CUDA else {}
        seconds = steps(engine, document(tokens), 2 if tokens <= 65536 else 1)
        taken = peaks()
        most = max(phases.get("most", 0.0), taken.get("allocated_gib", 0.0))
        context = 0.0
        if CUDA:
            vacant, total = torch.cuda.mem_get_info()
            context = (total - vacant - torch.cuda.memory_reserved()) / GIB
        say(
            case, what="measured", ok=True, tokens_s=tokens / seconds, step_s=seconds, planned_all_gib=said,
            most_allocated_gib=most, error=said / most - 1 if most else 0.0, phases_gib=phases, context_gib=context,
            **taken,
        )  # fmt: skip
    except torch.OutOfMemoryError as error:
        say(case, ok=False, error=str(error)[:300], **peaks())
        if CUDA:
            segments = torch.cuda.memory_snapshot()
            say(
                case, what="held", segments=len(segments),
                growing=sum(1 for segment in segments if segment["is_expandable"]),
                free_in_segments_gib=sum(s["total_size"] - s["active_size"] for s in segments) / GIB,
            )  # fmt: skip
    finally:
        if CUDA:
            torch.cuda.set_per_process_memory_fraction(1.0)


def _phases(engine: Engine) -> dict[str, float]:
    """The most that was allocated in each part of a step, filled as it runs."""
    found: dict[str, float] = {}

    def watch(owner: Any, name: str, phase: str) -> None:
        inner = getattr(owner, name)

        def watched(*args: Any, **options: Any) -> Any:
            torch.cuda.synchronize()
            before = torch.cuda.max_memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            result = inner(*args, **options)
            found[phase] = round(max(found.get(phase, 0.0), torch.cuda.max_memory_allocated() / GIB), 3)
            found["most"] = max(found.get("most", 0.0), before / GIB, found[phase])
            return result

        setattr(owner, name, watched)

    watch(engine, "_forward", "forward")
    watch(engine, "_head_and_loss", "head")
    watch(engine, "_backward", "backward")
    return found


def main() -> None:
    for case in sys.argv[1:] or DEFAULT:
        name, *numbers = case.split("-")
        tokens = int(next((number for number in numbers if number.isdigit()), 0))
        tokens = tokens if CUDA else min(tokens, 256)
        # A step of 65,536 tokens of all layers takes about 14 s on an H100, of twice as many 48.
        step = 14 * (tokens / 65536) ** 1.8
        needs = {
            "equal": 20.0,
            "streamed": 45 if tokens > 8192 else 25,
            "least": 25.0,
            "price": 8 + 8 * step / 4,
            "fits": 10 + step * (2 if tokens <= 65536 else 1),
        }
        if left() < needs[name]:
            say(case, left_out=f"{left():.0f} s left, needs about {math.ceil(needs[name])}")
            continue
        if name in ("streamed", "least"):
            {"streamed": streamed, "least": least_memory}[name](case, numbers[0], tokens, float(numbers[2]))
        elif name == "equal":
            equal()
        elif name == "price":
            price(case, tokens)
        else:
            fits(case, tokens, float(numbers[1]))
        free()
    if "OUT" in os.environ:
        header = {"gpu": torch.cuda.get_device_name() if CUDA else "cpu", "torch": torch.__version__}
        (Path(os.environ["OUT"]) / "memory.json").write_text(json.dumps({**header, "results": LINES}, indent=1))
    failed = [line["case"] for line in LINES if line.get("ok") is False]
    print(f"FAIL {failed}" if failed else "PASS", flush=True)
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
