"""Publish an adapter on the hub, with a model card made of what the run recorded."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError, HTTPError  # type: ignore[attr-defined]  # of its HTTP library

from slimtune.adapter.passport import PASSPORT_FILE, Passport
from slimtune.adapter.settings import adapter_config
from slimtune.data.stops import GENERATION_CONFIG
from slimtune.errors import UserError
from slimtune.run.chart import Line, line_chart
from slimtune.run.folder import RunFolder
from slimtune.run.history import read_history
from slimtune.run.statement import sentence
from slimtune.run.verdict import verdict_text
from slimtune.use.load import Found
from slimtune.use.merge import new_folder

__all__ = ["model_card", "push"]

_TOLD = ("quantization", "lora_r", "targets", "learning_rate", "max_length", "seed")
"""Keys of the config that the card names."""

_FILES = (
    "adapter_model.safetensors", "adapter_config.json", PASSPORT_FILE, "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "vocab.json", "merges.txt", "tokenizer.model", "added_tokens.json",
    "chat_template.jinja", GENERATION_CONFIG,
)  # fmt: skip
_STYLE = (
    "<style>.grid{stroke:#8884}.tick{font:11px sans-serif;fill:#888}path{fill:none;stroke:#2a6;stroke-width:2}</style>"
)


def push(found: Found, target: str, *, private: bool = True) -> str:
    """Publish the adapter, its tokenizer, passport and card.

    Args:
        found: The run or adapter.
        target: A repository (owner/name), or a folder (``./out``, ``/path``) that gets the same files.
        private: Whether a repository that is made for it is private.

    Returns:
        Where it is now.

    Raises:
        UserError: There is no adapter, or the hub refuses or can't be reached.
    """
    if found.adapter is None:
        raise UserError(f"{found.name} is a bare model: there is no adapter to publish")
    texts = {"README.md": model_card(found, target)}
    if curve := _loss_curve(found.run):
        texts["loss.svg"] = curve
    files = [found.adapter / name for name in _FILES if (found.adapter / name).is_file()]
    if target.startswith((".", "/", "~")):
        folder = Path(target).expanduser()
        with new_folder(folder / ".new") as made:  # nothing of it is seen before all of it is there
            for file in files:
                shutil.copyfile(file, made / file.name)
            for name, text in texts.items():
                (made / name).write_text(text, encoding="utf-8")
            for file in sorted(made.iterdir()):
                file.replace(folder / file.name)
        (folder / ".new").rmdir()
        return str(folder)
    api = HfApi()
    try:
        api.create_repo(target, private=private, exist_ok=True)
        for file in files:
            api.upload_file(path_or_fileobj=file, path_in_repo=file.name, repo_id=target)
        for name, text in texts.items():
            api.upload_file(path_or_fileobj=text.encode(), path_in_repo=name, repo_id=target)
    except (HTTPError, HFValidationError, OSError) as error:
        raise UserError(
            f"the hub did not take {target}: {str(error).strip().splitlines()[0]}",
            way_out="Check the network and the name, and log in with a token that may write (hf auth login); "
            f"for a folder, give ./{target}",
        ) from None
    return f"https://huggingface.co/{target}"


def model_card(found: Found, target: str) -> str:
    """The card: front matter that the hub reads, what it was trained on, the scores, and how to load it."""
    passport = found.passport
    base = passport.base if passport else found.base.name
    origin = _json(found.base / "origin.json")
    hub_base = origin.get("model") or (base if re.fullmatch(r"[\w.-]+/[\w.-]+", base) else None)
    licence = _licence(found.base) or origin.get("licence", "").lower() or None
    front: dict[str, Any] = {"library_name": "peft", "pipeline_tag": "text-generation", "tags": ["lora", "slimtune"]}
    front |= {"base_model": hub_base} if hub_base else {}
    front |= {"license": licence} if licence else {}
    name = target.rstrip("/").rpartition("/")[2]
    run = found.run
    facts = run.facts() | read_history(run.metrics()).on_the_way if run else {}
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n",
        f"# {name}\n",
        f"A LoRA adapter for `{hub_base or base}`, trained with slimtune.",
        "The licence is the base's own." if licence else "The base states no licence: check it before you use this.",
        *(_training(passport, facts) if passport else []),
        *(["\n![loss by optimizer step](loss.svg)"] if _loss_curve(run) else []),
        *_verdict(facts),
        *_scores(run),
        _how_to_load(found, hub_base or base, target),
    ]
    return "\n".join(parts) + "\n"


def _training(passport: Passport, facts: dict[str, Any]) -> list[str]:
    config = passport.config
    rows = [
        (
            "base weights",
            f"`{passport.fingerprint[:16]}…`" + (f", commit `{passport.revision}`" * bool(passport.revision)),
        )
    ]
    rows += [(key, f"`{config.get(key)}`") for key in _TOLD]
    data = facts.get("data") or {}
    rows += [("data", ", ".join(f"`{Path(str(source)).name}`" for source in config.get("data", ())) or "not recorded")]
    for key, title in (
        ("rows", "rows"), ("rows_dropped", "rows dropped"), ("documents", "conversations"), ("tokens", "tokens"),
        ("supervised_tokens", "supervised tokens"),
    ):  # fmt: skip
        if isinstance(data.get(key), int):
            rows.append((title, f"{data[key]:,}"))
    for change in facts.get("changes") or ():
        kind, _, key = change["what"].partition(" ")
        if kind == "data":  # no names of files
            rows.append((f"data until step {change['step']:,}", "others"))
        elif key in (*_TOLD, "weights"):
            rows.append((f"{key} until step {change['step']:,}", f"`{change['before']}`"))
    table = "\n".join(f"| {what} | {value} |" for what, value in rows)
    return [f"\n## Training\n\n| | |\n|-|-|\n{table}"]


def _verdict(facts: dict[str, Any]) -> list[str]:
    """What it is worth on rows that it wasn't trained on, if some were held out."""
    verdict = facts.get("verdict") or {}
    if verdict.get("start") is None:
        return []
    text = verdict_text(verdict, facts.get("training") or {}, lambda english, chinese: english)
    return [f"\n## On held-out rows\n\n{sentence(text)} In brackets: the 95 % interval of the change."]


