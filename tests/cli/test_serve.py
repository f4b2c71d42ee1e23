"""``slimtune serve`` as a process: the line that says where, and how it ends."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

from click.testing import CliRunner
from openai import OpenAI

from slimtune.cli import slimtune_command
from slimtune.errors import UserError

SLIMTUNE = Path(sys.executable).with_name("slimtune")


def test_it_answers_and_ends_with_0_on_a_signal(tiny_model: Path) -> None:
    command = [SLIMTUNE, "serve", f"tiny={tiny_model}", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            found = re.fullmatch(r"serving tiny on (http://127\.0\.0\.1:\d+)\n", line)
            assert found, line
            with OpenAI(base_url=f"{found[1]}/v1", api_key="none") as client:
                messages = [{"role": "user", "content": "?"}]
                stream = client.chat.completions.create(model="tiny", messages=messages, stream=True)  # type: ignore[call-overload]
                next(iter(stream))
                process.send_signal(signal.SIGINT)
                assert process.wait(30) == 0
        finally:
            process.kill()
        assert process.stderr is not None
        assert process.stderr.read() == ""


def test_another_address_takes_a_key(tiny_model: Path, tmp_path: Path) -> None:
    environment = {"SLIMTUNE_API_KEY": None}
    refused = CliRunner().invoke(slimtune_command, ["serve", str(tiny_model), "--host", "0.0.0.0"], env=environment)
    assert isinstance(refused.exception, UserError)
    assert "API key" in str(refused.exception)
    empty = tmp_path / "key"
    empty.write_text("\n")
    words = ["serve", str(tiny_model), "--host", "0.0.0.0", "--api-key-file", str(empty)]
    assert "empty" in str(CliRunner().invoke(slimtune_command, words, env=environment).exception)


def test_the_vllm_command_is_shown_or_run(tiny_model: Path, tmp_path: Path) -> None:
    words = [SLIMTUNE, "serve", str(tiny_model), "--engine", "vllm", "--port", "8123"]
    shown = subprocess.run([*words, "--dry-run"], capture_output=True, text=True, check=True).stdout
    assert shown.startswith(f"vllm serve {tiny_model} ")
    assert "--port 8123" in shown
    program = tmp_path / "vllm"
    program.write_text('#!/bin/sh\necho "$VLLM_API_KEY: $@"\n')
    program.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLIMTUNE_API_KEY": "secret"}
    run = subprocess.run(words, capture_output=True, text=True, env=environment, check=True).stdout
    assert run.startswith(f"secret: serve {tiny_model} ")
    missing = subprocess.run(words, capture_output=True, text=True, check=False, env={**os.environ, "PATH": "/none"})
    assert missing.returncode == 2
    assert "vLLM is not installed" in missing.stderr
