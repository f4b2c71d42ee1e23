"""Compares slimtune with the peers on one CUDA machine: python benchmarks/peers.py [W1 W2 ...] [--out FOLDER]

Every measurement is a process of its own: a random model of the workload's shape is loaded in NF4, wrapped in LoRA and
trained for a dozen steps by the peer's usual way in, paged_adamw_8bit throughout. slimtune runs as ``slimtune train``
does: data read and proven, SFTTrainer subclass, logging. A step's time is the median after the first four: for peers
from the beginning to the end of the Trainer's step, the device waited for; for slimtune from one log line to the next,
data and logging included. Peak memory is what PyTorch's allocator had given out at most. A peer that isn't installed
is left out, and said so. slimtune+fp8 is slimtune with its frozen weights multiplied in FP8. With $STEPS there are so
many, and a third of them are left out; ``8b-long``, one document of 65,536 tokens a step, wants few.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from workloads import SIZES, WORKLOADS, Workload

HERE = Path(__file__).parent
STEPS = int(os.environ.get("STEPS", "12"))
WARM_UP = STEPS // 3
STATES = ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj")
"""The projections of Qwen3.5's linear attention; of other models, PEFT finds none."""
PACKAGES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "liger-kernel", "axolotl", "unsloth", "triton")
# For each workload the peers worth their time: the notes' own stack, and whoever is fastest there.
RUNS: dict[str, tuple[str, ...]] = {
    "W1": ("slimtune", "slimtune+fp8", "slimtune@3.9GiB", "trl", "trl+liger", "axolotl-nogc", "unsloth", "trl+fuse"),
    "W1-all": ("slimtune", "slimtune+fp8", "unsloth"),
    "W2": ("slimtune", "trl", "trl+liger", "unsloth", "trl+fuse"),
    "W3": ("slimtune", "trl", "trl+liger", "trl-packing"),
    "W4": ("slimtune", "slimtune+fp8", "trl+liger", "unsloth"),
    "8b-all": ("slimtune", "slimtune+fp8", "unsloth"),
    "8b-long": ("slimtune@13.8GiB", "slimtune+fp8@13.8GiB", "unsloth"),
    "tiny": ("slimtune", "trl", "trl+fuse"),
    "tiny-chats": ("slimtune", "trl"),
}


# -- the model and the data --------------------------------------------------------------------------------------------


