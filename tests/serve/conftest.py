"""A server in this process, on loopback, over two adapters on one tiny base."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from openai import OpenAI
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from slimtune.adapter.passport import issue_passport, stamp
from slimtune.config import Config
from slimtune.serve.address import listen, url_of
from slimtune.serve.api import Api
from slimtune.serve.limits import Limits
from slimtune.serve.models import find_all, open_all
from slimtune.serve.server import WebServer
from slimtune.use.load import Opened

KEY = "a key for tests"


@dataclass(frozen=True)
class Served:
    """A running server and a client for it."""

    api: Api
    url: str
    client: OpenAI
    web: WebServer


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, tokenizer: PreTrainedTokenizerBase) -> list[Path]:
    """Two runs, ``first`` and ``second``, whose adapters answer differently."""
    made = []
    for seed, name in enumerate(("first", "second")):
        folder = tmp_path_factory.mktemp("runs") / name / "adapter"
        model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
        wrapped = get_peft_model(
            model, LoraConfig(task_type="CAUSAL_LM", r=4 + 8 * seed, target_modules=["q_proj", "v_proj", "down_proj"])
        )
        draw = torch.Generator().manual_seed(seed)
        for key, weight in wrapped.named_parameters():
            if "lora_B" in key:
                weight.data = torch.randn(weight.shape, generator=draw)
        wrapped.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        config = Config(model=str(tiny_model), data=("rows.jsonl",), compute_dtype="fp32")
        stamp(folder, issue_passport(config, str(tiny_model), tokenizer))
        made.append(folder.parent)
    return made


@pytest.fixture(scope="session")
def models(runs: list[Path]) -> dict[str, Opened]:
    """The two runs and their base, as the server opens them."""
    return open_all(find_all(list(map(str, runs))), dtype="fp32")


@pytest.fixture(scope="session")
def serving(models: dict[str, Opened]) -> Callable[..., object]:
    """Start a server with other limits or a key: ``with serving(limits, key) as served``."""

    @contextmanager
    def started(limits: Limits | None = None, key: str | None = None) -> Iterator[Served]:
        ready = threading.Event()
        with listen("127.0.0.1", 0) as listening, ThreadPoolExecutor(1) as computing:
            api = Api(models, limits or Limits(output_tokens=1024), computing, key)
            server = WebServer(api, ready.set)
            thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
            thread.start()
            assert ready.wait(60)
            url = url_of(listening)
            try:
                with OpenAI(base_url=f"{url}/v1", api_key=key or "none", max_retries=0, timeout=60) as client:
                    yield Served(api, url, client, server)
            finally:
                server.should_exit = True
                thread.join(60)
                assert not thread.is_alive()

    return started


@pytest.fixture(scope="session")
def served(serving: Callable[..., object]) -> Iterator[Served]:
    """One server for all tests that need nothing special."""
    with serving() as made:  # type: ignore[attr-defined]
        yield made
