"""Every command that the README and the guides show, typed as it stands there: ``python -m tests.typed [PAGE …]``.

A page's commands are run in its order, in a folder that has what the page speaks of: rows, prompts, a run. The model of
the README lies in the hub's cache by then, as a small one of random weights: what is tried is that the commands hold,
not what they teach. Capitals (MODEL, RUN) stand for what a reader puts there.
"""

from __future__ import annotations

import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["NOT_TYPED", "PAGES", "Typed", "commands", "typed_of"]

ROOT = Path(__file__).parents[1]
PAGES = (
    "README.md", "docs/guide.md", "docs/use.md", "docs/data.md", "docs/serve.md", "docs/several-gpus.md",
    "README.zh-CN.md", "docs/guide.zh-CN.md",
)  # fmt: skip
"""In their order. The other Chinese pages have the commands of their English ones (tests/test_readme.py)."""
MODEL = "Qwen/Qwen1.5-1.8B-Chat"
WORDS = {
    "MODEL": MODEL,
    "DATA": "chats.jsonl",
    "RUN": "my-run",
    "PROMPTS.jsonl": "prompts.jsonl",
    "OUT.jsonl": "out-{}.jsonl",
    "OWNER/NAME": "./published-{}",
    "FOLDER": "made-{}",
}
"""What stands for something, and what is put there; {} is a number of the command's own."""
NOT_TYPED = {
    r"git clone … .*": "the clone is this one",
    r"\. \.venv/bin/activate": "its environment is the one that runs this",
    r"make test": "all of the tests",
    r"slimtune demo": "what make demo runs",
    r"slimtune (train|resume) .*--gpus (\d+|all)": "takes several GPUs",
    r"torchrun .*": "takes two hosts of eight GPUs",
    r"for i in 0 1 2 3; do .* slimtune serve .*": "four servers at once",
    r".*….*": "a part of a command",
    r"slimtune [a-z]+": "a verb's name alone",
}
"""Patterns of whole commands that aren't run here, with the reason."""
ALONE = ("init", "doctor", "config", "runs")
"""Verbs whose name alone is a command."""
_PATIENCE = 1800.0
_ANSWERS = ("chats.jsonl", MODEL, "task")


@dataclass(frozen=True)
class Typed:
    """A command of a page."""

    page: str
    text: str

    @property
    def excuse(self) -> str | None:
        """Why it isn't run; None if it is."""
        words = self.text.split()
        if words[0] == "slimtune" and len(words) == 2 and words[1] in ALONE:
            return None
        return next((why for pattern, why in NOT_TYPED.items() if re.fullmatch(pattern, self.text, re.DOTALL)), None)

    def with_words(self, number: int) -> str:
        """It, with what stands for something in its place."""
        text = re.sub(r"\[([A-Z]+)\]", r"\1", self.text)  # what may be left out is given
        text = text.replace("runs FOLDER", "runs .").replace("-o RUN", f"-o run-{number}")
        for name, put in WORDS.items():
            text = re.sub(rf"(?<![\w$]){re.escape(name)}(?![\w=])", put.format(number), text)
        return text


def commands(text: str) -> Iterator[str]:
    """A page's commands: those after a prompt, with the lines that go on, and slimtune's in its tables and text."""
    for block in re.findall(r"^```console\n(.*?)^```", text, flags=re.M | re.S):
        for found in re.split(r"^\$ ", block, flags=re.M)[1:]:
            yield re.sub(r"\n(?:> ?)?", "\n", found.rstrip("\n"))
    yield from dict.fromkeys(re.findall(r"`(slimtune [^`\n]+)`", text))


def typed_of(page: str) -> list[Typed]:
    """A page's commands; none twice."""
    return [Typed(page, each) for each in dict.fromkeys(commands((ROOT / page).read_text(encoding="utf-8")))]


def prepare(folder: Path) -> dict[str, str]:
    """The commands' environment: a launcher, and a hub's cache that has the README's model. No other place is asked."""
    from slimtune.base.embedded import embedded_model_folder

    (bin_folder := folder / "bin").mkdir()
    for name, line in (("slimtune", f'exec {sys.executable} -m slimtune "$@"'), ("notify-send", 'echo "$@"')):
        (bin_folder / name).write_text(f"#!/bin/sh\n{line}\n")
        (bin_folder / name).chmod(0o755)
    repository = folder / "hub" / f"models--{MODEL.replace('/', '--')}"
    (model := repository / "snapshots" / "1").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("1")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(embedded_model_folder() / name, model / name)
    _small_model(model).save_pretrained(model)
    return {
        **os.environ, "PATH": f"{bin_folder}:{os.environ['PATH']}", "HF_HUB_CACHE": str(folder / "hub"),
        "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT / "src"), "COLUMNS": "80",
    }  # fmt: skip


