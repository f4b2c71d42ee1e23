"""Shows that fused and unfused runs learn the same: python benchmarks/curves.py MODEL DATA [--steps 200] [--small NAME]

Trains LoRA on MODEL (a folder or hub id; SmolLM2-135M in the kept results) with DATA (alpaca-like rows), dropout 0, the
same seed and order, by `slimtune train`'s own recipe: unfused in bf16, fused in bf16, fused in fp16 as a T4-class card
needs it (memory capped at 15 GiB, and its kernel for attention), fused with padding instead of packing. Writes each
loss curve, the mean relative difference from the unfused one, and any non-finite value. With ``--small`` the model is a
small one of that family with MODEL's tokenizer, trained here from random weights on DATA's text before. Where the
unfused model can't keep a pack's documents apart, it gets the same documents as rows of the same step.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from peers import HERE, machine

from slimtune.batch import MicroBatch
from slimtune.config import Config
from slimtune.engine.kernels.delta import DeltaHeads, delta_backward, delta_forward
from slimtune.plan import Choice
from slimtune.recipes import finetune
from slimtune.training.isolation import lay_out
from slimtune.training.layout import Layout

CAP = 15 * 2**30
RUNS: dict[str, dict[str, Any]] = {
    "unfused": {"engine": "plain"},
    "fused": {"engine": "fused"},
    "fused, fp16, 15 GiB": {"engine": "fused", "compute_dtype": "fp16", "memory": "15GiB"},
    "fused, least memory": {"engine": "fused", "memory": "1MiB"},
    "unfused, padded": {"engine": "plain", "packing": False},
    "fused, padded": {"engine": "fused", "packing": False},
}
PAIRS = {
    "fused": "unfused",
    "fused, fp16, 15 GiB": "unfused",
    "fused, least memory": "fused",
    "fused, padded": "unfused, padded",
}

_COMMON: dict[str, Any] = {
    "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 6, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 2048,
}  # fmt: skip
_WINDOWS = {"sliding_window": 128, "layer_types": (["sliding_attention"] * 2 + ["full_attention"]) * 2}
_STATES = {
    "num_hidden_layers": 4,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
}
_EXPERTS = {"num_experts": 16, "moe_intermediate_size": 128}
SMALL: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma3": ("Gemma3TextConfig", {**_WINDOWS, "query_pre_attn_scalar": 64}),
    "gemma4-e2b": ("Gemma4TextConfig", {
        **_WINDOWS, "global_head_dim": 128, "num_kv_shared_layers": 3, "hidden_size_per_layer_input": 64,
        "use_double_wide_mlp": True, "final_logit_softcapping": 30.0,
    }),
    "gemma4-26b": ("Gemma4TextConfig", {
        **_WINDOWS, **_EXPERTS, "global_head_dim": 128, "num_global_key_value_heads": 1, "attention_k_eq_v": True,
        "hidden_size_per_layer_input": 0, "enable_moe_block": True, "top_k_experts": 4, "final_logit_softcapping": 30.0,
    }),
    "qwen3-moe": ("Qwen3MoeConfig", {**_EXPERTS, "num_experts_per_tok": 4, "norm_topk_prob": True}),
    "granite-moe": ("GraniteMoeConfig", {
        "num_local_experts": 16, "num_experts_per_tok": 4, "embedding_multiplier": 12.0, "residual_multiplier": 0.22,
        "attention_multiplier": 0.125, "logits_scaling": 4.0, "intermediate_size": 128,
    }),
    "gpt-oss": ("GptOssConfig", {
        "num_local_experts": 16, "num_experts_per_tok": 4, "intermediate_size": 128, "sliding_window": 128,
    }),
    "qwen3.5": ("Qwen3_5TextConfig", {**_STATES, "tie_word_embeddings": True}),
    "qwen3.5-moe": ("Qwen3_5MoeTextConfig", {
        **_STATES, **_EXPERTS, "num_experts_per_tok": 4, "shared_expert_intermediate_size": 128,
    }),
    "qwen3-next": ("Qwen3NextConfig", {
        **_STATES, **_EXPERTS, "num_experts_per_tok": 4, "shared_expert_intermediate_size": 128,
    }),
}  # fmt: skip
"""Small models of families whose published ones are too large to train from the beginning."""


def give_memory_(model: Any) -> None:
    """Start gated states so that they last, as their authors do (arXiv:2412.06464): steps of 0.001 to 0.1.

    Transformers' random models have steps of about 1.3, by which a state has nothing of the token before the last.
    """
    for module in model.modules():
        if hasattr(module, "dt_bias") and hasattr(module, "A_log"):
            steps = torch.exp(torch.rand(module.dt_bias.shape) * math.log(100.0) + math.log(0.001))
            module.dt_bias.data.copy_(torch.log(torch.expm1(steps)))


class _Rule(torch.autograd.Function):
    """slimtune's gated delta rule, whose backward is many times as fast as autograd's through Transformers' own."""

    @staticmethod
    def forward(ctx: Any, mixed: Any, g: Any, beta: Any, length: int, heads: DeltaHeads) -> Any:
        starts = torch.arange(len(mixed), device=mixed.device, dtype=torch.int32) // length * length
        ends = torch.arange(0, len(mixed) + 1, length, device=mixed.device, dtype=torch.int32)
        o, saved = delta_forward(mixed, g, beta, starts, ends, heads)
        ctx.kept = mixed, g, beta, starts, ends, heads, saved
        return o

    @staticmethod
    def backward(ctx: Any, do: Any) -> Any:
        return (*delta_backward(do.contiguous(), *ctx.kept), None, None)


