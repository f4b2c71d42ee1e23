"""How the server ends: with a word to those that wait, in the time that was promised; and when an engine has died."""

from __future__ import annotations

import http.client
import json
import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import openai
import pytest
import torch
from click.testing import CliRunner

from slimtune.cli import slimtune_command
from slimtune.errors import SlimtuneError
from slimtune.serve.address import listen
from slimtune.serve.api import Api
from slimtune.serve.choice import Choice
from slimtune.serve.limits import Limits
from slimtune.serve.server import run
from slimtune.serve.thread import CallingThread
from slimtune.use.load import Opened
from tests.serve.test_api import answer, raw, until

PROMISED = 5.0


def test_streams_are_told_that_the_server_ends(serving: Callable[..., Any]) -> None:
    """A long reply of an engine that is slower than the time that is left."""
    with serving() as served:
        engine = served.api.engines["first"]
        computed = engine._computing.submit

        def slowly(*work: Any) -> Any:
            time.sleep(0.02)
            return computed(*work)

        engine._computing.submit = slowly
        connection = http.client.HTTPConnection(urlsplit(served.url).netloc, timeout=60)
        try:
            body = json.dumps(
                {"model": "first", "messages": [{"role": "user", "content": "?"}], "max_tokens": 1000, "stream": True}
            )
            connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            begun = response.readline()  # not only let in: its answer has begun
            started = time.monotonic()
            served.web.should_exit = True
            assert until(lambda: served.api.gate.closed)
            status, content = response.status, begun + response.read()
            took = time.monotonic() - started
        finally:
            del engine._computing.submit
            connection.close()
    assert status == 200
    events = [json.loads(line[6:]) for line in content.decode().splitlines() if line.startswith("data: {")]
    assert events[-1]["error"]["code"] == "server_stopping"
    assert content.endswith(b"data: [DONE]\n\n")
    # Not for the speed: whoever waits for the process kills it when the promised time is over.
    assert took < PROMISED


def test_a_reply_that_takes_too_long_says_so_in_its_stream(serving: Callable[..., Any]) -> None:
    with serving(Limits(seconds=1)) as served:
        with pytest.raises(openai.APIError, match="longer than 1 s"):
            list(answer(served, stream=True, max_tokens=1000))
        with pytest.raises(openai.InternalServerError, match="longer than 1 s"):
            answer(served, max_tokens=1000)


def test_a_request_that_fails_fails_alone(serving: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    with serving() as served:
        expected = answer(served, max_tokens=40).choices[0].message.content
        choose = Choice.choose

        def failing(self: Choice, scores: torch.Tensor) -> None:
            if self.sampling.seed == 13:
                scores.fill_(torch.nan)
            choose(self, scores)

        monkeypatch.setattr(Choice, "choose", failing)
        with ThreadPoolExecutor(4) as pool:
            good = [pool.submit(answer, served, max_tokens=40) for _ in range(2)]
            bad = [pool.submit(answer, served, max_tokens=40, temperature=1.0, seed=13) for _ in range(2)]
        for each in bad:
            with pytest.raises(openai.InternalServerError, match="isn't finite") as failed:
                each.result()
            assert failed.value.status_code == 500
        assert [each.result().choices[0].message.content for each in good] == [expected] * 2
        assert raw(served, "/health")[0] == 200


def test_the_smallest_temperature_and_top_p_leave_a_token(serving: Callable[..., Any]) -> None:
    with serving() as served:
        greedy = answer(served, max_tokens=5).choices[0].message.content
        assert answer(served, max_tokens=5, temperature=1e-6).choices[0].message.content == greedy
        assert answer(served, max_tokens=5, temperature=2, top_p=1e-6).choices[0].message.content == greedy
        for fields in ({"temperature": 1e-320}, {"temperature": 1.0, "top_p": 1e-320}):
            with pytest.raises(openai.BadRequestError):
                answer(served, max_tokens=5, **fields)
        assert raw(served, "/health")[0] == 200


def _serve(
    models: dict[str, Opened], meanwhile: Callable[[Api], None], overdue: Callable[[], object] | None = None
) -> Api:
    """A whole server in this thread, as the verb has it, while something else happens."""
    computing = CallingThread()
    with listen("127.0.0.1", 0) as listening, ThreadPoolExecutor(1) as pool:
        api = Api(models, Limits(), computing)
        doing: list[Any] = []
        try:
            run(api, listening, computing, lambda url: doing.append(pool.submit(meanwhile, api)), overdue)
        finally:
            for each in doing:
                each.result(60)
    return api


def test_what_takes_longer_than_promised_is_not_waited_for(
    models: dict[str, Opened], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step of the model can't be interrupted; the verb ends its process then."""
    monkeypatch.setattr("slimtune.serve.server._PROMISED_SECONDS", 0.5)
    late = threading.Event()

    def stop(api: Api) -> None:
        api.engines["first"]._computing.submit(late.wait, 30)
        os.kill(os.getpid(), signal.SIGTERM)

    _serve({"first": models["first"]}, stop, late.set)
    assert late.is_set()


def test_a_dead_engine_ends_the_server_with_an_error(models: dict[str, Opened]) -> None:
    def kill(api: Api) -> None:
        manager = api.engines["first"]._manager  # type: ignore[union-attr]

        def broken() -> None:
            raise RuntimeError("killed by a test")

        manager.batch_processor.prepare_next_batch = broken

    with pytest.raises(SlimtuneError, match="the engine of first has stopped") as ended:
        _serve({"first": models["first"]}, kill)
    assert ended.value.exit_code == 1


def test_an_engine_that_cannot_answer_is_never_offered(
    models: dict[str, Opened], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slimtune.serve.api.why_not_paged", lambda *_: None)
    monkeypatch.setattr("slimtune.serve.choice.Chooser.__call__", lambda *given: 1 / 0)
    with pytest.raises(SlimtuneError, match="first can't be served"):
        _serve({"first": models["first"]}, lambda api: pytest.fail("it was offered"))


def test_a_key_that_no_header_carries_is_refused_at_the_start() -> None:
    made = CliRunner().invoke(slimtune_command, ["serve", "smollm2-135m", "--api-key", "ключ"])
    assert "no header carries" in str(made.exception)
    for seconds in ("inf", "nan"):
        made = CliRunner().invoke(slimtune_command, ["serve", "smollm2-135m", "--max-seconds", seconds])
        assert "seconds can't be" in str(made.exception)
