"""The OpenAI API as the `openai` client sees it."""

from __future__ import annotations

import http.client
import json
import re
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import openai
import pytest
import torch

from slimtune.serve.limits import Limits
from slimtune.use.generate import generate
from slimtune.use.load import Opened
from slimtune.use.sampling import Sampling
from tests.serve.conftest import KEY, Served

QUESTION: list[Any] = [{"role": "user", "content": "Where is the spare key?"}]
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {"name": "weather", "description": "Say the weather", "parameters": {"type": "object"}},
}


def alone(opened: Opened, messages: list[Any], sampling: Sampling) -> str:
    return next(iter(generate(opened, [opened.prompt_ids(messages)], sampling))).text


def answer(served: Served, model: str = "first", **options: Any) -> Any:
    return served.client.chat.completions.create(model=model, messages=QUESTION, **options)


def raw(served: Served, path: str, body: bytes | None = None, **headers: str) -> tuple[int, dict[str, str], bytes]:
    """A request by hand."""
    connection = http.client.HTTPConnection(urlsplit(served.url).netloc, timeout=60)
    kind = {} if body is None else {"Content-Type": "application/json"}
    connection.request("GET" if body is None else "POST", path, body, {**kind, **headers})
    response = connection.getresponse()
    content = response.read()
    connection.close()
    return response.status, {key.lower(): value for key, value in response.getheaders()}, content


def until(holds: Callable[[], bool], seconds: float = 20) -> bool:
    end = time.monotonic() + seconds
    while not holds() and time.monotonic() < end:
        time.sleep(0.01)
    return holds()


# -- answers ----------------------------------------------------------------------------------------------------------


def test_a_greedy_answer_is_the_one_computed_alone_whatever_else_is_asked(
    served: Served, models: dict[str, Opened]
) -> None:
    asked = [
        (name, [{"role": "user", "content": f"{word} " * (1 + 7 * number)}])
        for number, word in enumerate(("salt", "two words", "盐", "why?"))
        for name in models
    ]
    with ThreadPoolExecutor(len(asked)) as pool:
        replies = list(
            pool.map(
                lambda ask: served.client.chat.completions.create(model=ask[0], messages=ask[1], max_tokens=24), asked
            )
        )
    for (name, messages), reply in zip(asked, replies, strict=True):
        expected = alone(models[name], messages, Sampling(max_new_tokens=24))
        assert reply.choices[0].message.content == expected
        assert reply.usage.prompt_tokens == len(models[name].prompt_ids(messages))


def test_adapters_answer_differently_and_share_the_base(served: Served, models: dict[str, Opened]) -> None:
    listed = [model.id for model in served.client.models.list()]
    assert listed == list(models)
    assert listed[:2] == ["first", "second"]
    assert served.client.models.retrieve("second").id == "second"
    texts = {answer(served, name, max_tokens=16).choices[0].message.content for name in models}
    assert len(texts) == 3
    places = [
        {weight.data_ptr() for name, weight in opened.model.named_parameters() if "lora" not in name}
        for opened in models.values()
    ]
    assert places[0] == places[1] == places[2]


