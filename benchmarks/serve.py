"""How much more do 16 clients get than one, and does the server hold when 200 clients behave as badly as they can?

`throughput`: clients that each ask one question after the other, greedily, through `slimtune serve` on loopback.

`load`: half of the clients ask and check what they get: every greedy answer must equal the one that
`slimtune.use.generate` computes for that prompt alone, before the server starts; in 16 bits, where the two round
otherwise, the one that the server gives to the prompt before the others come. The other half read slowly, send
slowly, break off while they send or while they read, send too much, or hold connections and never ask. Counted are
statuses (no 5xx but 503 with Retry-After may come), answers that differ, connections that break without a reason, and
the server's memory.

    python benchmarks/serve.py RUN --minutes 10 -o benchmarks/results/DATE-serve.json
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import torch

from slimtune.hardware import detect
from slimtune.run.environment import library_versions
from slimtune.run.quiet import upstream_to_log
from slimtune.use.general import GENERAL
from slimtune.use.generate import generate
from slimtune.use.load import open_model
from slimtune.use.sampling import Sampling

TOKENS = 24
QUESTIONS = [question.messages for question in GENERAL[:16]]


@dataclass
class Seen:
    """What the clients saw."""

    statuses: Counter[str] = field(default_factory=Counter)
    answers: int = 0
    different: list[dict[str, str]] = field(default_factory=list)
    faults: Counter[str] = field(default_factory=Counter)

    def status(self, kind: str, status: int, headers: dict[str, str]) -> None:
        self.statuses[f"{kind} {status}"] += 1
        if status >= 500 and not (status == 503 and "retry-after" in headers):
            self.faults[f"{kind}: status {status} without Retry-After"] += 1


class Http:
    """One request on one connection, by hand: a client that can misbehave."""

    def __init__(self, address: tuple[str, int]) -> None:
        self.address = address

    async def __aenter__(self) -> Http:
        self.reader, self.writer = await asyncio.open_connection(*self.address, limit=2**24)
        return self

    async def __aexit__(self, *_: object) -> None:
        self.writer.transport.abort()

    def send(self, body: bytes, *, length: int | None = None) -> None:
        head = (
            "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body) if length is None else length}\r\nConnection: close\r\n\r\n"
        )
        self.writer.write(head.encode() + body)

    async def head(self) -> tuple[int, dict[str, str]]:
        lines = (await self.reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        headers = dict(line.lower().split(": ", 1) for line in lines[1:] if line)
        return int(lines[0].split()[1]), headers

    async def rest(self, headers: dict[str, str]) -> bytes:
        if "content-length" in headers:
            return await self.reader.readexactly(int(headers["content-length"]))
        raw = await self.reader.read(-1)
        if headers.get("transfer-encoding") != "chunked":
            return raw
        made = b""
        while raw:
            size, raw = raw.split(b"\r\n", 1)
            made, raw = made + raw[: int(size, 16)], raw[int(size, 16) + 2 :]
        return made


def body(model: str, question: Any, *, stream: bool = False, tokens: int = TOKENS) -> bytes:
    return json.dumps({"model": model, "messages": question, "max_tokens": tokens, "stream": stream}).encode()


def text_of(content: bytes, stream: bool) -> str:
    if not stream:
        return str(json.loads(content)["choices"][0]["message"]["content"])
    events = [line[6:] for line in content.decode().split("\n\n") if line]
    if events[-1] != "[DONE]":
        raise ValueError("the stream has no end")
    return "".join(json.loads(event)["choices"][0]["delta"].get("content", "") for event in events[:-1])


# -- the server and what it must answer -------------------------------------------------------------------------------


def generated(target: str, tokens: int, dtype: str) -> list[str]:
    """What `generate` answers to each question alone."""
    with upstream_to_log(None):
        opened = open_model(target, dtype=dtype)
        texts = []
        for question in QUESTIONS:
            reply = next(iter(generate(opened, [opened.prompt_ids(question)], Sampling(max_new_tokens=tokens))))
            texts.append(reply.text)
    return texts


async def served(address: tuple[str, int]) -> list[str]:
    """What the server answers to each question when nobody else asks."""
    texts = []
    for question in QUESTIONS:
        async with Http(address) as http:
            http.send(body("tuned", question))
            _, headers = await http.head()
            texts.append(text_of(await http.rest(headers), stream=False))
    return texts


@asynccontextmanager
async def server(target: str, dtype: str) -> AsyncIterator[tuple[tuple[str, int], psutil.Process]]:
    command = [Path(sys.executable).with_name("slimtune"), "serve", f"tuned={target}", "--port", "0"]
    with (
        tempfile.NamedTemporaryFile(suffix=".log") as log,
        subprocess.Popen(
            [*command, "--compute-dtype", dtype, "--log", log.name], stdout=subprocess.PIPE, text=True
        ) as process,
    ):
        assert process.stdout is not None
        line = await asyncio.to_thread(process.stdout.readline)
        found = re.search(r"http://([\d.]+):(\d+)", line)
        assert found, line
        try:
            yield (found[1], int(found[2])), psutil.Process(process.pid)
        finally:
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0


# -- throughput -------------------------------------------------------------------------------------------------------


async def throughput(address: tuple[str, int], clients: int, seconds: float, tokens: int) -> dict[str, Any]:
    """Tokens a second of all clients together, each of which asks one question after the other until time is up.

    Of an answer that is under way then, the part within the time counts, by the seconds.
    """
    made = 0.0
    end = time.perf_counter() + seconds

    async def client(number: int) -> None:
        nonlocal made
        for ask in itertools.count(number):
            if (began := time.perf_counter()) > end:
                return
            async with Http(address) as http:
                http.send(body("tuned", QUESTIONS[ask % len(QUESTIONS)], tokens=tokens))
                status, headers = await http.head()
                assert status == 200
                answer = json.loads(await http.rest(headers))
            took = time.perf_counter() - began
            made += answer["usage"]["completion_tokens"] * min(1.0, (end - began) / took)

    await asyncio.gather(*map(client, range(clients)))
    return {
        "clients": clients, "tokens": round(made), "seconds": seconds, "tokens_per_second": round(made / seconds, 2),
    }  # fmt: skip


# -- load -------------------------------------------------------------------------------------------------------------


async def good(address: tuple[str, int], seen: Seen, answers: list[str], draw: random.Random) -> None:
    number, stream = draw.randrange(len(QUESTIONS)), draw.random() < 0.5
    async with Http(address) as http:
        http.send(body("tuned", QUESTIONS[number], stream=stream))
        status, headers = await http.head()
        seen.status("good", status, headers)
        content = await http.rest(headers)
    if status == 200:
        seen.answers += 1
        text = text_of(content, stream)
        if text != answers[number]:
            seen.different.append({"got": text, "alone": answers[number]})
    else:
        await asyncio.sleep(int(headers["retry-after"]))


async def slow_reader(address: tuple[str, int], seen: Seen, draw: random.Random) -> None:
    async with Http(address) as http:
        http.send(body("tuned", QUESTIONS[0], stream=True, tokens=200))
        status, headers = await http.head()
        seen.status("slow reader", status, headers)
        for _ in range(20):
            if not await http.reader.read(40):
                break
            await asyncio.sleep(1)


async def slow_sender(address: tuple[str, int], seen: Seen, draw: random.Random) -> None:
    content = body("tuned", QUESTIONS[1], tokens=4)
    async with Http(address) as http:
        http.send(b"", length=len(content))
        try:
            for at in range(0, len(content), 16):
                http.writer.write(content[at : at + 16])
                await http.writer.drain()
                await asyncio.sleep(draw.choice([0.05, 4.0]))
        except ConnectionError:
            pass  # it was refused while it was still sending; the answer may be there to read
        try:
            status, headers = await http.head()
            seen.status("slow sender", status, headers)
        except (ConnectionError, asyncio.IncompleteReadError):
            seen.statuses["slow sender cut off"] += 1


async def cut_body(address: tuple[str, int], seen: Seen, draw: random.Random) -> None:
    content = body("tuned", QUESTIONS[2])
    async with Http(address) as http:
        http.send(content[: draw.randrange(len(content))], length=len(content))
        await http.writer.drain()
        await asyncio.sleep(draw.random())
    seen.statuses["cut while sending"] += 1


async def cut_answer(address: tuple[str, int], seen: Seen, draw: random.Random) -> None:
    stream = draw.random() < 0.5
    async with Http(address) as http:
        http.send(body("tuned", QUESTIONS[3], stream=stream, tokens=500))
        if stream:
            status, headers = await http.head()
            seen.status("cut while reading", status, headers)
        await asyncio.sleep(3 * draw.random())


async def oversized(address: tuple[str, int], seen: Seen, draw: random.Random) -> None:
    size = draw.choice([300_000, 3_000_000])
    async with Http(address) as http:
        http.send(body("tuned", [{"role": "user", "content": "x" * size}]))
        status, headers = await http.head()
        seen.status("large body", status, headers)
    async with Http(address) as http:
        http.send(body("tuned", [{"role": "user", "content": "salt " * 6000}]))
        status, headers = await http.head()
        seen.status("long prompt", status, headers)
    await asyncio.sleep(1)


async def half_open(address: tuple[str, int], seen: Seen, draw: random.Random) -> None:
    """Forty connections that never come to ask: each must be ended by the server.

    All such clients open theirs at the same moment, once in fifteen seconds: more of them than there are places.
    """
    sent = [b"", b"GET", b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"]
    await asyncio.sleep(-time.monotonic() % 15)

    async def one() -> None:
        reader, writer = await asyncio.open_connection(*address)
        try:
            writer.write(draw.choice(sent))
            async with asyncio.timeout(60):
                while await reader.read(1000):
                    pass
            seen.statuses["half-open ended"] += 1
        except ConnectionError:
            seen.statuses["half-open ended"] += 1
        except TimeoutError:
            seen.faults["half-open for a minute"] += 1
        finally:
            writer.close()

    await asyncio.gather(*(one() for _ in range(40)))


BAD = (slow_reader, slow_sender, cut_body, cut_answer, oversized, half_open)


async def load(
    address: tuple[str, int], process: psutil.Process, answers: list[str], clients: int, minutes: float
) -> dict[str, Any]:
    seen, memory = Seen(), []
    started = time.monotonic()
    end = started + 60 * minutes

    async def client(number: int) -> None:
        draw = random.Random(number)
        bad = BAD[number // 2 % len(BAD)] if number % 2 else None
        while time.monotonic() < end:
            try:
                async with asyncio.timeout(400):
                    await (good(address, seen, answers, draw) if bad is None else bad(address, seen, draw))
            except (OSError, asyncio.IncompleteReadError, ValueError, TimeoutError) as error:
                kind = "good" if bad is None else bad.__name__
                seen.faults[f"{kind}: {type(error).__name__}: {error}"] += 1
                await asyncio.sleep(1)

    async def weigh() -> None:
        while time.monotonic() < end:
            memory.append((time.monotonic() - started, process.memory_info().rss, process.num_fds()))
            await asyncio.sleep(1)

    await asyncio.gather(weigh(), *map(client, range(clients)))
    return {
        "clients": clients,
        "minutes": minutes,
        "statuses": dict(sorted(seen.statuses.items())),
        "answers_checked": seen.answers,
        "answers_different": seen.different,
        "faults": dict(seen.faults),
        "memory": weighed(memory, minutes),
    }


def weighed(samples: list[tuple[float, int, int]], minutes: float) -> dict[str, Any]:
    """Resident memory after the warm-up, a fifth of the time: against its first minute's mean."""
    after = [rss for at, rss, _ in samples if at > 12 * minutes]
    first = sum(after[:60]) / len(after[:60])
    return {
        "warm_up_seconds": 12 * minutes,
        "mib_after_warm_up": round(first / 2**20, 1),
        "mib_most": round(max(after) / 2**20, 1),
        "mib_least": round(min(after) / 2**20, 1),
        "mib_last_minute": round(sum(after[-60:]) / len(after[-60:]) / 2**20, 1),
        "most_over_after_warm_up_percent": round(100 * (max(after) / first - 1), 2),
        "mib_every_15_s": [round(rss / 2**20, 1) for _, rss, _ in samples[::15]],
        "most_open_files": max(count for _, _, count in samples),
    }


