"""``slimtune serve``: the line that says where, how it ends, and what it refuses to start."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from openai import OpenAI

from slimtune.cli import slimtune_command


def called(*words: object, key: str | None = None) -> Result:
    return CliRunner().invoke(slimtune_command, ["serve", *map(str, words)], env={"SLIMTUNE_API_KEY": key})


def test_it_answers_and_ends_with_0_on_a_signal(tiny_model: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]

    def ask_and_stop() -> int:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.05)
        with OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0) as client:
            try:
                stream = client.completions.create(model="tiny", prompt="?", max_tokens=60, stream=True)
                next(iter(stream))
            finally:  # or the server would serve on, and the test hang, where a request fails
                os.kill(os.getpid(), signal.SIGINT)
            return 1 + sum(1 for _ in stream)

    handler, threads = signal.getsignal(signal.SIGINT), threading.active_count()
    with ThreadPoolExecutor(1) as pool:
        asking = pool.submit(ask_and_stop)
        result = called(f"tiny={tiny_model}", "--port", port)
    assert result.exit_code == 0, result.exception
    assert result.stdout == f"serving tiny on http://127.0.0.1:{port}\n"
    assert result.stderr == "slimtune: ending\n"
    # What was under way was brought to its end.
    assert asking.result() > 20
    assert signal.getsignal(signal.SIGINT) is handler
    assert threading.active_count() == threads


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
