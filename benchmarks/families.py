"""Published shapes of today's families, some layers of each, trained packed on a GPU: benchmarks/families.py [OUT]

For each: the base in 4 bits as slimtune loads it, its default targets, a pack of documents as slimtune passes it, and
the LoRA gradients of one micro-batch. They are held against the CPU's: plain Transformers and PEFT in float32 on the
same 4-bit values, unpacked to numbers, the documents one by one. In bf16 the yardstick is what plain Transformers and
PEFT on the same GPU are away from that, one by one in bf16.
"""

from __future__ import annotations

import copy
import json
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import peers
import torch
import transformers as t
from peft import get_peft_model
from torch import Tensor, nn

from slimtune.adapter.lora import lora_config
from slimtune.adapter.targets import default_targets, find_targets
from slimtune.base.load import load_base
from slimtune.base.packed import unpack_
from slimtune.base.quantize import four_bit_share
from slimtune.batch import IGNORED, MicroBatch
from slimtune.config import Config
from slimtune.hardware import detect
from slimtune.training.isolation import find_layout

LENGTHS = (257, 40, 3, 600, 1, 123)
"""A document of one token, and one longer than gpt-oss's window of 128 and Gemma's of 512."""
VOCABULARY = 4096
_IDS: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "tie_word_embeddings": False}
SHAPES: dict[str, Any] = {
    "Qwen3-30B-A3B, 2 layers": lambda: t.Qwen3MoeConfig(
        vocab_size=VOCABULARY, hidden_size=2048, intermediate_size=6144, moe_intermediate_size=768,
        num_hidden_layers=2, num_attention_heads=32, num_key_value_heads=4, head_dim=128, num_experts=128,
        num_experts_per_tok=8, norm_topk_prob=True, **_IDS,
    ),
    "gpt-oss-20b, 2 layers": lambda: t.GptOssConfig(
        vocab_size=VOCABULARY, num_hidden_layers=2, num_local_experts=32,
        layer_types=["sliding_attention", "full_attention"], **_IDS,
    ),
    "Gemma 4, 2 layers": lambda: t.Gemma4TextConfig(
        vocab_size=VOCABULARY, vocab_size_per_layer_input=VOCABULARY, num_hidden_layers=2, num_kv_shared_layers=0,
        layer_types=["sliding_attention", "full_attention"], **{**_IDS, "tie_word_embeddings": True},
    ),
    "Gemma 3 4B, 2 layers": lambda: t.Gemma3TextConfig(
        vocab_size=VOCABULARY, hidden_size=2560, intermediate_size=10240, num_attention_heads=8, num_key_value_heads=4,
        head_dim=256, num_hidden_layers=2, sliding_window=512, layer_types=["sliding_attention", "full_attention"],
        **{**_IDS, "tie_word_embeddings": True},
    ),
    "Qwen3.5 4B, 2 layers": lambda: t.Qwen3_5TextConfig(
        vocab_size=VOCABULARY, hidden_size=2560, intermediate_size=9216, num_attention_heads=16, num_key_value_heads=4,
        head_dim=256, num_hidden_layers=2, layer_types=["linear_attention", "full_attention"], **_IDS,
    ),
}  # fmt: skip
SMALL = {
    "Qwen3-MoE, tiny": lambda: t.Qwen3MoeConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=64, moe_intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, num_experts=4, num_experts_per_tok=2, **_IDS,
    )
}  # fmt: skip


def make_folder(folder: Path, config: t.PreTrainedConfig, device: str) -> None:
    peers.make_folder("tiny", folder)
    for file in folder.glob("*.safetensors"):
        file.unlink()
    torch.manual_seed(0)
    with torch.device(device):
        model = t.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.02)
            else:  # where Transformers starts norms, biases and sinks at constants
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)


def wrapped(base: nn.Module, config: Config) -> Any:
    """With an adapter that isn't zero, the same each time."""
    model = get_peft_model(base, lora_config(config, find_targets(config, base)))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data = (0.02 * torch.randn(parameter.shape)).to(parameter.device)
    return model.train()


