"""Config files of adapters, models and runs, each with one thing changed that no program would write.

Whatever stands there, a verb ends well, or with exit 2 and a message of bearable length: no fault of slimtune's own, no
signal, no hang, no memory without bound. ``make folders`` runs 2,400; FOLDERS_TRIALS=7,912 repeats some of them.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest

from tests.campaigns import campaign
from tests.campaigns.campaign import Process
from tests.campaigns.mutations import mutate

COUNT = int(os.environ.get("FOLDERS_CAMPAIGN", "12"))
SEED = int(os.environ.get("FOLDERS_SEED", "16"))
TRIALS = [int(number) for number in os.environ.get("FOLDERS_TRIALS", "").split(",") if number] or list(range(COUNT))
ROOM = 12 << 30
"""Bytes of address space that a verb may take: what the libraries map, and a few GiB."""


def bounded() -> None:
    """In the verb's process, before it."""
    resource.setrlimit(resource.RLIMIT_AS, (ROOM, ROOM))


@pytest.fixture(scope="module")
def whole(train: Callable[..., list[str]], parts: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that is done, and one that was stopped."""
    folder = tmp_path_factory.mktemp("whole")
    shutil.copytree(parts[0], folder / "model")
    for name, steps in (("run", "2"), ("stopped", "4")):
        arguments = train(folder / name, "--max-steps", steps, "--engine", "plain", "--eval-share", "0.2")
        process = Process(arguments, folder / "log.txt")
        assert process.wait() == 0, process.output()
    return folder


ASK = ("--prompt", "Say 3.", "--max-new-tokens", "2")
KINDS: dict[str, tuple[str, list[tuple[str, ...]]]] = {
    # what is copied and changed: the files, and the verbs that read them
    "run/adapter": (
        "adapter_config.json tokenizer_config.json tokenizer.json passport.json generation_config.json",
        [("chat", "{}", *ASK)],
    ),
    "model": (
        "config.json tokenizer_config.json tokenizer.json generation_config.json",
        [("chat", "{}", *ASK), ("train", "{}", "{rows}", "-o", "{out}", "--max-steps", "1", "--max-length", "64")],
    ),
    "run": (
        "config.yaml facts.json metrics.jsonl environment.json config.yaml facts.json",
        [("explain", "{}"), ("explain", "{}", "--lang", "zh", "--json"), ("resume", "{}")],
    ),
    "stopped": (
        "config.yaml facts.json metrics.jsonl",
        [("resume", "{}", "--accept-changes"), ("train", "--config", "{}/config.yaml", "-o", "{out}")],
    ),
}


def test_no_config_file_brings_a_verb_down(whole: Path, parts: tuple[Path, Path], tmp_path: Path) -> None:
    codes, faults = Counter[str](), []
    for trial in TRIALS:
        random = Random(f"{SEED} {trial}")  # each its own, so that one can be repeated alone
        kind = list(KINDS)[trial % len(KINDS)]
        names, verbs = KINDS[kind]
        copy = tmp_path / f"{kind.replace('/', '-')}{trial}"
        shutil.copytree(whole / kind, copy)
        plain = kind == "run/adapter" and random.random() < 0.5
        name = random.choice(names.split())
        if plain:  # without a passport: nothing else vouches for it
            (copy / "passport.json").unlink()
            _take_passport_out(copy / "adapter_model.safetensors")
            name = random.choice(["adapter_config.json"] * 3 + ["tokenizer_config.json"])
        done = mutate(copy / name, random)
        verb = random.choice(verbs)
        out = tmp_path / f"out{trial}"
        arguments = [word.format(copy, rows=parts[1], out=out) for word in verb]
        log = tmp_path / f"log{trial}.txt"
        process = Process(arguments, log, "tests.campaigns.test_folders:bounded")
        try:
            code = process.wait(90)
        except TimeoutError:
            code = -1
        said = process.output()
        codes[f"exit {code}"] += 1
        if code == 75 and "watchdog" in done:  # as it asks for
            code = 0
        is_broken_statement = code == 1 and verb[0] == "explain" and "internal error" not in said
        if (code not in (0, 2, 3) and not is_broken_statement) or len(said) > 40_000 or "\x1b" in said:
            told = f"trial {trial}: {kind}/{name}: {done}: {verb[0]}: exit {code}, {len(said):,} characters"
            faults.append(f"{told}\n{said[-1500:]}")
            print(faults[-1], flush=True)  # a run of an hour is looked at while it goes
        for path in (copy, out):
            shutil.rmtree(path, ignore_errors=True)
    assert not faults, f"{len(faults)} of {len(TRIALS)}\n\n" + "\n\n".join(faults[:40])
    if len(TRIALS) >= 2000:
        campaign.record("folders", {"files": len(TRIALS), "seed": SEED, **codes})


def _take_passport_out(file: Path) -> None:
    from safetensors.torch import load_file, save_file

    save_file(load_file(file), file)


def test_each_kind_is_sound_before_it_is_changed(whole: Path) -> None:
    """Or every refusal above would be of something else."""
    for kind, (names, _) in KINDS.items():
        for name in names.split():
            assert (whole / kind / name).is_file(), (kind, name)
    assert json.loads((whole / "run" / "facts.json").read_text())["verified"]["keys_match"]
