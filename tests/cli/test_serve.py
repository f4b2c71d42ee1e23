"""``slimtune serve`` as a process: the line that says where, and how it ends. And what it refuses to start."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from openai import OpenAI

from slimtune.cli import slimtune_command

SLIMTUNE = Path(sys.executable).with_name("slimtune")


def called(*words: object, key: str | None = None) -> Result:
    return CliRunner().invoke(slimtune_command, ["serve", *map(str, words)], env={"SLIMTUNE_API_KEY": key})


def test_it_answers_and_ends_with_0_on_a_signal(tiny_model: Path) -> None:
    command = [SLIMTUNE, "serve", f"tiny={tiny_model}", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            found = re.fullmatch(r"serving tiny on (http://127\.0\.0\.1:\d+)\n", line)
            assert found, line
            with OpenAI(base_url=f"{found[1]}/v1", api_key="none") as client:
                stream = client.completions.create(model="tiny", prompt="?", stream=True)
                next(iter(stream))
                process.send_signal(signal.SIGINT)
                assert process.wait(60) == 0
        finally:
            process.kill()
        assert process.stderr is not None
        assert process.stderr.read() == ""


def test_another_address_takes_a_key(tiny_model: Path, tmp_path: Path) -> None:
    assert "API key" in str(called(tiny_model, "--host", "0.0.0.0").exception)
    empty = tmp_path / "key"
    empty.write_text("\n")
    assert "empty" in str(called(tiny_model, "--host", "0.0.0.0", "--api-key-file", empty).exception)


def test_the_vllm_command_is_shown_or_becomes_the_process(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = called(tiny_model, "--engine", "vllm", "--port", 8123, "--dry-run").output
    assert shown.startswith(f"vllm serve {tiny_model} ")
    assert "--port 8123" in shown
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "vLLM is not installed" in str(called(tiny_model, "--engine", "vllm").exception)

    program = tmp_path / "vllm"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    became: list[tuple[str, list[str], dict[str, str]]] = []

    def execve(path: str, words: list[str], environment: dict[str, str]) -> None:
        became.append((path, words, environment))
        raise SystemExit

    monkeypatch.setattr(os, "execve", execve)
    called(tiny_model, "--engine", "vllm", key="secret")
    (path, words, environment) = became[0]
    assert path == str(program)
    assert words[:3] == ["vllm", "serve", str(tiny_model)]
    assert environment["VLLM_API_KEY"] == "secret"
    assert "secret" not in " ".join(words)
