"""Shows that the fused engine trains the same: python benchmarks/parity.py

gradients: every LoRA gradient of a four-layer model of the 1.8B shape (NF4, double quantisation), fused and unfused,
against the unfused model in fp32, document by document: the fused fp32 engine within 1e-4, the fused bf16 engine no
further than 1.2 times the unfused bf16 model. budget: everything kept against everything computed again. replays:
packs of other lengths through one recorded graph against the same packs unrecorded, by each way to compute attention;
``efficient`` is a T4's. Prints JSON lines; with $OUT set, writes them there too.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from workloads import WORKLOADS, Workload, add_lora, make_model

from slimtune.engine import Engine
from slimtune.engine.attention import Way
from slimtune.engine.decoder import Keep

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"


def batch_of(lengths: list[int], vocabulary: int, seed: int = 7) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, vocabulary, (1, sum(lengths)), generator=generator)
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    labels = ids.clone()
    labels[:, ::3] = -100
    labels[positions == 0] = -100
    return {"input_ids": ids, "labels": labels, "position_ids": positions}


def unfused(
    model: nn.Module, batch: dict[str, Tensor], lengths: list[int], count: int, bf16: bool
) -> dict[str, Tensor]:
    """Document by document through Transformers, PEFT and autograd; bf16 by autocast, as the Trainer does it."""
    model.zero_grad()
    start = 0
    for length in lengths:
        ids = batch["input_ids"][:, start : start + length].to(DEVICE)
        labels = batch["labels"][:, start : start + length].to(DEVICE)
        with torch.autocast(DEVICE, torch.bfloat16, enabled=bf16):
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum") / count
        loss.backward()
        start += length
    grads = collect(model)
    model.zero_grad()
    return grads


def collect(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.detach().float().clone() for n, p in model.named_parameters() if p.requires_grad}


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[float]:
    return sorted(float((a[name] - b[name]).norm() / b[name].norm()) for name in b)


def summary(errors: list[float]) -> dict[str, float]:
    return {"median": errors[len(errors) // 2], "worst": errors[-1]}


def prepared(workload: Workload, layers: int) -> nn.Module:
    """An fp32 model whose 16-bit parts are exact in bf16, so that both dtypes have the same weights."""
    model = add_lora(make_model(workload.size, layers=layers, dtype=torch.float32), workload)
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and "lora_" not in name:
            parameter.data = parameter.data.bfloat16().float()
    return model.train()


def to_dtype(model: nn.Module, dtype: torch.dtype) -> None:
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and "lora_" not in name:
            parameter.data = parameter.data.to(dtype)
    for module in model.modules():
        if hasattr(module, "compute_dtype"):
            module.compute_dtype = dtype


def engine_gradients(model: nn.Module, batch: dict[str, Tensor], count: int, dtype: torch.dtype, **plan: Any) -> Any:
    engine = Engine(model, dtype=dtype, tokens=batch["input_ids"].numel(), graphs=True)
    if plan:
        engine.plan = replace(engine.plan, **plan)
    results = []
    for _ in range(3):  # unrecorded, recorded, replayed
        engine.flat.grad.zero_()
        engine.load_state_dict({"seed": 1, "draws": 0})
        loss = float(engine.forward_backward(batch, count))
        results.append((loss, collect(model)))
    repeat = max(distance(results[2][1], results[0][1]))
    return results[2][0], results[2][1], repeat


def gradients(size: str, targets: Any, layers: int, lengths: list[int]) -> dict[str, Any]:
    workload = replace(WORKLOADS["W1"], size=size, targets=targets, dropout=0.0)
    model = prepared(workload, layers)
    batch = batch_of(lengths, 1000)
    count = int((batch["labels"][:, 1:] != -100).sum())
    fp32 = unfused(model, batch, lengths, count, bf16=False)
    _, fused32, repeat32 = engine_gradients(model, batch, count, torch.float32)
    to_dtype(model, torch.bfloat16)
    bf16 = unfused(model, batch, lengths, count, bf16=True)
    _, fused16, repeat16 = engine_gradients(model, batch, count, torch.bfloat16)
    ratios = [a / b for a, b in zip(distance(fused16, fp32), distance(bf16, fp32), strict=True)]
    return {
        "check": "gradients", "size": size, "targets": targets, "layers": layers, "documents": lengths,
        "fused_fp32": summary(distance(fused32, fp32)), "unfused_bf16": summary(distance(bf16, fp32)),
        "fused_bf16": summary(distance(fused16, fp32)), "bf16_ratio_worst": max(ratios),
        "replay_against_unrecorded": {"fp32": repeat32, "bf16": repeat16},
    }  # fmt: skip


def budget(size: str, layers: int) -> dict[str, Any]:
    workload = replace(WORKLOADS["W1"], size=size)
    model = prepared(workload, layers)
    to_dtype(model, torch.bfloat16)
    batch = batch_of([300, 212], 1000)
    results = [
        engine_gradients(model, batch, 300, torch.bfloat16, keep=(level,) * layers, mlp_tokens=256)[:2]
        for level in Keep
    ]
    return {
        "check": "budget", "size": size,
        "losses": [loss for loss, _ in results],
        "against_input_only": [max(distance(grads, results[0][1])) for _, grads in results],
    }  # fmt: skip


def replays(size: str, layers: int, way: Way, dtype: torch.dtype, r: int) -> dict[str, Any]:
    """Worst relative distance of any gradient of each pack; two runs of one unrecorded pack beside it."""
    model = prepared(replace(WORKLOADS["W1"], size=size, r=r), layers)
    to_dtype(model, dtype)
    lengths = [[300, 100, 112], [112, 300, 100], [10, 290, 212], [257, 255]]
    if way == "cudnn":
        lengths = [[256, 256]] * 4
    batches = [batch_of(pack, 1000, seed) for seed, pack in enumerate(lengths)]

    def run(graphs: bool) -> list[dict[str, Tensor]]:
        engine = Engine(model, dtype=dtype, tokens=512, graphs=graphs)
        found = []
        for batch in [batches[0], *batches]:  # the first is never recorded
            engine.flat.grad.zero_()
            engine.load_state_dict({"seed": 1, "draws": 0})
            engine.forward_backward(batch, 300)
            found.append(collect(model))
        return found

    with mock.patch("slimtune.engine.inputs.choose", return_value=way):
        unrecorded, again, recorded = run(False), run(False), run(CUDA)
    return {
        "check": "replays", "size": size, "way": way, "dtype": str(dtype), "r": r,
        "recorded_against_unrecorded": [max(distance(*pair)) for pair in zip(recorded, unrecorded, strict=True)],
        "unrecorded_twice": max(max(distance(*pair)) for pair in zip(again, unrecorded, strict=True)),
        "packs_against_each_other": max(distance(unrecorded[1], unrecorded[2])),
    }  # fmt: skip


def main() -> None:
    size, layers = ("1.8b", 4) if CUDA else ("tiny", 2)
    long = 512 if CUDA else 32
    checks = [
        lambda: gradients(size, ("q_proj", "k_proj", "v_proj", "o_proj"), layers, [long] * 2),
        lambda: gradients(size, "all-linear", layers, [37, long, 5, 101, 1]),
        lambda: budget(size, layers),
    ]
    ways: list[tuple[Way, torch.dtype]] = [
        ("cudnn", torch.bfloat16), ("varlen", torch.bfloat16), ("efficient", torch.float16),
        ("efficient", torch.float32), ("torch", torch.float32),
    ] if CUDA else [("torch", torch.float32)]  # fmt: skip
    checks += [partial(replays, size, layers, way, dtype, r) for way, dtype in ways for r in (8, 4)]
    results = []
    for check in checks:
        try:
            results.append(check())
        except Exception as error:  # noqa: BLE001 - the other checks still count
            import traceback

            traceback.print_exc()
            results.append({"error": f"{type(error).__name__}: {error}"[:400]})
        print(json.dumps(results[-1]), flush=True)
        if "OUT" in os.environ:
            (Path(os.environ["OUT"]) / "parity.json").write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    sys.exit(main())