def _scores(run: RunFolder | None) -> list[str]:
    numbers = _json(run.path / "compare.json").get("numbers") if run else None
    if not numbers:
        return []
    lines = "\n".join(f"| {name} | {value:.4g} |" for name, value in numbers.items())
    return [f"\n## Scores\n\nBase against tuned, by `slimtune compare`.\n\n| | |\n|-|-|\n{lines}"]


def _how_to_load(found: Found, base: str, target: str) -> str:
    assert found.adapter is not None
    tokens = bool(adapter_config(found.adapter).get("trainable_token_indices"))
    resize = "base.resize_token_embeddings(max(len(tokenizer), base.config.get_text_config().vocab_size))\n" * tokens
    vllm = (
        "It has tokens of its own: for vLLM, merge it first (`slimtune merge`)."
        if tokens
        else f"With vLLM:\n`vllm serve {base} --enable-lora --lora-modules tuned={target}`"
    )
    return f"""
## Load it

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{target}")
base = AutoModelForCausalLM.from_pretrained("{base}")
{resize}model = PeftModel.from_pretrained(base, "{target}")
```

`passport.json` says which base, tokenizer and chat template it belongs to. {vllm}"""


def _loss_curve(run: RunFolder | None) -> str:
    if run is None or not run.metrics_file.is_file():
        return ""
    curve = read_history(run.metrics()).curve("loss")
    drawn = line_chart([Line(curve, "smooth", label_last=True)], title="loss", width=720, height=240)
    # An SVG file of its own names its namespace and carries its style.
    return (
        drawn.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1).replace(">", f">{_STYLE}", 1)
        if drawn
        else ""
    )


def _licence(base: Path) -> str | None:
    """From the front matter of the base's own card."""
    card = base / "README.md"
    if not card.is_file():
        return None
    found = re.match(r"---\n(.*?)\n---", card.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    try:
        front = yaml.safe_load(found[1]) if found else None
    except yaml.YAMLError:
        return None
    return str(front["license"]) if isinstance(front, dict) and front.get("license") else None


def _json(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
