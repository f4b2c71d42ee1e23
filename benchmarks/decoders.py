"""Published models' layers through slimtune's trainer, beside TRL's and Unsloth's.

    python benchmarks/decoders.py OUT SHAPE [CASE...]

Random weights in a published model's shape, fewer layers; 4 x 2,048 tokens a step, no dropout. SHAPE: ``moe`` (six
layers of Qwen3-30B-A3B), ``gemma3`` (eight of Gemma 3 4B, text), ``gemma4`` (twelve of Gemma 4 E4B, the last five of
which share keys and values), ``gemma4-moe`` (six of Gemma 4 26B-A4B), ``glm4`` (six of GLM-4 9B), ``gpt-oss`` (six of
gpt-oss-20b, experts in MXFP4 as it is published; in 16 bits for the others), ``olmo3`` (six of OLMo 3 7B), ``qwen3.5``
(eight of Qwen3.5 9B, six of them linear attention). Each case is a process of its own, the median step after four:

- ``slimtune``, ``trl``, ``unsloth``: LoRA r=8 on what mixes tokens; a mixture's experts stay in 16 bits in TRL.
- ``…-all``: every linear layer and all experts, r=16. ``…-chats``: chats of 16 to 2,048 tokens, TRL packing them.
- ``slimtune@7.3``: within so many GiB. ``slimtune-plain``: without the engine. ``…-16bit``: nothing quantised.
  ``slimtune-fp8``: with ``precision: fp8``.
- ``whole``: the layers repeated to 48, one row of 2,048 tokens, by the engine alone: what it takes in all.
  ``whole-rows``: four such rows. ``…@8``: within so many GiB, weights in RAM where they don't fit.
- ``slimtune-skewed``: a router that sends nearly all tokens to a few experts, and none to many.
- ``load``: the base in 4 bits from its files: seconds, the most bytes while loading, and those that stay.
- ``profile``: where slimtune's step goes, by kernel.
"""

from __future__ import annotations

import copy
import json
import math
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import peers
import torch
from workloads import Workload

CASES = ("slimtune", "slimtune-plain", "trl", "unsloth", "slimtune-all", "unsloth-all", "slimtune-chats", "trl-chats")
LIMIT = 240
"""Seconds of one case."""
CUDA = torch.cuda.is_available()
SIZE = ("model", 4, 2048) if CUDA else ("tiny", 2, 64)
ROWS = Workload("rows", *SIZE, dropout=0.0)
ALL = Workload("all", *SIZE, targets="all-linear", r=16, dropout=0.0)
CHATS = Workload("chats", *SIZE, dropout=0.0, chats=True)
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "moe": ("Qwen3MoeConfig", {
        "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768,
        "num_hidden_layers": 6, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
        "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True, "tie_word_embeddings": False,
    }),
    "gemma3": ("Gemma3TextConfig", {
        "vocab_size": 262208, "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 8,
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "sliding_window": 1024,
        "query_pre_attn_scalar": 256,
    }),
    "gemma4": ("Gemma4TextConfig", {
        "vocab_size": 262144, "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 12,
        "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 256, "global_head_dim": 512,
        "sliding_window": 512, "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 2,
        "num_kv_shared_layers": 5, "hidden_size_per_layer_input": 256, "vocab_size_per_layer_input": 262144,
        "final_logit_softcapping": 30.0,
    }),
    "gemma4-moe": ("Gemma4TextConfig", {
        "vocab_size": 262144, "hidden_size": 2816, "intermediate_size": 2112, "num_hidden_layers": 6,
        "num_attention_heads": 16, "num_key_value_heads": 8, "num_global_key_value_heads": 2, "head_dim": 256,
        "global_head_dim": 512, "attention_k_eq_v": True, "sliding_window": 1024,
        "layer_types": ["sliding_attention"] * 5 + ["full_attention"], "hidden_size_per_layer_input": 0,
        "enable_moe_block": True, "num_experts": 128, "top_k_experts": 8, "moe_intermediate_size": 704,
        "final_logit_softcapping": 30.0,
    }),
    "qwen3.5": ("Qwen3_5TextConfig", {
        "vocab_size": 248320, "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 8,
        "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 256, "linear_num_key_heads": 16,
        "linear_num_value_heads": 32, "linear_key_head_dim": 128, "linear_value_head_dim": 128,
        "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 2,
    }),
    "glm4": ("Glm4Config", {
        "vocab_size": 151552, "hidden_size": 4096, "intermediate_size": 13696, "num_hidden_layers": 6,
        "num_attention_heads": 32, "num_key_value_heads": 2, "head_dim": 128, "attention_bias": True,
    }),
    "gpt-oss": ("GptOssConfig", {
        "vocab_size": 201088, "hidden_size": 2880, "intermediate_size": 2880, "num_hidden_layers": 6,
        "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64, "num_local_experts": 32,
        "num_experts_per_tok": 4, "sliding_window": 128,
        "layer_types": ["sliding_attention", "full_attention"] * 3,
        "rope_parameters": {"rope_type": "yarn", "rope_theta": 150000.0, "factor": 32.0, "beta_fast": 32.0,
            "beta_slow": 1.0, "truncate": False, "original_max_position_embeddings": 4096},
    }),
    "olmo3": ("Olmo3Config", {
        "vocab_size": 100278, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 6,
        "num_attention_heads": 32, "num_key_value_heads": 32, "sliding_window": 4096,
    }),
}  # fmt: skip
"""As the models' config.json have them, but for the number of layers."""
TINY = {"vocab_size": 1024, "hidden_size": 128, "intermediate_size": 192, "moe_intermediate_size": 64,
    "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "num_experts": 8,
    "num_experts_per_tok": 2, "top_k_experts": 2, "global_head_dim": 64, "num_global_key_value_heads": 1,
    "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 1,
    "hidden_size_per_layer_input": 64, "vocab_size_per_layer_input": 1024, "num_local_experts": 8,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 32,
    "linear_value_head_dim": 32}  # fmt: skip
