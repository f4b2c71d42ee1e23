"""``make families``: every text-generating architecture of the installed Transformers, each tried by itself.

A process a family, forked from one that has imported everything, so that a crash or a hang is that family's alone. What
was proven lies in ``build/families``; a second run goes on with what is missing. The table is written into
docs/models.md.

usage: python -m tests.families.registry [TYPE...]    all, or these again
       python -m tests.families.registry --table      the table alone
"""

from __future__ import annotations

import importlib.metadata
import json
import multiprocessing
import re
import resource
import signal
import sys
import tempfile
from contextlib import redirect_stderr, redirect_stdout
from datetime import date
from pathlib import Path
from typing import Any

import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.families.check import check

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "build" / "families"
PAGE = ROOT / "docs" / "models.md"
LIMIT_S = 300
"""Of computing: on a machine that does other things too, it takes longer by the clock."""
MOST_S = 3000
"""By the clock: what waits for something computes nothing."""
MARK = "<!-- the table below is written by `make families` -->\n"

# fmt: off
NO_CHAT_MODELS = frozenset({
    "bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "git", "megatron-bert",
    "rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm", "xlm-roberta", "xlm-roberta-xl",
    "xlnet", "xmod", "bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "marian", "mbart", "mvp", "pegasus",
    "plbart", "prophetnet", "trocr", "whisper", "musicgen", "musicgen_melody", "moshi", "reformer",
    "moss_transcribe_diarize", "gemma4_assistant", "gemma4_unified_assistant",
})
# fmt: on
"""Causal classes of encoders, and decoders of something that isn't text alone: nobody chats with them."""
# fmt: off
IMAGE_TEXT = (
    "aria", "aya_vision", "cohere2_vision", "deepseek_vl", "exaone4_5", "gemma3", "gemma3n", "gemma4", "glm4v",
    "glm4v_moe", "glm_ocr", "granite_docling", "hyperclovax_vision_v2", "idefics3", "internvl", "kosmos-2.5",
    "lfm2_vl", "lighton_ocr", "llama4", "llava", "llava_next", "llava_onevision", "minicpmv4_6", "minimax_m3_vl",
    "mistral3", "mistral_large4", "ovis2", "paddleocr_vl", "paligemma", "qwen2_5_vl", "qwen2_vl", "qwen3_5",
    "qwen3_vl", "qwen3_vl_moe", "smolvlm", "unlimited_ocr", "video_llama_3",
)
# fmt: on
"""Types whose text is trained within a class that reads images too; others of Transformers' list are much alike."""


def families() -> list[str]:
    """Model types, the image-text ones behind the text ones."""
    text = [name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name not in NO_CHAT_MODELS]
    return [*text, *(name for name in IMAGE_TEXT if name not in text)]


def prove_one(model_type: str) -> None:
    """In a process of its own: writes the family's proof."""
    resource.setrlimit(resource.RLIMIT_CPU, (LIMIT_S, LIMIT_S))
    with (
        tempfile.TemporaryDirectory(prefix="slimtune-family-") as folder,
        (RESULTS / "log.txt").open("a", encoding="utf-8") as log,
        redirect_stdout(log),
        redirect_stderr(log),
    ):
        proof = check(model_type, Path(folder)).as_dict()
        text = json.dumps(proof, indent=1).replace(folder, "…")
    (RESULTS / f"{model_type}.json").write_text(text + "\n", encoding="utf-8")


