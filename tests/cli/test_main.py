"""The command line's frame: verbs, mistakes, exit codes."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from slimtune import cli
from slimtune.cli import VERBS, slimtune_command
from slimtune.config import Config
from slimtune.errors import StopRequested

RunHere = Callable[..., Any]


def slimtune(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", "from slimtune.cli import main; main()", *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, **environment},
        check=False,
    )


STOPPED = """
import os, signal, sys
from slimtune import cli
from slimtune.training.stop import StopSignals

def run(**options):
    with StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGTERM)

def run_and_unwind(**options):
    try:
        run()
    finally:
        os.kill(os.getpid(), signal.SIGINT)

def say(error, said=cli.say_error):
    os.kill(os.getpid(), getattr(signal, sys.argv.pop()))
    said(error)

cli.slimtune_command.main = globals()[sys.argv.pop()]
cli.say_error = say
cli.main()
"""


@pytest.mark.parametrize("second", ["SIGINT", "SIGTERM", "SIGUSR1"])
@pytest.mark.parametrize("where", ["run", "run_and_unwind"])
def test_a_second_signal_while_the_first_is_being_told_changes_nothing(where: str, second: str) -> None:
    done = subprocess.run([sys.executable, "-c", STOPPED, second, where], capture_output=True, text=True, check=False)
    assert done.returncode == 75
    assert "stopped by SIGTERM" in done.stderr
    assert "Traceback" not in done.stderr


INTERRUPTED = """
import atexit, os, signal
from slimtune import cli

def interrupted(**options):
    atexit.register(os.kill, os.getpid(), signal.SIGINT)
    raise KeyboardInterrupt

cli.slimtune_command.main = interrupted
cli.main()
"""


def test_a_second_ctrl_c_on_the_way_out_says_no_more() -> None:
    done = subprocess.run([sys.executable, "-c", INTERRUPTED], capture_output=True, text=True, check=False)
    assert done.returncode == 130
    assert done.stderr == "\nslimtune: interrupted\n"


INTERRUPTED_EARLY = """
import os, signal, sys

