"""Every family that the engine knows, on a GPU: python benchmarks/parity_families.py OUT [FAMILY...]

Tiny models with odd widths (tests/engine/models.py), attention alone and every linear layer and expert adapted, packs
of documents. The oracle is the unfused model in float64 on the CPU. Per case: the worst LoRA matrix in float32, and the
unfused model's on this machine; the whole gradient's distance in bfloat16 over the unfused model's own, eight packs (24
where a router chooses); a recorded pass and its replays against the pass that was not recorded. As many families at
once as there are cores. Bounds: 1e-4 or what the unfused model's rounding makes; 1.2; to the bit, but for what an
attention kernel adds up in any order. In float32 a pack is judged only where no router's choice is within rounding of
another one, as float32 then sends a token elsewhere than float64 by chance: the next seed is taken.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))  # for the tests' models

import peers  # noqa: E402

from tests.engine import models  # noqa: E402

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj", *peers.STATES, "in_proj_qkvz", "in_proj_ba"]
"""What mixes tokens; of other models, PEFT finds none of a state's."""
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PROCESSES = min(28, max(1, (os.cpu_count() or 1) - 4))
COUNT = 40
PACKS, PACKS_OF_A_MIXTURE = 8, 24
"""A token that 16 bits send to another expert weighs more than all roundings: a mixture's mean needs more packs."""
CLEAR = 1e-5
"""Between the last expert chosen and the next one: a hundred times what float32 rounds a router's logit by."""


class Choices(TorchFunctionMode):
    """Sees how near any ``topk`` within it came to another choice."""

    def __init__(self) -> None:
        super().__init__()
        self.nearest = float("inf")

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in (torch.topk, Tensor.topk):
            values, k = args[0].detach(), args[1] if len(args) > 1 else (kwargs or {})["k"]
            if k < values.shape[-1]:
                best = values.topk(k + 1, dim=-1).values
                self.nearest = min(self.nearest, float((best[..., -2] - best[..., -1]).min()))
        return function(*args, **(kwargs or {}))


def clear(wide: nn.Module, seed: int, **shape: Any) -> tuple[dict[str, Tensor], dict[str, Tensor], float]:
    """The first pack from ``seed`` on where no choice is near, its gradients in float64, and the nearest choice."""
    for number in range(seed, seed + 20):
        pack = models.pack(number, **shape)
        with Choices() as choices:
            _, expected = models.reference(wide, pack, COUNT)
        if choices.nearest > CLEAR:
            break
    return pack, expected, choices.nearest


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Of the whole gradient: ‖a - b‖ / ‖b‖."""
    square = sum(float((a[name].double() - value.double()).square().sum()) for name, value in b.items())
    return (square / sum(float(value.double().square().sum()) for value in b.values())) ** 0.5


def overall(found: list[dict[str, Tensor]], exact: list[dict[str, Tensor]]) -> float:
    """The packs' distances, in the mean of their squares: one alone is a throw of its roundings."""
    return statistics.fmean(distance(a, b) ** 2 for a, b in zip(found, exact, strict=True)) ** 0.5


def on_cpu(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.cpu() for name, value in models.gradients(model).items()}


def passes(model: nn.Module, batches: list[dict[str, Tensor]], dtype: torch.dtype) -> Iterator[dict[str, Tensor]]:
    """Each batch's gradients by an engine that may record."""
    from slimtune.engine import Engine

    engine = Engine(model, dtype=dtype, tokens=64)
    for batch in batches:
        engine.flat.grad.zero_()
        engine.load_state_dict({"seed": 1, "draws": 0})
        engine.forward_backward(batch, COUNT)
        yield on_cpu(model)


def unfused(model: nn.Module, batch: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Document by document through Transformers, PEFT and autograd; 16 bits by autocast, as a trainer does it."""
    model.zero_grad()
    for part in models.documents(batch):
        inputs = {key: value.to(DEVICE) for key, value in part.items()}
        labels = inputs.pop("labels")
        with torch.autocast(DEVICE, torch.bfloat16, enabled=dtype == torch.bfloat16):
            logits = model(**inputs, use_cache=False).logits[:, :-1].float()
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum") / COUNT
        loss.backward()
    found = on_cpu(model)
    model.zero_grad()
    return found


def in_16_bits(model: nn.Module) -> nn.Module:
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            parameter.data = parameter.data.bfloat16()
    return model


def check(family: str, targets: Any) -> dict[str, Any]:
    model = models.add_lora(models.make_base(family), target_modules=targets)
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            parameter.data = parameter.data.bfloat16().float()  # the same weights in both dtypes
    wide = deepcopy(model).double()
    batch, expected, nearest = clear(wide, 2)
    other, expected_other, _ = clear(wide, 3, lengths=(5, 30, 1, 17, 8, 3))
    # The third pass of a shape is a replay; the other pack goes through the graph of the first.
    first, _, third, replayed = passes(deepcopy(model).to(DEVICE), [batch, batch, batch, other], torch.float32)
    (alone,) = passes(deepcopy(model).to(DEVICE), [other], torch.float32)
    packs = [models.pack(seed) for seed in range(4, 4 + (PACKS_OF_A_MIXTURE if nearest < float("inf") else PACKS))]
    exact = [models.reference(wide, pack, COUNT)[1] for pack in packs]
    plain = unfused(model.to(DEVICE), other, torch.float32)
    half = in_16_bits(model.to(DEVICE))
    plain_16 = [unfused(half, pack, torch.bfloat16) for pack in packs]
    first_16, _, third_16, *sixteen = passes(half, [batch] * 3 + packs, torch.bfloat16)
    return {
        **({"nearest_choice": nearest} if nearest < float("inf") else {}),
        "fp32": models.worst_error(first, expected),
        "fp32_other_pack": models.worst_error(replayed, expected_other),
        "fp32_other_pack_whole": distance(replayed, expected_other),
        "fp32_other_pack_unfused": models.worst_error(plain, expected_other),
        "bf16": overall(sixteen, exact),
        "bf16_over_unfused": overall(sixteen, exact) / overall(plain_16, exact),
        "replay_fp32": distance(third, first),
        "replay_of_another_pack": distance(replayed, alone),
        "replay_bf16": distance(third_16, first_16),
    }


def one(family: str) -> None:
    for name, targets in (("qkvo", ATTENTION), ("all", "all-linear")):
        begin = time.perf_counter()
        try:
            found = check(family, targets)
        except Exception as error:  # noqa: BLE001 - the other cases still count
            found = {"error": f"{type(error).__name__}: {error}"[:500]}
        print("RESULT " + json.dumps({"family": family, "targets": name, **found,
            "seconds": round(time.perf_counter() - begin, 1)}), flush=True)  # fmt: skip


def started(family: str) -> list[dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, __file__, "--one", family],
        capture_output=True, text=True, timeout=200, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    lines = [json.loads(line[7:]) for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    return lines or [{"family": family, "error": (done.stderr or done.stdout)[-600:]}]


def main() -> None:
    if sys.argv[1:2] == ["--one"]:
        one(sys.argv[2])
        return
    out, families = Path(sys.argv[1]), sys.argv[2:] or models.FAMILIES
    out.mkdir(parents=True, exist_ok=True)
    about, results = peers.machine(), []
    with ThreadPoolExecutor(PROCESSES if DEVICE == "cuda" else 1) as pool:
        for lines in pool.map(started, families):
            for line in lines:
                print(json.dumps(line), flush=True)
            results += lines
            (out / f"{about['date']}-parity-families.json").write_text(
                json.dumps({**about, "results": results}, indent=1) + "\n"
            )


if __name__ == "__main__":
    main()