def _rule(query: Any, key: Any, value: Any, *, g: Any, beta: Any, **_: Any) -> Any:
    """As Transformers calls it: [rows, length, heads, columns]; no padding."""
    heads = DeltaHeads(key.shape[2], value.shape[2], key.shape[3], value.shape[3])
    mixed = torch.cat([each.flatten(2) for each in (query, key, value)], dim=2).flatten(0, 1)
    o = _Rule.apply(mixed, g.float().flatten(0, 1), beta.float().flatten(0, 1), key.shape[1], heads)
    return o.view(value.shape), None


@contextmanager
def quick_states(model: Any) -> Iterator[None]:
    """While the body runs, a model's gated states are trained by slimtune's rule."""
    with ExitStack() as patches:
        for module in model.modules():
            if hasattr(module, "dt_bias"):
                for owner, own in (
                    (sys.modules[type(module).__module__], "torch_chunk_gated_delta_rule"),
                    (module, "chunk_gated_delta_rule"),  # where Transformers keeps it, to 5.17
                ):
                    if hasattr(owner, own):
                        patches.enter_context(mock.patch.object(owner, own, _rule))
        yield


def small_model(name: str, source: str, data: str, folder: Path, *, steps: int = 400) -> dict[str, Any]:
    """Train one from random weights on the text of DATA, with Transformers and AdamW alone, and save it."""
    import transformers

    kind, options = SMALL[name]
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    rows = json.loads(Path(data).read_text())
    text = "\n\n".join("\n".join(str(value) for value in row.values()) for row in rows)
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    sizes = {**_COMMON, "vocab_size": len(tokenizer), **options}
    if "hidden_size_per_layer_input" in options:
        sizes["vocab_size_per_layer_input"] = len(tokenizer)
    config = getattr(transformers, kind)(
        **sizes, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model: Any = transformers.AutoModelForCausalLM.from_config(config)
    give_memory_(model)
    model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    length, rows_at_once, losses = min(256, len(ids) // 4), 16 if device == "cuda" else 2, []
    with quick_states(model):
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = 1e-3 * min(1.0, (step + 1) / 40)
            starts = torch.randint(0, len(ids) - length, (rows_at_once,)).tolist()
            batch = torch.stack([ids[start : start + length] for start in starts]).to(device)
            with torch.autocast(device, torch.bfloat16):
                loss = model(input_ids=batch, labels=batch, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
    model.bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return {"tokens": len(ids), "steps": steps, "first": losses[0], "last": statistics.fmean(losses[-10:])}


class _Rows(Layout):
    """The documents of a pack as padded rows."""

    def pieces(self, batch: dict[str, Any]) -> list[dict[str, Any]]:
        return [replace(MicroBatch.of(batch), padded=True).inputs()]


def _same_documents(config: Config, model: Any, *, fused: bool) -> tuple[Layout | None, list[Choice]]:
    """As :func:`slimtune.training.isolation.lay_out`, but each step has the documents of a pack in every case."""
    layout, choices = lay_out(config, model, fused=fused)
    if layout is None or layout.kind == "packed" or not config.packing:
        return layout, choices
    return _Rows(model, "padded"), []


def curve(model: str, data: str, steps: int, length: int, options: dict[str, Any]) -> dict[str, Any]:
    """The losses of one run, and its speed and peak."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        share = CAP / torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, share) if "fp16" in options.values() else 1.0)
    with tempfile.TemporaryDirectory() as folder:
        config = Config.make(
            model=model, data=data, output=Path(folder) / "run", max_length=length, micro_batch=2, max_steps=steps,
            max_dropped=0.9,
            gradient_accumulation=1, learning_rate=2e-4, lora_dropout=0.0, seed=1, eval_share=0.0,
            **({"compute_dtype": "bf16"} if torch.cuda.is_available() else {}) | options,
        )  # fmt: skip
        as_a_t4 = options.get("compute_dtype") == "fp16" and torch.cuda.is_available()
        with (
            mock.patch("slimtune.engine.inputs.choose", return_value="efficient") if as_a_t4 else nullcontext(),
            mock.patch("slimtune.prepare.lay_out", _same_documents),
        ):
            run = finetune(config)
        records = [record for record in run.metrics() if "step_seconds" in record]
    losses = [record["loss"] for record in records]
    return {
        "losses": losses,
        "grad_norms": [record.get("grad_norm") for record in records],
        "nonfinite": sum(loss is None or not math.isfinite(loss) for loss in losses),
        "tokens_s": statistics.median(record["tokens"] / record["step_seconds"] for record in records),
        "peak_gib": max(record["memory_bytes"] for record in records) / 2**30,
    }


def difference(a: list[float], b: list[float]) -> dict[str, float]:
    """Of two curves: the mean of the relative differences' magnitudes, and the relative difference of their means."""
    return {
        "mean_of_differences": statistics.fmean(abs(x - y) / y for x, y in zip(a, b, strict=True)),
        "difference_of_means": abs(statistics.fmean(a) - statistics.fmean(b)) / statistics.fmean(b),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--length", type=int, default=1024, help="tokens of the longest document, and half of a pack's")
    parser.add_argument("--runs", help="only these, separated by ;")
    parser.add_argument("--small", choices=SMALL, help="a small model of this family, trained here before")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    options = parser.parse_args()
    about, model = machine(), options.model
    results: dict[str, Any] = {}
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / f"{about['date']}-curves{f'-{options.small}' if options.small else ''}.json"
    if options.small:
        model = tempfile.mkdtemp()
        about["trained"] = small_model(options.small, options.model, options.data, Path(model))
        print(json.dumps(about["trained"]), flush=True)
    for name in options.runs.split(";") if options.runs else RUNS:
        results[name] = curve(model, options.data, options.steps, options.length, RUNS[name])
        other = PAIRS.get(name)
        if other in results:
            results[name]["against"] = {other: difference(results[name]["losses"], results[other]["losses"])}
        summary = {key: value for key, value in results[name].items() if key not in ("losses", "grad_norms")}
        print(
            json.dumps({name: summary, "first": results[name]["losses"][0], "last": results[name]["losses"][-1]}),
            flush=True,
        )
        written = {**about, "steps": options.steps, "length": options.length, "results": results}
        file.write_text(json.dumps(written, indent=1) + "\n")


if __name__ == "__main__":
    main()
