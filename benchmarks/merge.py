"""How much memory does merging a 7B model take? Weights and adapter of Qwen2.5-7B's shape, in a process of its own.

The base's values are zeros in a sparse file: memory depends on the shapes, not on the values. The merged model is
written for real (15 GB) and removed.

    python benchmarks/merge.py -o benchmarks/results/DATE-merge.json
"""

from __future__ import annotations

import argparse
import json
import math
import struct
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path

import torch
from safetensors.torch import save_file

from slimtune.hardware import detect
from slimtune.run.environment import library_versions

HIDDEN, INTER, KV, VOCABULARY, RANK = 3584, 18944, 512, 152064, 8
TARGETS = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KV, HIDDEN),
    "self_attn.v_proj": (KV, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INTER, HIDDEN),
    "mlp.up_proj": (INTER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INTER),
}
CHILD = """
import resource, sys, time
from pathlib import Path
from slimtune.adapter.merged import MergedWeights
from slimtune.use.merge import write_weights
started = time.perf_counter()
base, adapter, output = map(Path, sys.argv[1:])
write_weights(MergedWeights(base, adapter), output)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, time.perf_counter() - started)
"""


def sparse_base(folder: Path, layers: int) -> int:
    """A base of zeros; the bytes of its weights."""
    folder.mkdir()
    shapes = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN), "model.norm.weight": (HIDDEN,)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        shapes |= {f"{prefix}{name}.weight": shape for name, shape in TARGETS.items()}
        shapes |= {f"{prefix}{name}.weight": (HIDDEN,) for name in ("input_layernorm", "post_attention_layernorm")}
    shapes["lm_head.weight"] = (VOCABULARY, HIDDEN)
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2", "tie_word_embeddings": False}))
    return end


def adapter(folder: Path, layers: int) -> None:
    folder.mkdir()
    tensors = {}
    for layer in range(layers):
        for name, (rows, columns) in TARGETS.items():
            key = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{key}.lora_A.weight"] = torch.randn(RANK, columns)
            tensors[f"{key}.lora_B.weight"] = torch.randn(rows, RANK)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--layers", type=int, default=28, help="fewer take less time and disk")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        size = sparse_base(folder / "base", options.layers)
        adapter(folder / "adapter", options.layers)
        (folder / "merged").mkdir()
        words = [sys.executable, "-c", CHILD, *(str(folder / name) for name in ("base", "adapter", "merged"))]
        done = subprocess.run(words, capture_output=True, text=True, check=True)
        peak, seconds = map(float, done.stdout.split())
        written = sum(file.stat().st_size for file in (folder / "merged").glob("*.safetensors"))
    record = {
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": detect().name,
        "versions": library_versions(),
        "model": f"shape of Qwen2.5-7B, {options.layers} of 28 layers, all linear layers adapted",
        "base_bytes": size,
        "written_bytes": written,
        "peak_resident_bytes": int(peak),
        "seconds": round(seconds, 1),
    }
    print(json.dumps(record, indent=2))
    if options.output:
        options.output.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