def prove_all(wanted: list[str]) -> None:
    """Each family that has no proof yet; ``wanted`` ones again."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # a fork keeps no pool of threads
    processes = multiprocessing.get_context("fork")
    for model_type in wanted or families():
        file = RESULTS / f"{model_type}.json"
        if file.is_file() and not wanted:
            continue
        file.unlink(missing_ok=True)
        process = processes.Process(target=prove_one, args=(model_type,))
        process.start()
        process.join(MOST_S)
        fault = {"process": f"it ended with {process.exitcode}"}
        if process.is_alive() or process.exitcode in (-signal.SIGXCPU, -signal.SIGKILL):
            process.kill()
            process.join()
            fault = {"time": f"no end after {LIMIT_S} s"}
        if not file.is_file():
            file.write_text(json.dumps({"model_type": model_type, "faults": fault}) + "\n", encoding="utf-8")
        print(_short(json.loads(file.read_text(encoding="utf-8"))), flush=True)


def _short(proof: dict[str, Any]) -> str:
    ends = {**proof.get("refused", {}), **proof.get("faults", {})}
    said = "; ".join(f"{step}: {text[:90]}" for step, text in ends.items() if step != "gguf")
    numbers = [proof.get(key) for key in ("gradient", "reload", "gradient_4bit", "reload_4bit")]
    told = " ".join("–" if number is None else format(number, ".0e") for number in numbers)
    return f"{proof['model_type']:24} {told}  {said}"


def table() -> str:
    """All proofs as a Markdown table, with the date and the versions."""
    proofs = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(RESULTS.glob("*.json"))]
    made = [proof for proof in proofs if "make" not in proof.get("faults", {})]
    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}" for name in ("transformers", "peft", "trl", "torch")
    )
    head = "| family | 4 bits | default targets | packed | gradient | in NF4 | engine | merge | GGUF | chat | limits |"
    lines = [
        f"{date.today().isoformat()}, {versions}, on a CPU: {len(made)} families. ",
        "",
        head,
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        *(_row(proof) for proof in made),
    ]
    without = [f"{proof['model_type']} ({_sentence(proof['faults']['make'])})" for proof in proofs if proof not in made]
    if without:
        lines += ["", f"No tiny model could be made of {', '.join(without)}."]
    if others := [proof["model_type"] for proof in made if _not_in_nf4(proof)]:
        lines += ["", f"Not trained in NF4 in this run: {', '.join(others)}."]
    if untried := [name for name in families() if not (RESULTS / f"{name}.json").is_file()]:
        lines += ["", f"Not tried in this run: {', '.join(untried)}."]
    return "\n".join(lines) + "\n"


def _not_in_nf4(proof: dict[str, Any]) -> bool:
    ended = {**proof.get("refused", {}), **proof.get("faults", {})}
    return proof.get("gradient_4bit") is None and not {"4-bit gradient", "process", "time"} & ended.keys()


def _row(proof: dict[str, Any]) -> str:
    refused, faults = proof.get("refused", {}), proof.get("faults", {})
    share = proof.get("four_bit_share")
    gradients = [proof.get("gradient"), proof.get("gradient_4bit")]
    limits = [f"{step}: {_sentence(text)}" for step, text in refused.items() if step != "gguf"]
    limits += [f"**{step}: {_sentence(text)}**" for step, text in faults.items()]
    if any(gradient is not None and gradient > 1e-4 for gradient in gradients):
        limits.insert(0, "it draws while it trains" if proof.get("draws") else "**gradients differ**")
    if any(apart is not None and apart > 1e-4 for apart in (proof.get("reload"), proof.get("reload_4bit"))):
        limits.insert(0, "**plain PEFT's logits differ**")
    cells = [
        proof["model_type"],
        "–" if share is None else f"{100 * share:.1f} %",
        proof.get("targets") or "–",
        proof.get("packed") or "–",
        *("–" if gradient is None else f"{gradient:.0e}" for gradient in gradients),
        (proof.get("engine") or "–").split(":")[0],
        proof.get("merge") or "–",
        proof.get("gguf") or "–",
        proof.get("chat") or "–",
        " · ".join(limits),
    ]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _sentence(text: str) -> str:
    return re.sub(r"\s+", " ", text).split(". ")[0][:140].rstrip(".")


def write_page() -> None:
    """Put the table into the page, below its mark."""
    before = PAGE.read_text(encoding="utf-8").split(MARK)[0]
    PAGE.write_text(before + MARK + "\n" + table(), encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--table"]:
        write_page()
    else:
        prove_all(sys.argv[1:])
        write_page()