async def measure(options: argparse.Namespace) -> dict[str, Any]:
    by_generate = generated(options.target, TOKENS, options.dtype) if options.minutes else []
    made: dict[str, Any] = {}
    async with server(options.target, options.dtype) as (address, process):
        if options.rounds:
            await throughput(address, 16, 1.0, 8)  # warm up
            rounds = []
            for _ in range(options.rounds):
                rounds.append([await throughput(address, *sizes, options.tokens) for sizes in ((1, 20.0), (16, 40.0))])
            one, many = (max(pair[side]["tokens_per_second"] for pair in rounds) for side in (0, 1))
            made["throughput"] = {"rounds": rounds, "one": one, "sixteen": many, "ratio": round(many / one, 2)}
            print(made["throughput"], flush=True)
        if options.minutes:
            alone = await served(address)
            equal = sum(a == b for a, b in zip(alone, by_generate, strict=True))
            made["alone_as_generate_says"] = f"{equal} of {len(alone)}"
            answers = by_generate if options.dtype == "fp32" else alone
            made["load"] = await load(address, process, answers, options.clients, options.minutes)
    return made


def main() -> None:
    hardware = detect()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target")
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--dtype", choices=["fp32", "bf16", "fp16"], default=hardware.compute_dtype)
    parser.add_argument("--rounds", type=int, default=3, help="of the throughput; 0: none")
    parser.add_argument("--tokens", type=int, default=96, help="of each answer of the throughput")
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--minutes", type=float, default=10.0, help="of the load test; 0: none")
    options = parser.parse_args()
    record = {
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": hardware.name,
        "threads": torch.get_num_threads(),
        "versions": library_versions(),
        "dtype": options.dtype,
        **asyncio.run(measure(options)),
    }
    print(json.dumps(record, indent=2))
    if options.output:
        options.output.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