def test_a_stream_is_the_same_answer_in_pieces(served: Served) -> None:
    whole = answer(served, max_tokens=40)
    chunks = list(answer(served, max_tokens=40, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason == "length"
    assert chunks[-1].usage == whole.usage
    assert whole.usage.completion_tokens == 40
    assert len(chunks) > 10


def test_a_stop_string_ends_the_answer_before_itself(served: Served) -> None:
    text = answer(served, max_tokens=40).choices[0].message.content
    stop = text[len(text) // 2 : len(text) // 2 + 5]
    whole = answer(served, max_tokens=40, stop=[stop, "never to be found"])
    assert whole.choices[0].message.content == text[: text.find(stop)]
    assert whole.choices[0].finish_reason == "stop"
    assert whole.usage.completion_tokens < 40
    pieces = list(answer(served, max_tokens=40, stop=stop, stream=True))
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == text[: text.find(stop)]


def test_a_seed_gives_the_same_draws_alone_and_in_company(served: Served, models: dict[str, Opened]) -> None:
    base = list(models)[-1]
    drawn = {"temperature": 1.3, "top_p": 0.9, "max_tokens": 16}
    with ThreadPoolExecutor(6) as pool:
        replies = list(pool.map(lambda seed: answer(served, base, seed=seed, **drawn), [7, 8, 7, 9, 10, 7]))
    texts = [reply.choices[0].message.content for reply in replies]
    expected = alone(models[base], QUESTION, Sampling(1.3, 0.9, max_new_tokens=16, seed=7))
    assert texts[0] == texts[2] == texts[5] == expected
    assert len(set(texts)) == 4


def test_log_probabilities_are_those_of_the_model(served: Served, models: dict[str, Opened]) -> None:
    reply = answer(served, max_tokens=6, logprobs=True, top_logprobs=3)
    opened = models["first"]
    prompt = opened.prompt_ids(QUESTION)
    made = next(iter(generate(opened, [prompt], Sampling(max_new_tokens=6)))).ids
    with torch.no_grad():
        expected = opened.model(torch.tensor([prompt + made])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    for at, token in enumerate(reply.choices[0].logprobs.content):
        assert token.logprob == pytest.approx(float(expected[at].max()), abs=1e-3)
        assert [other.logprob for other in token.top_logprobs] == pytest.approx(
            expected[at].topk(3).values.tolist(), abs=1e-3
        )
        assert token.top_logprobs[0].token == token.token == opened.tokenizer.decode([made[at]])
    drawn = answer(served, list(models)[-1], max_tokens=6, temperature=1.5, seed=1, logprobs=True)
    assert all(token.logprob < 0 for token in drawn.choices[0].logprobs.content)


def test_completions_take_text_and_ids_without_a_template(served: Served, models: dict[str, Opened]) -> None:
    text = "The spare key is"
    ids = models["first"].tokenizer(text)["input_ids"]
    by_text = served.client.completions.create(model="first", prompt=text, max_tokens=8, logprobs=2)
    by_ids = served.client.completions.create(model="first", prompt=ids, max_tokens=8)
    assert by_text.choices[0].text == by_ids.choices[0].text
    assert by_text.usage.prompt_tokens == len(ids)
    assert len(by_text.choices[0].logprobs.token_logprobs) == 8
    streamed = served.client.completions.create(model="first", prompt=text, max_tokens=8, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == by_text.choices[0].text


def test_tools_and_parts_of_content_reach_the_template(served: Served, models: dict[str, Opened]) -> None:
    plain = answer(served, max_tokens=1).usage.prompt_tokens
    with_tool = answer(served, max_tokens=1, tools=[TOOL], tool_choice="auto").usage.prompt_tokens
    assert with_tool == len(models["first"].prompt_ids(QUESTION, [TOOL])) > plain
    assert answer(served, max_tokens=1, tools=[TOOL], tool_choice="none").usage.prompt_tokens == plain
    parts = [{"role": "user", "content": [{"type": "text", "text": QUESTION[0]["content"]}]}]
    reply = served.client.chat.completions.create(model="first", messages=parts, max_tokens=1)  # type: ignore[arg-type]
    assert reply.usage is not None
    assert reply.usage.prompt_tokens == plain


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"n": 2}, "n"),
        ({"frequency_penalty": 1.0}, "frequency_penalty"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"tool_choice": "always", "tools": [TOOL]}, "tool_choice"),
        ({"temperature": -1}, "temperature"),
        ({"stop": [""]}, "stop"),
        ({"max_tokens": 100_000}, "max_tokens"),
        ({"extra_body": {"chat_template": "{{ 1 }}"}}, "chat_template"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_not_honoured_is_refused(served: Served, options: dict[str, Any], words: str) -> None:
    with pytest.raises(openai.BadRequestError, match=words):
        answer(served, **options)


def test_bad_conversations_and_long_prompts_are_refused(served: Served) -> None:
    def ask(messages: Any) -> None:
        served.client.chat.completions.create(model="first", messages=messages)

    with pytest.raises(openai.BadRequestError, match="content"):
        ask([{"role": "user"}])
    with pytest.raises(openai.BadRequestError, match="role"):
        ask([{"role": "nobody", "content": "x"}])
    with pytest.raises(openai.BadRequestError, match="tokens") as refused:
        ask([{"role": "user", "content": "salt " * 5000}])
    assert refused.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="too many"):
        ask([{"role": "user", "content": "x"}] * 1025)
    for prompt in ("", [], [10**9], [-1]):
        with pytest.raises(openai.BadRequestError):
            served.client.completions.create(model="first", prompt=prompt)


def test_an_unknown_model_is_404(served: Served) -> None:
    with pytest.raises(openai.NotFoundError, match="first, second") as refused:
        answer(served, "third")
    assert refused.value.code == "model_not_found"
    assert raw(served, "/v1/engines")[0] == 404


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"{", 400),
        (b"[]", 400),
        (b"\xff\xfe", 400),
        (b"[" * 100_000, 400),
        (b'{"model": "first", "messages": [{"role": "user", "content": "\\ud800"}]}', 400),
        (b'{"model": "first", "messages": "' + b"x" * 400_000 + b'"}', 413),
    ],
    ids=["cut", "list", "no UTF-8", "deep", "surrogate", "large"],
)
def test_broken_bodies_are_refused_in_openais_format(served: Served, body: bytes, status: int) -> None:
    got, _, content = raw(served, "/v1/chat/completions", body)
    assert got == status
    error = json.loads(content)["error"]
    assert error["message"]
    assert error["code"]
    assert b"Traceback" not in content


