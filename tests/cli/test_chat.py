"""The real command in a real terminal."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SLIMTUNE = [sys.executable, "-c", "from slimtune.cli import main; main()"]


class Terminal:
    """A child process on a pseudo-terminal."""

    def __init__(self, *words: str) -> None:
        pid, self.screen = pty.fork()
        if pid == 0:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background job has it ignored
            os.execv(SLIMTUNE[0], [*SLIMTUNE, *words])
        self.pid = pid
        self.seen = ""

    def wait_for(self, pattern: str, seconds: float = 300) -> str:
        """Read until ``pattern`` appears in what came since the last match."""
        end = time.monotonic() + seconds
        raw = self.seen.encode()
        while not (found := re.search(pattern, raw.decode(errors="ignore"), re.DOTALL)):
            assert time.monotonic() < end, f"no {pattern!r} in {raw.decode(errors='replace')!r}"
            if select.select([self.screen], [], [], 0.2)[0]:
                try:
                    raw += os.read(self.screen, 65536)
                except OSError:
                    pytest.fail(f"the command ended before {pattern!r}: {raw.decode(errors='replace')!r}")
        text = raw.decode(errors="ignore")
        self.seen = text[found.end() :]
        return text[: found.end()]

    def ctrl_c_at_the_prompt(self, seconds: float = 60) -> None:
        """Ctrl-C of a person, who can't be so quick as to hit the moment between readline's prompt and its wait.

        CPython notes a signal of that moment, and acts on it only after the next key (PyOS_Readline's select).
        """
        end = time.monotonic() + seconds
        while Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] != "S":
            assert time.monotonic() < end, "the command never came to wait for its person"
            time.sleep(0.01)
        os.kill(self.pid, signal.SIGINT)

    def type(self, line: str) -> None:
        os.write(self.screen, line.encode() + b"\n")

    def exit_code(self) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def test_a_session_with_history_commands_and_ctrl_c() -> None:
    terminal = Terminal("chat", "smollm2-135m", "--max-new-tokens", "1500")
    terminal.wait_for(r"ready\..*> ")
    terminal.type("/system Only ever answer in Chinese. 请只用中文。")
    terminal.wait_for(r"system text set.*> ")
    terminal.type("Count from 1 to 1000, separated by commas: 1, 2, 3,")
    terminal.wait_for(r"3,\r\n.*\w")
    os.kill(terminal.pid, signal.SIGINT)
    terminal.wait_for(r"\(stopped\).*> ")
    terminal.type("/reset")
    terminal.wait_for(r"forgotten.*> ")
    terminal.type("/what")
    terminal.wait_for(r"unknown command /what.*> ")
    terminal.ctrl_c_at_the_prompt()
    terminal.wait_for(r"leaves\).*> ")
    terminal.type("/exit")
    assert terminal.exit_code() == 0


def test_one_prompt_for_scripts_prints_the_answer_alone() -> None:
    done = subprocess.run(
        [*SLIMTUNE, "chat", "smollm2-135m", "--prompt", "用中文说：你好", "--max-new-tokens", "8"],
        capture_output=True,
        check=False,
        env={**os.environ, "PYTHONIOENCODING": "utf-8"},
    )
    assert done.returncode == 0, done.stderr.decode()
    assert done.stderr == b""
    assert re.search("[\u4e00-\u9fff]", done.stdout.decode("utf-8"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["no-such-model"], "unknown model 'no-such-model'"),
        (["smollm2-135m", "--base", "x"], "--base goes with a run"),
        (["smollm2-135m", "--temperature", "-1"], "temperature can't be -1.0"),
    ],
)
def test_mistakes_exit_2_with_a_message(
    words: list[str], message: str, tmp_path: Path, run_here: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = run_here("chat", *words, "--prompt", "hi")
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