MXFP4 = ("gpt-oss",)
"""Shapes whose experts are published in MXFP4."""


def make_folder(folder: Path, shape: str) -> None:
    """A random model in bf16, laid out as it is published, with the tokenizer of the other benchmarks."""
    import transformers

    peers.make_folder("tiny", folder)
    name, options = SHAPES[shape]
    if not CUDA:
        options = {**options, **{key: value for key, value in TINY.items() if options.get(key)}}
    config = getattr(transformers, name)(
        **options, max_position_embeddings=32768, bos_token_id=1, eos_token_id=2, pad_token_id=0, dtype=torch.bfloat16
    )
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda" if CUDA else "cpu"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    torch.set_default_dtype(before)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.02)
    for file in folder.glob("*.safetensors"):
        file.unlink()
    model.save_pretrained(folder, max_shard_size="4GB")


def in_mxfp4(folder: Path) -> Path:
    """A copy as gpt-oss is published: random codes for the experts, as large as the weights that they replace."""
    from safetensors.torch import load_file, save_file

    copied = folder.with_name(f"{folder.name}-mxfp4")
    shutil.copytree(folder, copied, ignore=shutil.ignore_patterns("*.safetensors*"))
    index = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors = load_file(file)
        for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
            experts, columns, rows = tensors.pop(name).shape
            shape = (experts, rows, columns // 32)
            tensors[f"{name}_blocks"] = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8)
            tensors[f"{name}_scales"] = torch.full(shape, 120, dtype=torch.uint8)
        save_file(tensors, copied / file.name, metadata={"format": "pt"})
        index |= dict.fromkeys(tensors, file.name)
    (copied / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    config = json.loads((copied / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (copied / "config.json").write_text(json.dumps(config))
    return copied


def skewed(folder: Path) -> Path:
    """A copy whose routers' rows shrink from the first expert to the last: the last ones are chosen next to never."""
    from safetensors.torch import load_file, save_file

    copied = Path(tempfile.mkdtemp()) / folder.name
    shutil.copytree(folder, copied)
    for file in copied.glob("*.safetensors"):
        tensors = load_file(file)
        for name, weight in tensors.items():
            if name.endswith(("mlp.gate.weight", "router.proj.weight", "router.weight")):
                experts = torch.arange(weight.shape[0])[:, None] / weight.shape[0]
                tensors[name] = (weight * torch.exp(-8 * experts)).to(weight.dtype).contiguous()
        save_file(tensors, file, metadata={"format": "pt"})
    return copied


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


def whole(folder: Path, *, layers: int = 48, rows: int = 1, gib: float = 18.0) -> dict[str, Any]:
    from peft import LoraConfig, get_peft_model

    from slimtune.base.load import load_base
    from slimtune.engine import Engine, FusedAdamW8bit
    from slimtune.hardware import detect

    model: Any = load_base(str(folder), detect(), compute_dtype="bf16").model
    own = model.model.layers
    own.extend([copy.deepcopy(own[index % len(own)]) for index in range(layers - len(own))])
    model.config.num_hidden_layers = len(own)
    lora = LoraConfig(r=8, lora_alpha=16, target_modules=list(ROWS.targets), task_type="CAUSAL_LM")
    model = get_peft_model(model, lora).train()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    length, drawn = (2048 if CUDA else 64), random.Random(0)
    ids = torch.tensor([[drawn.randrange(6, 1000) for _ in range(rows * length)]])
    batch = {"input_ids": ids, "labels": ids, "position_ids": torch.arange(length).repeat(rows)[None]}
    if CUDA:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        base = torch.cuda.memory_allocated()
    memory = int(gib * 2**30) if CUDA else None
    engine = Engine(model, dtype=torch.bfloat16, tokens=rows * length, longest=length, memory=memory)
    if CUDA:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    optimizer = FusedAdamW8bit(engine.flat, lr=2e-4)
    times = []
    for _ in range(8):
        begin = time.perf_counter()
        loss = engine.forward_backward(batch, rows * length)
        optimizer.clip_(1.0)
        optimizer.step()
        optimizer.zero_grad()
        float(loss)
        times.append(time.perf_counter() - begin)
    return {
        "step_ms": statistics.median(times[4:]) * 1e3,
        "layers": len(own),
        "loss": float(loss),
        "keep": "".join(str(int(level)) for level in engine.plan.keep),
        "mlp_tokens": engine.plan.mlp_tokens,
        "least_memory": engine.least_memory,
        "streamed": len(engine.plan.streamed),
        "inputs_in_ram": len(engine.plan.in_ram),
        "locked_gib": engine.plan.locked_bytes / 2**30,
        "planned_gib": sum(engine.parts.values()) / 2**30,
        **({"base_gib": base / 2**30, "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
            "reserved_gib": torch.cuda.max_memory_reserved() / 2**30} if CUDA else {}),
    }  # fmt: skip


def train(folder: Path, workload: Workload, *, profile: bool = False, **options: Any) -> dict[str, Any]:
    """slimtune's recipe, with rows that fill its packs."""
    from slimtune.config import Config
    from slimtune.recipes import finetune

    scratch = Path(tempfile.mkdtemp())
    data = scratch / "rows.jsonl"
    rows = peers.documents(workload, factor=8 if workload.chats else 1)
    data.write_text("".join(json.dumps(peers.as_messages(row)) + "\n" for row in rows))
    config = Config.make(
        model=str(folder), data=str(data), output=scratch / "run", train_on="all", max_length=workload.length,
        micro_batch=workload.rows, gradient_accumulation=1, max_steps=peers.STEPS, lora_dropout=0.0,
        lora_r=workload.r, targets=workload.targets, save_steps=10 * peers.STEPS, eval_share=0.0,
        **options,
    )  # fmt: skip
    table = _profiled() if profile else None
    run = finetune(config)
    records = [record for record in run.metrics() if "step_seconds" in record]
    timed = records[peers.WARM_UP :]
    facts = run.read_json(run.facts_file)
    return {
        "step_ms": statistics.median(record["step_seconds"] for record in timed) * 1e3,
        "tokens_s": statistics.median(record["tokens"] / record["step_seconds"] for record in timed),
        "peak_gib": max(record["memory_bytes"] for record in records) / 2**30,
        "floor_share": statistics.median(record.get("floor_share", math.nan) for record in timed),
        "losses": [records[0]["loss"], records[-1]["loss"]],
        "engine": facts["training"]["engine"],
        "streamed": facts["training"]["streamed_layers"],
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
    stack, _, memory = case.partition("@")
    stack, _, kind = stack.partition("-")
    workload = {"all": ALL, "chats": CHATS}.get(kind, ROWS)
    if folder.name == "qwen3.5" and not isinstance(workload.targets, str):
        workload = replace(workload, targets=(*workload.targets, *peers.STATES))
    if stack in ("trl", "unsloth"):
        return peers.run_peer(f"{stack}-packing" if workload.chats else case, workload, folder)
    published = folder.with_name(f"{folder.name}-mxfp4")
    if kind != "16bit" and published.is_dir():
        folder = published
    if stack == "load":
        return load(folder)
    if stack == "whole":
        return whole(folder, rows=4 if kind == "rows" else 1, gib=float(memory or 18.0))
    options: dict[str, Any] = {"memory": f"{memory}GiB"} if memory else {}
    if kind == "skewed":
        folder = skewed(folder)
    if kind == "plain":
        options["engine"] = "plain"
    if kind == "16bit":
        options["quantization"] = "none"
    if kind == "fp8":
        options["precision"] = "fp8"
    return train(folder, workload, profile=stack == "profile", **options)


def in_a_process(case: str, folder: Path) -> dict[str, Any]:
    command = [sys.executable, __file__, "--one", case, str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, check=False)
    except subprocess.TimeoutExpired:
        return {"error": f"took longer than {LIMIT} s"}
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    return json.loads(lines[-1][7:]) if lines else {"error": (done.stderr or done.stdout)[-1500:]}


def main() -> None:
    if sys.argv[1:2] == ["--one"]:
        print("RESULT " + json.dumps(measure(sys.argv[2], Path(sys.argv[3]))), flush=True)
        return
    out, shape, cases = Path(sys.argv[1]), sys.argv[2], sys.argv[3:] or CASES
    out.mkdir(parents=True, exist_ok=True)
    about, results = peers.machine(), []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / shape
        make_folder(folder, shape)
        if shape in MXFP4:
            in_mxfp4(folder)
        torch.cuda.empty_cache()
        for case in cases:
            found = in_a_process(case, folder)
            table = found.pop("profile", None)
            results.append({"shape": shape, "case": case, **found})
            print(json.dumps(results[-1]), *(table or ()), sep="\n", flush=True)
            (out / f"{about['date']}-{shape}.json").write_text(
                json.dumps({**about, "results": results}, indent=1) + "\n"
            )


if __name__ == "__main__":
    main()