def _small_model(folder: Path) -> Any:
    """Two layers that have learnt to answer as the rows do: of random weights, a training would be no better."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    config = LlamaConfig(
        vocab_size=49152, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=2048, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2,
        pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    texts = [tokenizer.apply_chat_template(row["messages"], tokenize=False) for row in rows()]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(120):
        batch = tokenizer(texts[step % 5 :: 5], return_tensors="pt", padding=True)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        model(**batch, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.to(torch.bfloat16)


def rows() -> list[dict[str, Any]]:
    """Of chats.jsonl."""
    return [
        {
            "messages": [
                {"role": "user", "content": f"Where is key {number}?"},
                {"role": "assistant", "content": f"Under pot {number}."},
            ]
        }
        for number in range(40)
    ]


def furnish(folder: Path, run: Path | None) -> None:
    """What a page speaks of: rows, prompts, and a run that was trained on another page."""
    folder.mkdir()
    for name in ("chats.jsonl", "rows.jsonl"):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows()))
    prompts = [{"prompt": row["messages"][0]["content"]} for row in rows()[:8]]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    if run is not None:
        for name in ("my-run", "runs/a", "runs/b"):
            shutil.copytree(run, folder / name)


def answer_for(command: str, folder: Path, environment: Mapping[str, str]) -> tuple[int, str]:
    """Run a command in a terminal, as a person would: questions are answered, servers are asked and ended by Ctrl-C.

    Returns:
        The exit code, and what was on the screen.
    """
    words = command.split()
    serves = words[:2] in (["slimtune", "serve"], ["slimtune", "watch"]) and "--dry-run" not in words
    where = ROOT if words[0] in ("make", ".venv/bin/pytest") else folder
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        ["bash", "-c", command], cwd=where, env=dict(environment), stdin=theirs, stdout=theirs, stderr=theirs,
        start_new_session=True, preexec_fn=_take_terminal,
    )  # fmt: skip
    os.close(theirs)
    answers = iter(_ANSWERS if words[:2] == ["slimtune", "init"] else ("Hello", "/quit"))
    said, deadline, asked = "", time.monotonic() + _PATIENCE, False
    try:
        while True:
            if select.select([ours], [], [], 0.2)[0]:
                try:
                    said += os.read(ours, 65536).decode(errors="replace")
                except OSError:  # the last of it has ended
                    break
            elif said.endswith("> "):
                os.write(ours, (next(answers, "\x04") + "\n").encode())
                said += "\n"
            elif serves and not asked and (found := re.search(r"http://127\.0\.0\.1:\d+\S*", said)):
                urllib.request.urlopen(f"{found[0].rstrip('/.,')}/{'v1/models' if 'serve' in words else ''}").read()
                os.write(ours, b"\x03")
                asked = True
            assert time.monotonic() < deadline, f"no end of {command}:\n{said}"
    finally:
        if process.poll() is None and time.monotonic() >= deadline:
            os.killpg(process.pid, signal.SIGKILL)
        os.close(ours)
    return process.wait(), said


def _take_terminal() -> None:
    """Ctrl-C comes by the terminal, to the session whose it is."""
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def main(pages: list[str]) -> int:
    """Run them and print each with its exit code; 1 if one failed."""
    done, failed = 0, []
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        environment = prepare(root)
        furnish(root / "before", None)
        code, said = answer_for(f"slimtune train {MODEL} chats.jsonl -o my-run", root / "before", environment)
        assert code == 0, said
        for page in pages or PAGES:
            folder = root / page.replace("/", "-")
            furnish(folder, None if page.startswith("README") else root / "before" / "my-run")
            language = {"LC_ALL": "zh_CN.UTF-8"} if page.endswith(".zh-CN.md") else {}
            for number, typed in enumerate(typed_of(page)):
                if typed.excuse is not None:
                    print(f"not run  {page}: {typed.text}  ({typed.excuse})", flush=True)
                    continue
                if typed.text == "slimtune init":  # what it is to write may be there from a command before
                    (folder / "run.yaml").unlink(missing_ok=True)
                began = time.monotonic()
                code, said = answer_for(typed.with_words(number), folder, {**environment, **language})
                done += 1
                print(f"{'ok' if code == 0 else f'EXIT {code}':8} {page}: {typed.text}  "
                      f"({time.monotonic() - began:.0f} s)", flush=True)  # fmt: skip
                if code:
                    failed.append(typed)
                    print(said, flush=True)
    print(f"{done - len(failed)} of {done} commands ended with 0")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