def make_folder(size: str, folder: Path) -> None:
    """A random Qwen2 in bf16 with a tokenizer of one token a letter, as a local model folder."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        **SIZES[size], max_position_embeddings=131072, rope_theta=1e6, tie_word_embeddings=False, bos_token_id=1,
        eos_token_id=2, pad_token_id=0, dtype=torch.bfloat16,
    )  # fmt: skip
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = Qwen2ForCausalLM(config)
    torch.set_default_dtype(before)
    # As GPT-2 begins, on embeddings of size 1: else nothing is left of a token behind many random layers but what they
    # make of rounding, and FP8 is refused for that.
    model.model.embed_tokens.weight.data.normal_()
    for layer in model.model.layers:
        for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
            linear.weight.data.mul_((2 * len(model.model.layers)) ** -0.5)
    model.save_pretrained(folder)
    letters().save_pretrained(folder)


def letters() -> Any:
    """A tokenizer of one token a letter."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    # Byte-level BPE without merges, which any Qwen2 tokenizer class reads back: a letter is a token.
    special = ["<pad>", "<bos>", "<eos>", "<unk>", "<user>", "<assistant>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({token: i for i, token in enumerate(special + alphabet)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>",
        additional_special_tokens=["<user>", "<assistant>"],
    )  # fmt: skip
    tokenizer.chat_template = (
        "{% for message in messages %}<{{ message.role }}>{{ message.content }}<eos>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    return tokenizer


def documents(workload: Workload, factor: int = 1) -> list[list[int]]:
    """Token ids of each document of a run."""
    rng = random.Random(1)
    lengths = workload.document_lengths(STEPS * factor)
    return [[rng.randrange(6, 1000) for _ in range(length)] for length in lengths]


def as_messages(row: list[int]) -> dict[str, Any]:
    """A chat that the template renders to as many tokens as ``row`` has."""
    text = "".join(chr(ord("a") + i % 26) for i in row)
    turns = {"user": text[:1], "assistant": text[1:-4]}
    return {"messages": [{"role": role, "content": content} for role, content in turns.items()]}


# -- one measurement ---------------------------------------------------------------------------------------------------


def run_slimtune(workload: Workload, folder: Path, memory: str, precision: str) -> dict[str, Any]:
    """The product itself: the recipe behind ``slimtune train``."""
    import torch

    from slimtune.config import Config
    from slimtune.recipes import finetune

    start = time.perf_counter()
    scratch = Path(tempfile.mkdtemp())
    # A pack holds as many chats as fit; so that every step has a full one, there are more of them than steps x rows.
    rows = documents(workload, factor=8 if workload.chats else 1)
    data = scratch / "rows.jsonl"
    data.write_text("".join(json.dumps(as_messages(row)) + "\n" for row in rows))
    config = Config.make(
        model=str(folder), data=str(data), output=scratch / "run", train_on="all",
        max_length=workload.length, micro_batch=workload.rows, gradient_accumulation=1, max_steps=STEPS,
        lora_r=workload.r, lora_dropout=workload.dropout, targets=workload.targets, memory=memory or "auto",
        precision=precision or "auto", engine="fused", save_steps=10 * STEPS, eval_share=0.0,
    )  # fmt: skip
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    run = finetune(config)
    records = [record for record in run.metrics() if "step_seconds" in record]
    timed = records[WARM_UP:]
    return {
        "step_ms": statistics.median(record["step_seconds"] for record in timed) * 1e3,
        "tokens_s": statistics.median(record["tokens"] / record["step_seconds"] for record in timed),
        "peak_gib": max(record["memory_bytes"] for record in records) / 2**30,
        "process_s": time.perf_counter() - start,
        "losses": [records[0]["loss"], records[-1]["loss"]],
    }


def run_peer(peer: str, workload: Workload, folder: Path) -> dict[str, Any]:
    """TRL's SFTTrainer, plain, unquantised, with Liger, Axolotl's LoRA kernels or slimtune's fuse; or Unsloth."""
    flags = set(peer.replace("-", "+").split("+"))
    checkpointing = "nogc" not in flags
    if "unsloth" in flags:
        import unsloth
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    cuda = torch.cuda.is_available()
    wait = torch.cuda.synchronize if cuda else (lambda: None)
    every = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", *STATES]
    targets = every if workload.targets == "all-linear" else list(workload.targets)
    lora: Any = LoraConfig(
        r=workload.r, lora_alpha=2 * workload.r, lora_dropout=workload.dropout, target_modules=targets,
        task_type="CAUSAL_LM",
    )  # fmt: skip
    if "unsloth" in flags:
        model, tokenizer = unsloth.FastLanguageModel.from_pretrained(
            str(folder), max_seq_length=workload.length, dtype=torch.bfloat16, load_in_4bit=True, local_files_only=True
        )
        model = unsloth.FastLanguageModel.get_peft_model(
            model, r=workload.r, lora_alpha=2 * workload.r, lora_dropout=workload.dropout, target_modules=targets,
            bias="none", use_gradient_checkpointing="unsloth", max_seq_length=workload.length,
        )  # fmt: skip
        lora = None
    else:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        quantization = None if "16bit" in flags else BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )  # fmt: skip
        model = AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=quantization, device_map={"": 0} if cuda else "cpu", dtype=torch.bfloat16
        )
        model.config.use_cache = False
    if "axolotl" in flags:
        model, lora = _with_axolotl_kernels(model, lora, folder, workload), None

    rows = documents(workload, factor=8 if "packing" in flags else 1)
    args = SFTConfig(
        output_dir=tempfile.mkdtemp(), per_device_train_batch_size=workload.rows, gradient_accumulation_steps=1,
        max_steps=STEPS, max_length=workload.length, packing="packing" in flags, optim="paged_adamw_8bit",
        learning_rate=2e-4, bf16=cuda, use_cpu=not cuda, logging_steps=1, save_strategy="no", report_to="none",
        disable_tqdm=True, use_liger_kernel="liger" in flags or "axolotl" in flags,
        gradient_checkpointing=checkpointing and "unsloth" not in flags,
        gradient_checkpointing_kwargs={"use_reentrant": False} if checkpointing else None,
    )  # fmt: skip
    times: list[float] = []

    class Clock(TrainerCallback):
        begin = 0.0

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            wait()
            self.begin = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            wait()
            times.append(time.perf_counter() - self.begin)

    trainer = SFTTrainer(
        model=model, args=args, train_dataset=Dataset.from_dict({"input_ids": rows}), processing_class=tokenizer,
        peft_config=lora, callbacks=[Clock()],
    )  # fmt: skip
    if "fuse" in flags:
        from slimtune.engine import fuse

        print(fuse(trainer.model))
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    trainer.train()
    timed = times[WARM_UP:]
    step = statistics.median(timed)
    if "packing" in flags:
        # TRL's packs hold at most max_length tokens; what a step really had is in its log.
        counts = [row["num_tokens"] for row in trainer.state.log_history if "num_tokens" in row]
        real = (counts[-1] - counts[WARM_UP - 1]) / len(timed)
    else:
        real = sum(map(len, rows)) / STEPS
    return {
        "step_ms": step * 1e3,
        "tokens_s": real * len(timed) / sum(timed) if workload.chats else real / step,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0,
        "losses": [row["loss"] for row in trainer.state.log_history if "loss" in row][:: STEPS - 1],
    }


