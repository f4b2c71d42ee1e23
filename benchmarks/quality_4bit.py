"""What 4 bits cost a model of Qwen3.5's form: python benchmarks/quality_4bit.py MODEL [--tiny] [--processes 9]

For each of three seeds a small model with three layers of linear attention to one of full attention, twice, is trained
from random weights with MODEL's tokenizer: on the docstrings of Python's standard library, and on requests of the
demo's kind that are answered in a sentence. `slimtune train`'s own recipe then teaches it the demo's task (the same
requests, answered by JSON) on this base in 16 bits, in NF4, in NF4 but for one kind of layer, and in 16 bits but for
one kind of layer. Held out are requests for devices, rooms and actions that neither training had together. Measured
are the supervised tokens' loss after tuning, and of the base as it is the loss on docstrings that it didn't see; both
as the difference from 16 bits, with the 95 % interval over seeds and what was held out.
"""

from __future__ import annotations

import argparse
import ast
import json
import multiprocessing
import random
import statistics
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from curves import give_memory_
from peers import HERE, machine

from slimtune.base.load import load_base
from slimtune.base.quantizer import Policy, policy_of
from slimtune.config import Config
from slimtune.demo import ACTIONS, NEW_WORDINGS, WORDINGS, Row, rows
from slimtune.hardware import detect
from slimtune.recipes import finetune
from slimtune.run.interval import bootstrap

KINDS = {
    "inputs of linear attention": ("in_proj_qkv", "in_proj_z"),
    "decays of linear attention": ("in_proj_b", "in_proj_a"),
    "outputs of linear attention": ("out_proj",),
    "full attention": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "MLP": ("gate_proj", "up_proj", "down_proj"),
}
EVERY = frozenset(KINDS)
CASES: dict[str, frozenset[str]] = {
    "16 bits": frozenset(),
    "NF4": EVERY,
    **{f"NF4 but {kind}": EVERY - {kind} for kind in KINDS},
    **{f"{kind} alone in NF4": frozenset({kind}) for kind in KINDS},
}
"""By name, the kinds of layers that lie in 4 bits."""
WINDOW = 256
HELD_WINDOWS = 64


class Size(NamedTuple):
    """Of the model, and of its two trainings."""

    hidden: int
    layers: int
    steps: int
    rows: int
    """Windows of text to a step."""
    epochs: int
    """Of the tuning."""


SMALL, TINY = Size(256, 8, 500, 32, 12), Size(64, 4, 6, 2, 1)


# -- the model and its data --------------------------------------------------------------------------------------------


def docstrings() -> list[str]:
    """Those of the standard library, of a hundred characters and more, in the order of files and lines."""
    found = []
    for file in sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py")):
        if {"site-packages", "dist-packages", "test", "tests"} & set(file.parts):
            continue
        try:
            tree = ast.parse(file.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):  # templates and examples of other encodings
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                text = ast.get_docstring(node)
                if text and len(text) >= 100:
                    found.append(text)
    return found


def _asked(devices: set[tuple[str, str, str]], *, new: bool) -> list[Row]:
    """Each of these (device, room, action) in every wording."""
    made = []
    for device, room, action in sorted(devices):
        kind = ACTIONS[device]
        for wording in WORDINGS[kind] + (NEW_WORDINGS[kind] if new else ()):
            request = wording.format(device=device, room=room, action=action)
            made.append(Row(request[0].upper() + request[1:], {"device": device, "room": room, "action": action}))
    return made


def _combination(row: Row) -> tuple[str, str, str]:
    return row.answer["device"], row.answer["room"], row.answer["action"]


def held_out() -> list[Row]:
    """Requests that no training shows: each held-out combination of the demo in every wording, next to each other."""
    return _asked({_combination(row) for row in rows()[1]}, new=True)


