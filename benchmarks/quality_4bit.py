"""What 4 bits cost a model of Qwen3.5's form: python benchmarks/quality_4bit.py [--size few] [--processes 3]

For each of three seeds a small model, three layers of linear attention to one of full attention, is trained from random
weights, letter by letter: on the docstrings of Python's standard library, and on requests of the demo's kind that are
answered in a sentence. slimtune's engine then teaches it the demo's task (the same requests, answered by JSON; LoRA on
what mixes tokens) on this base in 16 bits, in NF4, in NF4 but for one kind of layer, and in 16 bits but for one kind.
Held out are requests for devices, rooms and actions that no training had together. Measured are the loss of the
answers' letters after tuning, and of the base as it is the loss on docstrings that it didn't see; both as the
difference from 16 bits, with the 95 % interval over seeds and what was held out. On a CPU "16 bits" are 32.
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
from curves import give_memory_, quick_states
from peers import HERE, letters, machine

from slimtune.adapter.lora import lora_config
from slimtune.adapter.targets import default_targets, find_targets
from slimtune.base.load import load_base, torch_dtype
from slimtune.base.quantizer import Policy, policy_of
from slimtune.batch import IGNORED, MicroBatch
from slimtune.config import Config
from slimtune.demo import ACTIONS, NEW_WORDINGS, WORDINGS, Row, rows
from slimtune.engine import Engine, FusedAdamW8bit
from slimtune.hardware import detect
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
WINDOW = 192
HELD_WINDOWS = 64
PACK = 4096
"""Tokens of a step of the tuning."""


class Size(NamedTuple):
    """Of the model, and of its two trainings."""

    hidden: int
    layers: int
    steps: int
    windows: int
    """Of text, to a step."""
    epochs: int
    """Of the tuning."""


SIZES = {"tiny": Size(64, 4, 4, 2, 1), "small": Size(128, 4, 250, 8, 3), "few": Size(256, 8, 600, 32, 12)}


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


def _asked(combinations: set[tuple[str, str, str]], *, new: bool) -> list[Row]:
    """Each of these (device, room, action) in every wording."""
    made = []
    for device, room, action in sorted(combinations):
        kind = ACTIONS[device]
        for wording in WORDINGS[kind] + (NEW_WORDINGS[kind] if new else ()):
            request = wording.format(device=device, room=room, action=action)
            made.append(Row(request[0].upper() + request[1:], {"device": device, "room": room, "action": action}))
    return made


def _combination(row: Row) -> tuple[str, str, str]:
    return row.answer["device"], row.answer["room"], row.answer["action"]


def held_out() -> list[list[Row]]:
    """Requests that no training shows: each of the demo's held-out combinations, in every wording."""
    return [_asked({_combination(row)}, new=True) for row in rows()[1]]


