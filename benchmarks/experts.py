"""A mixture of experts on the plain path, beside TRL's own trainer: python benchmarks/experts.py [OUT] [CASE...]

Qwen3-30B-A3B's layers, six of them, random; 4 x 2,048 tokens a step, LoRA r=8 on q, k, v and o, no dropout. Each case
is a process of its own, the median step after four:

- ``load``: the base in 4 bits from its files: seconds, the most bytes while loading, and those that stay.
- ``slimtune``, ``trl``: as a person has them: slimtune's experts in NF4; TRL's stay in 16 bits, its attention in NF4.
- ``slimtune@7.3``: within so many GiB; ``slimtune-plain``: without the engine; ``unsloth``, where it is installed.
- ``slimtune-16bit``, ``trl-16bit``: nothing quantised on either side.
- ``slimtune-experts``: every linear layer and all experts adapted, r=16.
- ``profile``: where slimtune's step goes, by kernel.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import peers
import torch
from workloads import Workload

CASES = (
    "load",
    "slimtune",
    "slimtune@7.3",
    "slimtune@5.1",
    "slimtune-plain",
    "trl",
    "slimtune-16bit",
    "trl-16bit",
    "slimtune-experts",
    "profile",
)
CUDA = torch.cuda.is_available()
MIXTURE = Workload("MOE", "moe", 4, 2048, dropout=0.0) if CUDA else Workload("tiny-MOE", "tiny", 2, 64, dropout=0.0)
SHAPE: dict[str, Any] = {
    "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768,
    "num_hidden_layers": 6, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128,
    "num_experts_per_tok": 8, "norm_topk_prob": True,
}  # fmt: skip
TINY = {
    **SHAPE, "vocab_size": 1024, "hidden_size": 128, "moe_intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "head_dim": 32, "num_experts": 8, "num_experts_per_tok": 2,
}  # fmt: skip


def make_folder(folder: Path, shape: dict[str, Any]) -> None:
    """A random mixture in bf16, laid out as it is published, with the tokenizer of the other benchmarks."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    peers.make_folder("tiny", folder)
    config = Qwen3MoeConfig(
        **shape, max_position_embeddings=32768, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2,
        pad_token_id=0, dtype=torch.bfloat16,
    )  # fmt: skip
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda" if CUDA else "cpu"):
        model = Qwen3MoeForCausalLM(config)
    torch.set_default_dtype(before)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.02)
    for file in folder.glob("*.safetensors"):
        file.unlink()
    model.save_pretrained(folder, max_shard_size="4GB")


def load(folder: Path) -> dict[str, Any]:
    from slimtune.base.load import load_base
    from slimtune.base.quantize import bytes_by_part
    from slimtune.hardware import detect

    begin = time.perf_counter()
    base = load_base(str(folder), detect(), compute_dtype="bf16")
    if CUDA:
        torch.cuda.synchronize()
    layer = sum(p.numel() for p in base.model.model.layers[0].parameters() if p.dim() == 3)
    return {
        "seconds": time.perf_counter() - begin,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if CUDA else None,
        "kept_gib": torch.cuda.memory_allocated() / 2**30 if CUDA else None,
        "experts_of_a_layer_in_16_bits_gib": 2 * layer / 2**30,
        "parts": {part.part: [part.format, round(part.bytes_now / 2**30, 3)] for part in bytes_by_part(base.model)},
    }


