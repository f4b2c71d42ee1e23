"""What the campaigns share: a small model, runs in processes of their own, and the count.

A run is the command line's own ``train`` or ``resume`` in a process forked from a server that has imported everything,
so that hundreds of them can be started and killed. ``CAMPAIGN=full`` in the environment runs the full counts and
writes the figures into ``benchmarks/results``; without it a few of each kind run.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import platform
import signal
import sys
import time
from collections.abc import Sequence
from datetime import date
from hashlib import sha256
from pathlib import Path
from typing import Any

from safetensors import safe_open

FULL = os.environ.get("CAMPAIGN") == "full"
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"

os.environ.setdefault("OMP_NUM_THREADS", "1")
# A process that has touched CUDA can't be forked, so on a GPU every run starts from nothing: CAMPAIGN_START=spawn.
CONTEXT = multiprocessing.get_context(os.environ.get("CAMPAIGN_START", "forkserver"))
CONTEXT.set_forkserver_preload(["slimtune.recipes", "slimtune.cli.train", "slimtune.cli.resume"])

OPTIONS = [
    "--max-length", "128", "--pack-tokens", "128", "--gradient-accumulation", "3", "--epochs", "2.5",
    "--learning-rate", "2e-3", "--lora-dropout", "0.2", "--save-steps", "2",
    "--compute-dtype", "fp32", "--warmup", "0.1",
]  # fmt: skip
"""Dropout on, accumulation on and not dividing an epoch, packed, across epochs."""


def count(full: int, few: int) -> int:
    """How many trials to run."""
    return full if FULL else few


def record(name: str, figures: dict[str, Any]) -> None:
    """Write a full campaign's figures, dated, with machine and versions; a small one leaves no trace."""
    if not FULL:
        return
    from slimtune.hardware import detect
    from slimtune.run.environment import library_versions

    machine = {"cpu": detect().name, "system": platform.platform(), "python": platform.python_version()}
    content = {"date": date.today().isoformat(), **figures, "machine": machine, "versions": library_versions()}
    file = RESULTS / f"{date.today().isoformat()}-reliability-{name}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_model(folder: Path, hidden: int = 64, *, layers: int = 2, tied: bool = True, seed: int = 0) -> Path:
    """A random Llama over bytes, so that a run starts, trains and is compared in a second or two."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: number for number, letter in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
        additional_special_tokens=["<|im_start|>"],
    )
    tokenizer.chat_template = TEMPLATE
    torch.manual_seed(seed)
    architecture = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=tied, pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(architecture).bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_rows(file: Path, rows: int = 36) -> Path:
    """Short conversations of different lengths."""
    with file.open("w", encoding="utf-8") as lines:
        for number in range(rows):
            ask = f"Say {number}{', please' * (number % 4)}."
            reply = f"{number}." + " Yes." * (number % 5)
            messages = [{"role": "user", "content": ask}, {"role": "assistant", "content": reply}]
            lines.write(json.dumps({"messages": messages}) + "\n")
    return file


class Process:
    """One ``slimtune`` command in a forked process; its output goes to a file.

    Args:
        arguments: The command line's.
        log: Where stdout and stderr go.
        before: ``module:function`` called in the new process before the command, with ``values``.
    """

    def __init__(self, arguments: Sequence[str], log: Path, before: str = "", **values: Any) -> None:
        self.log = log
        self._process = CONTEXT.Process(target=_run, args=(list(arguments), str(log), before, values), daemon=True)
        self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process.exitcode is None

    def send(self, number: int) -> None:
        """Send a signal, if it still runs."""
        if self.running:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send(signal.SIGKILL)
        self.wait()

    def wait(self, seconds: float = 300.0) -> int:
        """Its exit code; negative for a signal that ended it."""
        self._process.join(seconds)
        code = self._process.exitcode
        if code is None:
            self._process.kill()
            raise TimeoutError(f"still running after {seconds} s\n{self.output()}")
        return code

    def output(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""


def _run(arguments: list[str], log: str, before: str, values: dict[str, Any]) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    if before:
        module, _, name = before.partition(":")
        getattr(importlib.import_module(module), name)(**values)
    from slimtune.cli import main

    sys.argv = ["slimtune", *arguments]
    main()


def wait_until(condition: Any, process: Process, seconds: float = 120.0, pause: float = 0.0005) -> bool:
    """Until ``condition()`` holds; False if the process ended first."""
    deadline = time.monotonic() + seconds
    while not condition():
        if not process.running:
            return False
        if time.monotonic() > deadline:
            raise TimeoutError(process.output())
        time.sleep(pause)
    return True


def trajectory(run: Path) -> dict[int, tuple[float, float]]:
    """Loss and gradient norm of each step; of a step that was trained twice, the last."""
    steps: dict[int, tuple[float, float]] = {}
    for line in (run / "metrics.jsonl").read_text("utf-8").splitlines():
        record = json.loads(line)
        if "loss" in record:
            steps[record["step"]] = (record["loss"], record["grad_norm"])
    return steps


def adapter_sha256(run: Path) -> str:
    """SHA-256 of the final adapter's file, passport and all."""
    return sha256((run / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()


def adapter_values(run: Path) -> dict[str, bytes]:
    """The final adapter's tensors, for runs whose passports may differ."""
    with safe_open(run / "adapter" / "adapter_model.safetensors", framework="pt") as file:
        return {name: file.get_tensor(name).numpy().tobytes() for name in sorted(file.keys())}


def in_a_save(run: Path) -> bool:
    """Whether a process that was killed left a save unfinished."""
    return any((run / "checkpoints").glob(".*"))