def texts(tokenizer: Any) -> tuple[list[list[int]], list[list[int]], list[list[int]]]:
    """Token ids of docstrings and of chats that the base is trained on, and of docstrings that it isn't."""
    draw = random.Random(0)
    written = docstrings()
    draw.shuffle(written)
    ids = [tokenizer(text + tokenizer.eos_token, verbose=False)["input_ids"] for text in written]
    chats = []
    for row in _asked({_combination(row) for row in rows()[0]}, new=False):
        device, room, action = _combination(row)
        told = {"role": "assistant", "content": f"The {device} in the {room} is {action} now."}
        chats.append(tokenizer.apply_chat_template([row.messages[0], told], tokenize=True, return_dict=False))
    return ids[len(ids) // 20 :], chats, ids[: len(ids) // 20]


def make_base(folder: Path, size: Size, seed: int) -> dict[str, Any]:
    """Train one from random weights and save it, with its tokenizer and docstrings that it didn't see."""
    import transformers

    start, tokenizer = time.perf_counter(), letters()
    written, chats, unseen = texts(tokenizer)
    stream = np.concatenate(unseen)
    windows = stream[: len(stream) // WINDOW * WINDOW].reshape(-1, WINDOW)[:HELD_WINDOWS]
    torch.manual_seed(seed)
    heads = max(16, size.hidden // 16)
    config = transformers.Qwen3_5TextConfig(
        vocab_size=len(tokenizer), hidden_size=size.hidden, intermediate_size=3 * size.hidden,
        num_hidden_layers=size.layers, num_attention_heads=size.hidden // 32, num_key_value_heads=size.hidden // 64,
        head_dim=64, linear_num_key_heads=heads // 2, linear_num_value_heads=heads, linear_key_head_dim=16,
        linear_value_head_dim=16, tie_word_embeddings=True, max_position_embeddings=2048,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model: Any = transformers.AutoModelForCausalLM.from_config(config)
    give_memory_(model)
    model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, size.steps + 1, pct_start=0.1)
    draw, losses = random.Random(seed), []
    with quick_states(model):
        for _ in range(size.steps):
            batch = torch.tensor(
                [_window(chats if at % 2 else written, draw) for at in range(size.windows)], device=device
            )
            with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
                loss = model(input_ids=batch, labels=batch, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
    (model.bfloat16() if device == "cuda" else model).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    np.save(folder / "unseen.npy", windows)
    values = [float(loss) for loss in losses]
    weights = sum(each.numel() for each in model.model.layers.parameters())
    return {
        "seed": seed, "layers_weights": weights, "letters": sum(map(len, written)) + sum(map(len, chats)),
        "steps": size.steps, "first": values[0], "last": statistics.fmean(values[-10:]),
        "seconds": time.perf_counter() - start,
    }  # fmt: skip


def _window(documents: list[list[int]], draw: random.Random) -> list[int]:
    row: list[int] = []
    while len(row) < WINDOW:
        row += draw.choice(documents)
    return row[:WINDOW]


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


def _pack(tokenizer: Any, chats: list[Row]) -> dict[str, Any]:
    """Rows as one micro-batch; answers are supervised."""
    ids: list[list[int]] = []
    labels: list[list[int]] = []
    for row in chats:
        whole, asked = (
            tokenizer.apply_chat_template(part, tokenize=True, return_dict=False, add_generation_prompt=len(part) == 1)
            for part in (row.messages, row.messages[:1])
        )
        ids.append(whole)
        labels.append([IGNORED] * len(asked) + whole[len(asked) :])
    flat = (np.array([token for each in some for token in each], np.int64) for some in (ids, labels))
    return MicroBatch(*flat, tuple(map(len, ids))).inputs()


def measure(case: str, seed: int, base: Path, size: Size, *, tuned: bool) -> dict[str, Any]:
    """One base, as it is and, if wanted, tuned: nats and tokens of everything held out."""
    from peft import get_peft_model

    start, dtype = time.perf_counter(), "bf16" if torch.cuda.is_available() else "fp32"
    with packing(CASES[case]):
        how = "nf4" if CASES[case] else "none"
        loaded = load_base(str(base), detect(), compute_dtype=dtype, quantization=how)
    four_bit = {name.split(".")[-2] for name, each in loaded.model.named_parameters() if hasattr(each, "quant_state")}
    if four_bit != {end for kind in CASES[case] for end in KINDS[kind]}:
        raise RuntimeError(f"{case}: {sorted(four_bit)} lie in 4 bits")
    written = _text_nats(loaded.model, np.load(base / "unseen.npy"))
    config = Config.make(lora_dropout=0.0, targets=tuple(default_targets(loaded.model)[0]))
    torch.manual_seed(seed)
    model = get_peft_model(loaded.model, lora_config(config, find_targets(config, loaded.model)))
    engine = Engine(model, dtype=torch_dtype(dtype), tokens=PACK, seed=seed)
    optimizer = FusedAdamW8bit(engine.flat, lr=0.0)
    training, draw = list(rows()[0]), random.Random(seed)
    groups = [_pack(loaded.tokenizer, group) for group in held_out()]
    before, tokens = _held_nats(engine, groups)
    every = 20
    steps, losses = size.epochs * len(training) // every if tuned else 0, []
    for step in range(steps):
        if step % (len(training) // every) == 0:
            draw.shuffle(training)
        at = step * every % len(training)
        batch = _pack(loaded.tokenizer, training[at : at + every])
        optimizer.param_groups[0]["lr"] = 2e-3 * min(1.0, (step + 1) / 5, (steps - step) / steps)
        losses.append(float(engine.forward_backward(batch, int((batch["labels"] != IGNORED).sum()))))
        optimizer.clip_(1.0)
        optimizer.step()
        engine.flat.grad.zero_()
    nats = _held_nats(engine, groups)[0] if tuned else []
    return {
        "case": case, "seed": seed, "steps": steps, "losses": losses, "before": before, "nats": nats,
        "tokens": tokens, "text": written, "text_tokens": [WINDOW - 1] * len(written),
        "seconds": time.perf_counter() - start,
    }  # fmt: skip


def _held_nats(engine: Engine, groups: list[dict[str, Any]]) -> tuple[list[float], list[int]]:
    """Of each combination."""
    found = [engine.evaluate(group) for group in groups]
    return [float(total) for total, _ in found], [count for _, count in found]


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


def one_seed(seed: int, size: Size, cases: list[str], tuned: list[str]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A base, and every case of it."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        about = make_base(Path(folder), size, seed)
        print(json.dumps(about), flush=True)
        found = []
        for case in cases:
            found.append(run := measure(case, seed, Path(folder), size, tuned=case in tuned))
            told = {
                key: sum(run[key]) / sum(run[counts])
                for key, counts in (("before", "tokens"), ("nats", "tokens"), ("text", "text_tokens"))
            }
            short = {key: run[key] for key in ("case", "seed", "steps", "seconds")}
            print(json.dumps(short | told), flush=True)
    return about, found


def summary(runs: list[dict[str, Any]], plain: list[dict[str, Any]]) -> dict[str, Any]:
    """Of one case over its seeds, held against 16 bits over the same ones."""
    against = {run["seed"]: run for run in plain}
    made: dict[str, Any] = {"seeds": len(runs), "seconds": [run["seconds"] for run in runs]}
    for name, key, counts in (
        ("untuned", "before", "tokens"), ("tuned", "nats", "tokens"), ("text", "text", "text_tokens"),
    ):  # fmt: skip
        if not runs[0][key]:
            continue
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
    parser.add_argument("--size", choices=SIZES, default="few")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=3)
    parser.add_argument("--cases", help="only these beside 16 bits, separated by ;")
    parser.add_argument("--tuned", help="tune these alone; of the others, what they are worth as they are")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    options = parser.parse_args()
    size = SIZES[options.size]
    about: dict[str, Any] = {
        **machine(), "model": f"qwen3_5_text, {size.layers} layers of {size.hidden}", **size._asdict()
    }  # fmt: skip
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / f"{about['date']}-quality-4bit.json"
    cases = ["16 bits", *options.cases.split(";")] if options.cases else list(CASES)
    tuned = options.tuned.split(";") if options.tuned else cases
    about["trained"], found = [], []
    results: dict[str, Any] = {}
    with ProcessPoolExecutor(options.processes, multiprocessing.get_context("spawn")) as pool:
        for future in [pool.submit(one_seed, seed, size, cases, tuned) for seed in range(options.seeds)]:
            trained, runs = future.result()
            about["trained"].append(trained)
            found += runs
            plain = [run for run in found if run["case"] == "16 bits"]
            results = {case: summary([run for run in found if run["case"] == case], plain) for case in cases}
            file.write_text(json.dumps({**about, "results": results}, indent=1) + "\n")
    for case, result in results.items():
        told = {key: result[key]["above_16_bits"] for key in ("untuned", "tuned", "text") if key in result}
        print(json.dumps({case: told}), flush=True)


if __name__ == "__main__":
    main()