def gradients(model: Any, inputs: Iterable[dict[str, Any]], supervised: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Of the summed loss over ``supervised``, on the host."""
    device = next(model.parameters()).device
    model.zero_grad()
    for given in inputs:
        moved = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in given.items()}
        labels = moved.pop("labels")[:, 1:]
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            logits = model(**moved, use_cache=False).logits[:, :-1].float()
        loss = nn.functional.cross_entropy(
            logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum"
        )
        (loss / supervised).backward()
    return {name: p.grad.detach().float().cpu() for name, p in model.named_parameters() if p.grad is not None}


def distance(some: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """Of all gradients together, and of the matrix where it is largest."""
    if some.keys() != expected.keys():
        return {"missing": float(len(some.keys() ^ expected.keys()))}
    parts = {name: float((some[name] - want).norm() / want.norm()) for name, want in expected.items() if want.norm()}
    whole = torch.cat([x.flatten() for x in expected.values()])
    diff = torch.cat([(some[name] - want).flatten() for name, want in expected.items()])
    return {"all": float(diff.norm() / whole.norm()), "worst": max(parts.values())}


def micro_batch(*, padded: bool) -> MicroBatch:
    ids = torch.randint(6, VOCABULARY, (sum(LENGTHS),), generator=torch.Generator().manual_seed(5)).numpy()
    labels = ids.copy()
    start = 0
    for length in LENGTHS:
        labels[start] = IGNORED
        start += length
    return MicroBatch(ids, labels, LENGTHS, padded=padded)


def one_by_one() -> list[dict[str, Any]]:
    parts = [part.inputs() for part in micro_batch(padded=True).split(1) if part.supervised]
    return [{"input_ids": part["input_ids"], "labels": part["labels"]} for part in parts]


def measure(name: str, config: t.PreTrainedConfig, folder: Path) -> dict[str, Any]:
    hardware = detect()
    make_folder(folder, config, hardware.device)
    supervised = sum(LENGTHS) - len(LENGTHS)
    found: dict[str, Any] = {"shape": name}
    base = load_base(str(folder), hardware, compute_dtype="fp32")
    with torch.device("meta"):
        found["four_bit_share"] = round(four_bit_share(t.AutoModelForCausalLM.from_config(copy.deepcopy(config))), 4)
    names, _ = default_targets(base.model)
    settings = Config.make(model=str(folder), data="rows", targets=names, lora_dropout=0.0, compute_dtype="fp32")
    found["targets"] = list(names)
    begin = time.perf_counter()
    plain = base.model.dequantize(dtype=torch.float32)
    unpack_(plain)
    expected = gradients(wrapped(plain.cpu(), settings), one_by_one(), supervised, torch.float32)
    found["cpu_seconds"] = round(time.perf_counter() - begin, 1)
    del base, plain
    for dtype, kind in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
        model = wrapped(load_base(str(folder), hardware, compute_dtype=kind).model, settings)
        begin = time.perf_counter()
        isolation = find_layout(model, dtype=dtype)
        found[f"{kind}_proof_seconds"] = round(time.perf_counter() - begin, 2)
        layout = isolation.layout
        found[f"{kind}_layout"], found[f"{kind}_reasons"] = layout.kind, isolation.reasons
        micro = micro_batch(padded=layout.kind != "packed")

        def passed(micro: MicroBatch = micro, layout: Any = layout) -> Iterable[dict[str, Any]]:
            for piece in layout.pieces(micro.inputs()):
                with layout.passed(piece) as inputs:
                    yield inputs

        found[f"{kind}_slimtune"] = distance(gradients(model, passed(), supervised, dtype), expected)
        found[f"{kind}_plain"] = distance(gradients(model, one_by_one(), supervised, dtype), expected)
        del model
        if hardware.device == "cuda":
            torch.cuda.empty_cache()
    return found


def main() -> None:
    out = Path(sys.argv[1] if len(sys.argv) > 1 else "benchmarks/results")
    out.mkdir(parents=True, exist_ok=True)
    about, results = peers.machine(), []
    for name, config in (SHAPES if torch.cuda.is_available() else SMALL).items():
        with tempfile.TemporaryDirectory() as scratch:
            try:
                results.append(measure(name, config(), Path(scratch) / "model"))
            except Exception as error:  # noqa: BLE001 - told, and the next shape is measured
                results.append({"shape": name, "error": repr(error)[:600]})
        print(json.dumps(results[-1]), flush=True)
        (out / f"{about['date']}-families.json").write_text(json.dumps({**about, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