def _with_axolotl_kernels(model: Any, lora: Any, folder: Path, workload: Workload) -> Any:
    """Axolotl's LoRA kernels under TRL's trainer, without the parts of Axolotl that need its whole environment."""
    import types

    import axolotl
    import axolotl.utils

    callbacks = types.ModuleType("axolotl.utils.callbacks")
    callbacks.__path__ = [str(Path(axolotl.__file__).parent / "utils" / "callbacks")]
    support: Any = types.ModuleType("axolotl.model_support")
    support.get_model_support = support.resolve_model_support = lambda *_: None
    sys.modules["axolotl.utils.callbacks"], sys.modules["axolotl.model_support"] = callbacks, support
    from axolotl.monkeypatch import lora_kernels
    from axolotl.utils.dict import DictDefault
    from peft import get_peft_model

    options = DictDefault(
        base_model=str(folder), lora_qkv_kernel=True, lora_o_kernel=True,
        lora_mlp_kernel=workload.targets == "all-linear", sequence_parallel_degree=1,
    )  # fmt: skip
    lora_kernels.patch_self_attn_lora(options)
    model = get_peft_model(model, lora)
    lora_kernels.apply_lora_kernel_patches(model, options)
    return model


def measure(peer: str, workload: Workload, folder: Path) -> dict[str, Any]:
    stack, _, memory = peer.partition("@")
    name, _, precision = stack.partition("+")
    return (
        run_slimtune(workload, folder, memory, precision) if name == "slimtune" else run_peer(stack, workload, folder)
    )


# -- all of them -------------------------------------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    import torch

    def version(package: str) -> str | None:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None

    cuda = torch.cuda.is_available()
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip() if cuda else None
    return {
        "date": datetime.date.today().isoformat(),
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "driver": driver,
        "cuda": torch.version.cuda,
        "versions": {package: version(package) for package in PACKAGES},
    }


def in_a_process(peer: str, name: str, folder: Path, limit: float) -> dict[str, Any]:
    environment = {
        **os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
        "UNSLOTH_DISABLE_STATISTICS": "1", "PYTHONWARNINGS": "ignore",
    }  # fmt: skip
    command = [sys.executable, str(Path(__file__)), "--one", peer, name, str(folder)]
    begin = time.perf_counter()
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=limit, check=False)
        lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
        result = json.loads(lines[-1][7:]) if lines else {"error": (done.stderr or done.stdout)[-1500:]}
    except subprocess.TimeoutExpired:
        result = {"error": f"took longer than {limit:.0f} s"}
    return {"workload": name, "stack": peer, **result, "whole_s": round(time.perf_counter() - begin, 1)}


def table(about: dict[str, Any], results: list[dict[str, Any]]) -> str:
    versions = ", ".join(f"{name} {value}" for name, value in about["versions"].items() if value)
    lines = [
        f"# slimtune and its peers, {about['date']}",
        "",
        f"{about['gpu']}, driver {about['driver']}, CUDA {about['cuda']}; {versions}.",
        f"Each once, in a process of its own; the median step after {WARM_UP}. Made by `python benchmarks/peers.py`.",
        "",
        "| workload | stack | step, ms | real tokens/s | peak, GiB |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in results:
        if "error" in row:
            lines.append(f"| {row['workload']} | {row['stack']} | failed: {row['error'].splitlines()[-1][:80]} | | |")
        else:
            lines.append(
                f"| {row['workload']} | {row['stack']} | {row['step_ms']:.1f} | {row['tokens_s']:,.0f} "
                f"| {row['peak_gib']:.2f} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workloads", nargs="*", default=["W1", "W1-all", "W2", "W3", "W4"])
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--stacks", help="only these, separated by commas")
    parser.add_argument("--limit", type=float, default=240.0, help="seconds for one measurement")
    parser.add_argument("--one", nargs=3, metavar=("STACK", "WORKLOAD", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        stack, name, folder = options.one
        print("RESULT " + json.dumps(measure(stack, WORKLOADS[name], Path(folder))), flush=True)
        return
    about, results = machine(), []
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / f"{about['date']}-peers.json"
    with tempfile.TemporaryDirectory() as scratch:
        for name in options.workloads:
            folder = Path(scratch) / WORKLOADS[name].size
            if not folder.exists():
                make_folder(WORKLOADS[name].size, folder)
            for stack in options.stacks.split(",") if options.stacks else RUNS[name]:
                if stack not in RUNS[name]:
                    continue
                result = in_a_process(stack, name, folder, options.limit)
                results.append(result)
                print(
                    json.dumps({**result, "error": result["error"][-300:]} if "error" in result else result), flush=True
                )
                file.write_text(json.dumps({**about, "results": results}, indent=1) + "\n")
                file.with_suffix(".md").write_text(table(about, results))
    print(table(about, results))


if __name__ == "__main__":
    main()