def texts(tokenizer: Any) -> tuple[list[list[int]], list[list[int]]]:
    """Token ids of the documents that the base is trained on, and of docstrings that it isn't."""
    draw = random.Random(0)
    written = docstrings()
    draw.shuffle(written)
    ids = [tokenizer(text + tokenizer.eos_token, verbose=False)["input_ids"] for text in written]
    seen, unseen = ids[len(ids) // 20 :], ids[: len(ids) // 20]
    for row in _asked({_combination(row) for row in rows()[0]}, new=False):
        device, room, action = _combination(row)
        told = {"role": "assistant", "content": f"The {device} in the {room} is {action} now."}
        seen.append(tokenizer.apply_chat_template([row.messages[0], told], tokenize=True, return_dict=False))
    return seen, unseen


def make_base(source: str, folder: Path, size: Size, seed: int) -> dict[str, Any]:
    """Train one from random weights and save it, with MODEL's tokenizer and docstrings that it didn't see."""
    import transformers

    start = time.perf_counter()
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(source)
    seen, unseen = texts(tokenizer)
    stream = np.concatenate(unseen)
    windows = stream[: len(stream) // WINDOW * WINDOW].reshape(-1, WINDOW)[:HELD_WINDOWS]
    torch.manual_seed(seed)
    heads = size.hidden // 16
    config = transformers.Qwen3_5TextConfig(
        vocab_size=len(tokenizer), hidden_size=size.hidden, intermediate_size=3 * size.hidden,
        num_hidden_layers=size.layers, num_attention_heads=size.hidden // 64, num_key_value_heads=size.hidden // 64,
        head_dim=64, linear_num_key_heads=max(2, heads // 2), linear_num_value_heads=max(16, heads),
        linear_key_head_dim=32, linear_value_head_dim=32, tie_word_embeddings=True, max_position_embeddings=2048,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model: Any = transformers.AutoModelForCausalLM.from_config(config)
    give_memory_(model)
    model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, size.steps + 1, pct_start=0.1)
    draw, losses = random.Random(seed), []
    for _ in range(size.steps):
        rows_of = []
        while len(rows_of) < size.rows:
            row: list[int] = []
            while len(row) < WINDOW:
                row += draw.choice(seen)
            rows_of.append(row[:WINDOW])
        batch = torch.tensor(rows_of, device=device)
        with torch.autocast(device, torch.bfloat16):
            loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    model.bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    np.save(folder / "unseen.npy", windows)
    values = [float(loss) for loss in losses]
    weights = sum(each.numel() for each in model.model.layers.parameters())
    return {
        "seed": seed, "layers_weights": weights, "documents": len(seen), "tokens": sum(map(len, seen)),
        "steps": size.steps, "first": values[0], "last": statistics.fmean(values[-10:]),
        "seconds": time.perf_counter() - start,
    }  # fmt: skip


# -- one measurement ---------------------------------------------------------------------------------------------------


@contextmanager
def packing(kinds: frozenset[str]) -> Iterator[None]:
    """While the body runs, slimtune packs these kinds alone."""
    ends = {end for kind in kinds for end in KINDS[kind]}

    def chosen(model: Any) -> Policy:
        policy = policy_of(model)
        left = {name for name in policy.linears | policy.packed if name.split(".")[-2] not in ends}
        return replace(
            policy,
            linears=policy.linears - left,
            packed=policy.packed - left,
            left=policy.left | {name.removesuffix(".weight") for name in left},
        )

    with (
        mock.patch("slimtune.base.quantizer.policy_of", chosen),
        mock.patch("slimtune.base.quantizer.LEAST_SHARE", 0.0),
    ):
        yield


def measure(case: str, seed: int, base: Path, size: Size, until: float) -> dict[str, Any] | None:
    """One base tuned by the recipe: nats and tokens of everything held out; None if it is too late to begin."""
    if time.time() > until:
        return None
    torch.set_num_threads(1)
    start = time.perf_counter()
    dtype = "bf16" if torch.cuda.is_available() else "fp32"
    quantization = "nf4" if CASES[case] else "none"
    with tempfile.TemporaryDirectory() as scratch, packing(CASES[case]):
        loaded = load_base(str(base), detect(), compute_dtype=dtype, quantization=quantization)
        four_bit = sorted(
            {name.split(".")[-2] for name, each in loaded.model.named_parameters() if hasattr(each, "quant_state")}
        )
        wanted = sorted(end for kind in CASES[case] for end in KINDS[kind])
        if four_bit != wanted:
            raise RuntimeError(f"{case}: {four_bit} lie in 4 bits")
        written = _text_nats(loaded.model, np.load(base / "unseen.npy"))
        del loaded
        for name, part in (("train", rows()[0]), ("eval", held_out())):
            lines = "".join(json.dumps({"messages": row.messages}) + "\n" for row in part)
            Path(scratch, f"{name}.jsonl").write_text(lines)
        config = Config.make(
            model=str(base), data=f"{scratch}/train.jsonl", eval=f"{scratch}/eval.jsonl", output=Path(scratch) / "run",
            quantization=quantization, compute_dtype=dtype, max_length=128, micro_batch=16, gradient_accumulation=1,
            epochs=size.epochs, learning_rate=1e-3, seed=seed, eval_steps=10_000, engine="plain",
        )  # fmt: skip
        run = finetune(config)
        records = [record for record in run.metrics() if "held_out_nats" in record]
        losses = [record["loss"] for record in run.metrics() if "step_seconds" in record]
    first, last = records[0], records[-1]
    return {
        "case": case, "seed": seed, "steps": last["step"], "last_loss": losses[-1],
        "before": first["held_out_nats"], "nats": last["held_out_nats"], "tokens": last["held_out_tokens"],
        "text": written, "text_tokens": [WINDOW - 1] * len(written), "seconds": time.perf_counter() - start,
    }  # fmt: skip


@torch.inference_mode()
def _text_nats(model: Any, windows: Any) -> list[float]:
    """Of each window."""
    nats: list[float] = []
    for part in torch.from_numpy(windows).to(model.device).split(16):
        logits = model(input_ids=part, use_cache=False).logits[:, :-1].float()
        loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), part[:, 1:], reduction="none")
        nats += loss.sum(1).tolist()
    return nats


# -- all of them -------------------------------------------------------------------------------------------------------


def summary(runs: list[dict[str, Any]], plain: list[dict[str, Any]]) -> dict[str, Any]:
    """Of one case over its seeds, held against 16 bits over the same ones."""
    against = {run["seed"]: run for run in plain}
    made: dict[str, Any] = {"seeds": len(runs), "seconds": [r["seconds"] for r in runs]}
    for name, key, counts in (
        ("untuned", "before", "tokens"), ("tuned", "nats", "tokens"), ("text", "text", "text_tokens"),
    ):  # fmt: skip
        tokens = np.concatenate([run[counts] for run in runs])
        nats = np.concatenate([run[key] for run in runs])
        more = np.concatenate([np.subtract(run[key], against[run["seed"]][key]) for run in runs])
        made[name] = {
            **asdict(bootstrap(nats, tokens)),
            "above_16_bits": asdict(bootstrap(more, tokens)),
            "each_seed_above": [
                float(np.subtract(run[key], against[run["seed"]][key]).sum() / sum(run[counts])) for run in runs
            ],
        }
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=9)
    parser.add_argument("--cases", help="only these, separated by ;")
    parser.add_argument("--seconds", type=float, default=1e9, help="begin nothing new after so many")
    parser.add_argument("--tiny", action="store_true", help="a smaller model that learns next to nothing")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    options = parser.parse_args()
    until = time.time() + options.seconds
    size, seeds = TINY if options.tiny else SMALL, range(options.seeds)
    about: dict[str, Any] = {**machine(), "model": f"qwen3_5_text, {size.layers} layers of {size.hidden}"}
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / f"{about['date']}-quality-4bit.json"
    cases = ["16 bits", *options.cases.split(";")] if options.cases else list(CASES)
    context, found, results = multiprocessing.get_context("spawn"), list[dict[str, Any]](), dict[str, Any]()
    with tempfile.TemporaryDirectory() as scratch, ProcessPoolExecutor(options.processes, context) as pool:
        bases = [Path(scratch, str(seed)) for seed in seeds]
        making = [pool.submit(make_base, options.model, bases[seed], size, seed) for seed in seeds]
        about["trained"] = [future.result() for future in making]
        print(json.dumps(about["trained"]), flush=True)
        running = [pool.submit(measure, case, seed, bases[seed], size, until) for case in cases for seed in seeds]
        for future in running:
            run = future.result()
            if run is None:
                continue
            found.append(run)
            told = {
                "held_out": sum(run["nats"]) / sum(run["tokens"]),
                "text": sum(run["text"]) / sum(run["text_tokens"]),
                "last_loss": run["last_loss"],
            }
            short = {key: run[key] for key in ("case", "seed", "steps", "seconds")}
            print(json.dumps(short | told), flush=True)
            plain = [run for run in found if run["case"] == "16 bits"]
            results = {
                case: summary(runs, plain)
                for case in cases
                if len(runs := [run for run in found if run["case"] == case]) == len(seeds)
            }
            file.write_text(json.dumps({**about, "results": results}, indent=1) + "\n")
    for case, result in results.items():
        told = {key: result[key]["above_16_bits"] for key in ("untuned", "tuned", "text")}
        print(json.dumps({case: told}), flush=True)


if __name__ == "__main__":
    main()