def test_only_json_from_this_machine_without_a_key(served: Served) -> None:
    body = json.dumps({"model": "first", "messages": QUESTION, "max_tokens": 1}).encode()
    assert raw(served, "/v1/chat/completions", body)[0] == 200
    assert raw(served, "/v1/chat/completions", body, **{"Content-Type": "text/plain"})[0] == 415
    assert raw(served, "/v1/models", Host="rebound.example")[0] == 403


def test_a_wrong_key_is_401(serving: Any) -> None:
    with serving(key=KEY) as served:
        assert served.client.models.list().data
        for wrong in ("", KEY[:-1], KEY + "x", "ключ"):
            status, headers, content = raw(served, "/v1/models", Authorization=f"Bearer {wrong}".encode())
            assert status == 401
            assert headers["www-authenticate"] == "Bearer"
            assert json.loads(content)["error"]["type"] == "authentication_error"
        assert raw(served, "/metrics")[0] == 401
        assert raw(served, "/health")[0] == raw(served, "/")[0] == 200


# -- load -------------------------------------------------------------------------------------------------------------


def test_over_the_limit_is_503_with_retry_after(serving: Any) -> None:
    with serving(Limits(batch=1, waiting=1)) as served:
        streams = [answer(served, stream=True) for _ in range(2)]
        for stream in streams:
            next(stream)
            break
        assert until(lambda: served.api.gate.inside == 2)
        with pytest.raises(openai.InternalServerError) as refused:
            answer(served, max_tokens=1)
        assert refused.value.status_code == 503
        assert int(refused.value.response.headers["retry-after"]) > 0
        for stream in streams:
            stream.close()
        assert until(lambda: served.api.gate.inside == 0)
        assert answer(served, max_tokens=1).usage.completion_tokens == 1


def test_a_client_that_goes_away_stops_costing(served: Served) -> None:
    engine = served.api.engines["first"]
    stream = answer(served, stream=True)
    next(stream)
    # Waited for: between two steps the engine moves a request from one list to another.
    assert until(lambda: engine.held == 1)
    stream.close()
    assert until(lambda: engine.held == 0)

    body = json.dumps({"model": "first", "messages": QUESTION}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
    with socket.create_connection(urlsplit(served.url).netloc.split(":")) as connection:
        connection.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)
        assert until(lambda: engine.held == 1)
    assert until(lambda: engine.held == 0)
    assert not engine._tickets
    assert served.api.gate.inside == 0


def test_a_prompt_whose_client_is_gone_is_never_rendered(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """One thread renders for all: what waits for it must not be what nobody waits for."""
    busy, rendered = threading.Event(), []
    monkeypatch.setattr("slimtune.serve.api._plain_ids", lambda opened, prompt: rendered.append(prompt) or [1])
    body = json.dumps({"model": "first", "prompt": "?", "max_tokens": 1}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    served.api._renderer.submit(busy.wait, 60)
    try:
        for _ in range(5):
            with socket.create_connection(urlsplit(served.url).netloc.split(":")) as connection:
                connection.sendall(head + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
                assert until(lambda: served.api.gate.inside == 1)
            assert until(lambda: served.api.gate.inside == 0)
    finally:
        busy.set()
    assert raw(served, "/v1/completions", body)[0] == 200
    assert rendered == ["?"]


def test_health_metrics_and_the_page(served: Served) -> None:
    answer(served, "second", max_tokens=3)
    assert raw(served, "/health")[0] == 200
    text = raw(served, "/metrics")[2].decode()
    assert re.search(r'^slimtune_requests_total\{path="/v1/chat/completions",status="200"\} [1-9]', text, re.M)
    assert re.search(r'^slimtune_reply_tokens_total\{model="second"\} [1-9]', text, re.M)
    assert re.search(r'^slimtune_engine_requests\{model="second"\} 0', text, re.M)
    status, headers, page = raw(served, "/")
    assert status == 200
    assert "default-src 'none'" in headers["content-security-policy"]
    assert b"http://" not in page
    assert b"https://" not in page
