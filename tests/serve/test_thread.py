"""One thread computes, so that torch keeps one set of workers: with more than there are cores, each loop wakes them."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from slimtune.serve.thread import CallingThread


def test_what_is_submitted_is_done_in_the_thread_that_runs_it() -> None:
    computing = CallingThread()
    done: list[int] = []

    def submit() -> tuple[int, BaseException | None]:
        first = computing.submit(threading.get_ident)
        for number in range(100):
            computing.submit(done.append, number)
        wrong = computing.submit(int, "no number")
        computing.shutdown()
        return first.result(10), wrong.exception(10)

    with ThreadPoolExecutor(1) as other:
        submitted = other.submit(submit)
        computing.run()
        thread, error = submitted.result(10)
    assert thread == threading.get_ident()
    assert done == list(range(100))
    assert isinstance(error, ValueError)


# Serves the run and its base, and asks both; printed are the threads that aren't Python's, before and after. Not in
# 4 bits, and the tokenizer in one thread: bitsandbytes and tokenizers have workers of their own. pyarrow's memory
# has one, too, and numpy may: they are there before.
SERVE = """
import os, signal, sys, threading, time
from click.testing import CliRunner
from openai import OpenAI
from slimtune.cli import slimtune_command
from slimtune.serve import server
import numpy, pyarrow, torch

def workers():
    return len(os.listdir("/proc/self/task")) - threading.active_count()

def ask(url):
    try:
        with OpenAI(base_url=url + "/v1", api_key="none", max_retries=0, timeout=60) as client:
            for model in client.models.list():
                client.completions.create(model=model.id, prompt=list(range(5, 250)), max_tokens=4)
        seen.append(workers())
    finally:
        os.kill(os.getpid(), signal.SIGINT)

seen, url_of = [], server.url_of
def asked(listening):
    threading.Thread(target=ask, args=(url_of(listening),)).start()
    return url_of(listening)

server.url_of = asked
torch.ones(2**20).exp()
pyarrow.array([1])
before = workers()
result = CliRunner().invoke(slimtune_command, ["serve", sys.argv[1], "--port", "0", "--quantization", "none"])
print(before, *seen, result.exit_code)
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts Linux' threads")
def test_serving_several_models_takes_one_set_of_workers(runs: list[Path]) -> None:
    made = subprocess.run(
        [sys.executable, "-c", SERVE, str(runs[0])],
        env={**os.environ, "OMP_NUM_THREADS": "2", "TOKENIZERS_PARALLELISM": "false"},
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    before, after, exit_code = map(int, made.stdout.split())
    assert before > 0
    assert (after, exit_code) == (before, 0)