class Finder:
    def find_spec(self, name, *rest):
        if name == "click":
            sys.meta_path.remove(self)
            os.kill(os.getpid(), signal.SIGINT)

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs begin without
sys.meta_path.insert(0, Finder())
from slimtune.__main__ import main
main()
"""


def test_a_ctrl_c_before_the_command_line_is_there_is_one_line_too() -> None:
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED_EARLY],
        capture_output=True,
        text=True,
        env={**os.environ, "LC_ALL": "zh_CN.UTF-8"},
        check=False,
    )
    assert (done.returncode, done.stderr) == (130, "\nslimtune: 已中断\n")
    scripts = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text("utf-8"))["project"]["scripts"]
    assert scripts == {"slimtune": "slimtune.__main__:main"}


def test_a_stop_that_was_asked_for_is_no_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    error = StopRequested("stopped by SIGINT", way_out="Go on: slimtune resume run")
    cli.say_error(error)
    assert capsys.readouterr().err == "stopped by SIGINT\n  Go on: slimtune resume run\n"
    assert cli.coloured("no", fg="red") == "\x1b[31mno\x1b[0m"
    monkeypatch.setenv("NO_COLOR", "1")
    assert cli.coloured("no", fg="red") == "no"


def test_help_names_every_verb() -> None:
    done = slimtune("--help")
    assert done.returncode == 0
    for verb in slimtune_command.list_commands(None):  # type: ignore[arg-type]
        assert f"\n  {verb} " in done.stdout


def test_the_flags_that_are_needed_most_stand_first_and_none_is_missing() -> None:
    shown = slimtune("train", "--help", COLUMNS="80").stdout
    titles = re.findall(r"^(\w[^\n]*):$", shown, flags=re.M)
    assert titles == [
        "Needed most", "What", "The base in 4 bits", "LoRA", "Data", "Training", "Saving, watching, stopping",
        "After training", "Other",
    ]  # fmt: skip
    most = shown.split("Needed most:")[1].split("What:")[0]
    assert len(re.findall(r"^  -", most, flags=re.M)) == 10
    asked = {name for name in Config.model_fields if name not in ("model", "data", "start_from")}
    assert all(len(re.findall(rf"(^|[ ,])--{name.replace('_', '-')}[ \n]", shown, flags=re.M)) for name in asked)
    assert "May change" in slimtune("resume", "--help").stdout


def test_every_verb_explains_itself() -> None:
    for verb in VERBS:
        command = slimtune_command.get_command(None, verb)  # type: ignore[arg-type]
        assert command is not None, verb
        assert command.help, verb


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "Did you mean 'train'?"),
        (["train", "--lora-rr", "4"], "'--lora-r'"),
        (["train", "--overlong", "cut"], "'cut' is not one of 'drop', 'error', 'split', 'keep-end'"),
        (["train", "smollm2-135m", "x.jsonl", "--lora-r", "four"], "config key 'lora_r' can't be 'four'"),
        (["train", "smollm2-135m"], "no data"),
        (["train", "smollm2-135m", "absent.jsonl", "-o", "never"], "absent.jsonl"),
        (["train", "smollm", "absent.jsonl", "-o", "never"], "unknown model 'smollm'"),
        (["train", "--config", "absent.yaml"], "absent.yaml does not exist"),
        (["explain", "absent"], "absent"),
        (["chat", "absent-run", "--prompt", "hi"], "absent-run"),
    ],
)
def test_a_mistake_is_one_message_and_exit_2(
    arguments: list[str], message: str, tmp_path: Path, run_here: RunHere, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = run_here(*arguments)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_debug_shows_the_traceback_wherever_it_stands(run_here: RunHere) -> None:
    for arguments in (["--debug", "train", "smollm2-135m"], ["train", "smollm2-135m", "--debug"]):
        done = run_here(*arguments)
        assert done.returncode == 2
        assert "Traceback" in done.stderr


def test_a_disk_that_refuses_is_named_and_no_fault_of_the_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(**options: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/tmp/requests.jsonl")

    monkeypatch.setattr(cli.slimtune_command, "main", full)
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith("error: /tmp/requests.jsonl: No space left on device\n")


@pytest.mark.parametrize("words", [[], ["--lang", "zh"]])
def test_without_a_verb_the_help_is_shown_and_nothing_is_called_an_error(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["slimtune", *words])
    monkeypatch.setattr("slimtune.language._asked", [])  # --lang would hold for the rest of this process
    with pytest.raises(SystemExit) as end:
        cli.main()
    said = capsys.readouterr().err
    assert end.value.code == 2
    assert said.startswith(("Usage: slimtune", "用法：slimtune"))
    assert "doctor" in said
    assert "error" not in said.replace("an error", "")
    assert "错误：" not in said


def test_help_and_config_load_no_torch() -> None:
    for arguments in (["--help"], ["train", "--help"], ["config"], ["config", "--schema"]):
        code = (
            f"import sys; sys.argv = ['slimtune', *{arguments!r}]\n"
            "from slimtune.cli import main\n"
            "try: main()\n"
            "except SystemExit as end: assert end.code == 0, end.code\n"
            "heavy = {'torch', 'transformers', 'trl', 'peft', 'bitsandbytes'} & set(sys.modules)\n"
            "assert not heavy, heavy"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr


MISTAKES: list[tuple[list[str], str]] = [
    (["train"], "no data given"),
    (["train", "smollm2-135m"], "no data given"),
    (["train", "smollm2-135m", "row.jsonl"], "Did you mean rows.jsonl?"),
    (["train", "smolm2-135m", "rows.jsonl"], "Did you mean smollm2-135m?"),
    (["train", "smollm2-135m", "rows.jsonl", "--eval", "absent.jsonl"], "data absent.jsonl does not exist"),
    (["train", "smollm2-135m", "rows.jsonl", "-o", "runs/first"], "slimtune resume runs/first"),
    (["train", "runs/first/adapter", "rows.jsonl"], "does not exist"),
    (["resume", "runs/frist"], "Did you mean runs/first?"),
    (["explain", "first2"], "Did you mean runs/first?"),
    (["chat", "frist"], "Did you mean runs/first?"),
    (["generate", "smollm2-135m", "absent.jsonl", "-o", "out.jsonl"], "data absent.jsonl does not exist"),
    (["eval", "./runs/frist", "rows.jsonl"], "Did you mean runs/first?"),
    (["eval", "runs/first"], "held no rows out"),
    (["eval", "runs/first", "absent.jsonl"], "data absent.jsonl does not exist"),
    (["compare", "absent"], "unknown model 'absent'"),
    (["merge", "runs/first", "-o", "full"], "output full exists and is not empty"),
    (["export", "runs/first", "-o", "full"], "output full exists and is not empty"),
    (["export", "runs/first"], "-o FOLDER is missing"),
    (["push", "absent", "owner/name"], "unknown model 'absent'"),
    (["serve", "name=absent"], "unknown model 'absent'"),
    (["plan", "smollm2-135m", "absent.jsonl"], "data absent.jsonl does not exist"),
    (["data", "absent.jsonl"], "data absent.jsonl does not exist"),
]


def test_mistakes_are_told_before_torch_is_loaded(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "first"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text("model: smollm2-135m\n")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    code = (
        "import contextlib, io, json, sys\n"
        "from slimtune.cli import main\n"
        "for words, message in json.loads(sys.stdin.read()):\n"
        "    sys.argv = ['slimtune', *words]\n"
        "    with contextlib.redirect_stderr(io.StringIO()) as said:\n"
        "        try: main()\n"
        "        except SystemExit as end: assert end.code == 2, (words, end.code, said.getvalue())\n"
        "    assert message in said.getvalue(), (words, said.getvalue())\n"
        "    heavy = {'torch', 'transformers', 'trl', 'peft', 'bitsandbytes', 'datasets', 'numpy', 'pyarrow'}\n"
        "    heavy &= set(sys.modules)\n"
        "    assert not heavy, (words, heavy)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], input=json.dumps(MISTAKES), capture_output=True, text=True, timeout=300,
        check=False, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_importing_changes_nothing_outside() -> None:
    code = (
        "import os, sys, warnings, logging\n"
        "before = dict(os.environ), list(warnings.filters), list(logging.root.handlers), sys.excepthook\n"
        "import slimtune, slimtune.config, slimtune.cli\n"
        "assert 'torch' not in sys.modules\n"
        "import torch, transformers, trl, peft, bitsandbytes, datasets\n"
        "hooked = dict(os.environ), list(warnings.filters), torch.get_default_dtype()\n"
        "forward = transformers.LlamaForCausalLM.forward, peft.PeftModel.forward, trl.SFTTrainer.training_step\n"
        "slimtune.finetune, slimtune.fuse, slimtune.Config\n"
        "import slimtune.recipes\n"
        "assert hooked == (dict(os.environ), list(warnings.filters), torch.get_default_dtype())\n"
        "assert forward == (transformers.LlamaForCausalLM.forward, peft.PeftModel.forward,"
        " trl.SFTTrainer.training_step)\n"
        "assert before[2:] == (list(logging.root.handlers), sys.excepthook)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
