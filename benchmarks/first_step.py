"""Seconds from `slimtune train`'s start to its first step's end: python benchmarks/first_step.py [1.8b] [--out FOLDER]

A random model of the size's shape lies in a local folder; a small file of chats is trained on for two steps of the
workload W1. Every run finds the libraries' bytecode, as where they are installed; the first finds no cache of Triton's,
of the data's or of the base's 4-bit bytes, the ones after it find all. Each line on the screen is written down with its
second.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from peers import HERE, as_messages, documents, machine, make_folder
from workloads import WORKLOADS

REPEATS = 3
LABELS = ("data", "base", "adapter", "training", "saved")


def installed(scratch: Path) -> dict[str, str]:
    """An environment in which modules have their bytecode once they were read, as libraries that are installed do."""
    kept = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    return {**kept, "PYTHONPYCACHEPREFIX": str(scratch / "bytecode")}


def seconds(model: Path, rows: Path, run: Path, options: list[str]) -> dict[str, float]:
    """When each line came, in seconds since the command's start; ``first step`` is the first record in the metrics.

    Raises:
        RuntimeError: The command failed.
    """
    command = [sys.executable, "-c", "from slimtune.cli import main; main()", "train", str(model), str(rows)]
    begin = time.monotonic()
    environment = {
        **installed(run.parent),
        "XDG_CACHE_HOME": str(run.parent / "cache"),
        "TRITON_CACHE_DIR": str(run.parent / "triton"),
    }
    process = subprocess.Popen([*command, "-o", str(run), *options], stderr=subprocess.PIPE, text=True, env=environment)
    reached: dict[str, float] = {}
    lines: list[str] = []
    for line in process.stderr or ():
        lines.append(line)
        words = line.split()
        if words and words[0] in LABELS:
            label = " ".join(words[:2]) if words[0] == "training" else words[0]
            reached.setdefault(label, round(time.monotonic() - begin, 2))
    if process.wait():
        raise RuntimeError("".join(lines[-20:]))
    first = next(key for key in reached if key.startswith("training 1/"))
    return {**reached, "first step": reached[first]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("size", nargs="?", default="1.8b")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    options = parser.parse_args()
    about, results = machine(), []
    workload = WORKLOADS["W1" if options.size == "1.8b" else options.size]
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        model, rows = Path(scratch) / options.size, Path(scratch) / "rows.jsonl"
        make_folder(options.size, model)
        read = [sys.executable, "-c", "import slimtune.recipes"]
        subprocess.run(read, env=installed(Path(scratch)), capture_output=True, check=True)
        rows.write_text("".join(json.dumps(as_messages(row)) + "\n" for row in documents(workload)))
        flags: list[Any] = [
            "--train-on", "all", "--max-length", workload.length, "--micro-batch", workload.rows, "--max-steps", 2,
            "--gradient-accumulation", 1, "--save-steps", 100,
        ]  # fmt: skip
        for number in range(REPEATS):
            results.append(seconds(model, rows, Path(scratch) / f"run{number}", list(map(str, flags))))
            print(json.dumps(results[-1]), flush=True)
    content = {**about, "size": options.size, "seconds": results}
    (options.out / f"{about['date']}-first-step.json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