def train(
    folder: Path, quantization: str, *, profile: bool = False, experts: bool = False, **options: Any
) -> dict[str, Any]:
    """slimtune's recipe, with rows that fill its packs."""
    from slimtune.config import Config
    from slimtune.recipes import finetune

    scratch = Path(tempfile.mkdtemp())
    data = scratch / "rows.jsonl"
    data.write_text("".join(json.dumps(peers.as_messages(row)) + "\n" for row in peers.documents(MIXTURE)))
    attention = ("q_proj", "k_proj", "v_proj", "o_proj")
    config = Config.make(
        model=str(folder), data=str(data), output=scratch / "run", train_on="all", max_length=MIXTURE.length,
        micro_batch=MIXTURE.rows, gradient_accumulation=1, max_steps=peers.STEPS, lora_dropout=0.0,
        lora_r=16 if experts else MIXTURE.r, targets="all-linear" if experts else attention, quantization=quantization,
        save_steps=10 * peers.STEPS, **options,
    )  # fmt: skip
    table = _profiled() if profile else None
    run = finetune(config)
    records = [record for record in run.metrics() if "step_seconds" in record]
    step = statistics.median(record["step_seconds"] for record in records[peers.WARM_UP :])
    facts = run.read_json(run.facts_file)
    return {
        "step_ms": step * 1e3,
        "tokens_s": MIXTURE.rows * MIXTURE.length / step,
        "peak_gib": max(record["memory_bytes"] for record in records) / 2**30,
        "losses": [records[0]["loss"], records[-1]["loss"]],
        "engine": facts["training"]["engine"],
        "packed": facts["data"]["packed"],
        "trained": facts["adapter"]["trainable_parameters"],
        "base_gib": facts["base"]["bytes_now"] / 2**30,
        **({"profile": table} if table is not None and CUDA else {}),
    }


def _profiled() -> list[str]:
    """Profile the last step but one of the run that begins now; the lines come in then."""
    from slimtune.training.trainer import SlimTrainer

    lines: list[str] = []
    plain = SlimTrainer.training_step
    calls = 0

    def step(self: Any, *arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls != peers.STEPS - 1:
            return plain(self, *arguments, **options)
        with torch.profiler.profile(activities=list(torch.profiler.supported_activities())) as profiler:
            loss = plain(self, *arguments, **options)
            torch.cuda.synchronize()
        lines.extend(profiler.key_averages().table(sort_by="self_cuda_time_total", row_limit=45).splitlines())
        return loss

    SlimTrainer.training_step = step  # type: ignore[method-assign]
    return lines


def measure(case: str, folder: Path) -> dict[str, Any]:
    if case == "load":
        return load(folder)
    if case == "profile":
        return train(folder, "nf4", profile=True)
    if case == "slimtune-experts":
        return train(folder, "nf4", experts=True)
    if case.startswith(("trl", "unsloth")):
        return peers.run_peer(case, MIXTURE, folder)
    if case == "slimtune-plain":
        return train(folder, "nf4", engine="plain")
    if "@" in case:
        return train(folder, "nf4", memory=f"{case.partition('@')[2]}GiB")
    return train(folder, "none" if case.endswith("16bit") else "nf4")


def main() -> None:
    if sys.argv[1:2] == ["--one"]:
        print("RESULT " + json.dumps(measure(sys.argv[2], Path(sys.argv[3]))), flush=True)
        return
    out, cases = Path(sys.argv[1] if len(sys.argv) > 1 else "benchmarks/results"), sys.argv[2:] or CASES
    out.mkdir(parents=True, exist_ok=True)
    about, results = peers.machine(), []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "mixture"
        make_folder(folder, SHAPE if CUDA else TINY)
        torch.cuda.empty_cache()
        for case in cases:
            done = subprocess.run(
                [sys.executable, __file__, "--one", case, str(folder)],
                capture_output=True,
                text=True,
                timeout=240,
                check=False,
            )
            lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
            found = json.loads(lines[-1][7:]) if lines else {"error": (done.stderr or done.stdout)[-1500:]}
            table = found.pop("profile", None)
            results.append({"case": case, **found})
            print(json.dumps(results[-1]), *(table or ()), sep="\n", flush=True)
            (out / f"{about['date']}-experts.json").write_text(
                json.dumps({**about, "results": results}, indent=1) + "\n"
            )


if __name__ == "__main__":
    main()
