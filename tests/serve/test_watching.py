"""The live page over HTTP and in a browser: who gets in, what it shows, how it stops a run, how it ends."""

from __future__ import annotations

import http.client
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from slimtune.language import spoken
from slimtune.run.live import LiveRun
from slimtune.run.lock import is_asked, lock_run
from slimtune.serve import watching
from slimtune.serve.address import listen
from slimtune.serve.server import WebServer
from slimtune.serve.watching import Watching
from tests.run.test_live import step, write
from tests.serve.chromium import browser

TOKEN = "a-token"
JSON = {"Content-Type": "application/json"}


@dataclass
class Page:
    port: int
    web: WebServer
    told: list[str]

    def ask(self, path: str, method: str = "GET", body: str | None = None, **headers: str) -> tuple[int, Any, str]:
        client = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        client.request(method, path, body, named)
        answer = client.getresponse()
        read = answer.status, answer.headers, answer.read().decode()
        client.close()
        return read

    def stop(self, body: str = '{"run": 0}', **headers: str) -> int:
        return self.ask(f"/{TOKEN}/stop", "POST", body, **({"Content_Type": "application/json"} | headers))[0]

    @contextmanager
    def events(self, query: str = "") -> Iterator[Callable[[], Any]]:
        """What gives the next event: its pieces, or its name."""
        client = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        client.request("GET", f"/{TOKEN}/events{query}")
        answer = client.getresponse()

        def following() -> Any:
            while True:
                line = answer.readline().decode()
                assert line, "the stream has ended"
                if line.startswith("event: "):
                    return line[7:].strip()
                if line.startswith("data: "):
                    return json.loads(line[6:])

        try:
            yield following
        finally:
            client.close()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    path = tmp_path / "run"
    path.mkdir()
    write(path / "metrics.jsonl", *(step(number) for number in range(1, 21)))
    return path


@pytest.fixture
def serving(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    monkeypatch.setattr(watching, "_TICK", 0.05)

    @contextmanager
    def started(*runs: Path) -> Iterator[Page]:
        ready, told = threading.Event(), list[str]()
        with listen("127.0.0.1", 0) as listening:
            live = [LiveRun(path, path.name) for path in runs]
            web = WebServer(Watching(live, TOKEN, told.append), ready.set)
            thread = threading.Thread(target=web.run, kwargs={"sockets": [listening]})
            thread.start()
            try:
                assert ready.wait(30)
                yield Page(listening.getsockname()[1], web, told)
            finally:
                web.should_exit = True
                thread.join(30)
                assert not thread.is_alive()

    return started


def test_who_gets_in(run: Path, serving: Callable[..., Any]) -> None:
    with serving(run) as page, lock_run(run):
        status, headers, text = page.ask(f"/{TOKEN}/", Accept_Language="zh-CN")
        assert status == 200
        assert "运行实况" in text
        nonce = text.partition('<script nonce="')[2].partition('"')[0]
        assert f"script-src 'nonce-{nonce}'" in headers["Content-Security-Policy"]
        assert "default-src 'none'" in headers["Content-Security-Policy"]
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Referrer-Policy"] == "no-referrer"
        for path in ("/", "/other/", "/other/events", f"/{TOKEN}x/", f"/{TOKEN}%00/", "/%ff/", f"/{TOKEN}/../other/"):
            assert page.ask(path)[0] == 404, path
        assert page.ask("/other/stop", "POST", '{"run": 0}', Content_Type="application/json")[0] == 404
        # A name that was rebound to this machine; another site's page; a form, which needs no preflight.
        assert page.ask(f"/{TOKEN}/", Host="evil.example")[0] == 403
        assert page.ask(f"/{TOKEN}/events", Host=f"evil.example:{page.port}")[0] == 403
        assert page.stop(Origin="http://evil.example") == 403
        assert page.stop(Origin="null") == 403
        assert page.stop(Content_Type="text/plain") == 415
        assert page.ask(f"/{TOKEN}/stop")[0] == 405
        for body in ("", "[]", '{"run": 1}', '{"run": true}', '{"run": -1}', "[" * 900):
            assert page.stop(body) == 400, body
        assert page.stop("x" * 2000) == 413
        assert not is_asked(run)
        assert page.stop(Origin=f"http://127.0.0.1:{page.port}") == 200
        assert is_asked(run)


def test_a_run_that_nobody_works_on_is_not_stopped(run: Path, serving: Callable[..., Any]) -> None:
    with serving(run) as page:
        assert page.stop() == 409
        assert not is_asked(run)


def test_events_begin_with_all_and_go_on_with_what_changes(run: Path, serving: Callable[..., Any]) -> None:
    with serving(run) as page, lock_run(run), page.events() as english, page.events("?lang=zh") as chinese:
        assert "20 / 100" in english()["tiles-0"]
        assert "剩余时间" in chinese()["tiles-0"]
        write(run / "metrics.jsonl", step(21))
        changed = english()
        assert "21 / 100" in changed["tiles-0"]
        assert changed.keys() <= {"tiles-0", "charts", "state-0", "stop-0"}
        write(run / "metrics.jsonl", {"event": "skipped", "step": 22, "rows": ["a.jsonl:5"]})
        while "events-0" not in changed:
            changed = english()
        assert "a.jsonl:5" in changed["events-0"]
        page.web.should_exit = True
        while english() != "end":
            pass


def test_a_folder_that_vanishes_is_told_once_and_may_come_back(run: Path, serving: Callable[..., Any]) -> None:
    aside = run.with_name("aside")
    with serving(run) as page, page.events() as following:
        following()
        run.rename(aside)
        changed = following()
        assert "the folder is gone" in changed["state-0"]
        aside.rename(run)
        assert "stopped" in following()["state-0"]
        assert page.told == [f"{run} is gone"]


def test_no_more_pages_than_fit(run: Path, serving: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "STREAMS", 1)
    with serving(run) as page:
        with page.events() as following:
            following()
            assert page.ask(f"/{TOKEN}/events")[0] == 503
        deadline = time.monotonic() + 30
        while page.web._api.gate.inside:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        with page.events() as following:
            following()


def test_the_command_says_where_and_a_taken_port_is_one_line(run: Path, tmp_path: Path) -> None:
    (run / "config.yaml").write_text("model: m\n", encoding="utf-8")
    words = [sys.executable, "-c", "from slimtune.cli import main; main()", "watch", str(run), "--port"]
    with listen("127.0.0.1", 0) as taken:
        port = str(taken.getsockname()[1])
        done = subprocess.run([*words, port], capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 2
        assert f"127.0.0.1:{port} can't be listened on" in done.stderr
    page = subprocess.Popen([*words, "0"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert page.stdout is not None
    url = page.stdout.readline().split()[-1]
    assert url.startswith("http://127.0.0.1:")
    assert len(url.rstrip("/").rpartition("/")[2]) >= 32
    page.send_signal(2)
    assert page.wait(30) == 0
    assert page.stderr is not None
    assert page.stderr.read() == "slimtune: ending\n"


def test_beside_a_training_it_ends_with_it(
    run: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from slimtune.cli import watch

    taken = listen("127.0.0.1", 0)
    usual = taken.getsockname()[1]
    monkeypatch.setattr(watch, "_PORT", usual)
    with taken, watch.beside(run):
        line, more = capfd.readouterr().err.splitlines()
        url = line.split()[-1]
        port = int(url.split(":")[2].partition("/")[0])
        assert more.strip() == f"port {usual} is taken, so this page has port {port}"
        page = Page(port, None, [])  # type: ignore[arg-type]
        assert page.ask("/" + url.partition("/" + url.split("/")[3])[1].strip("/") + "/")[0] == 200
    with pytest.raises(OSError, match="refused"):
        page.ask("/")
    with watch.beside(None):
        pass


def test_the_address_asks_for_the_language_that_is_spoken() -> None:
    from slimtune.cli.watch import _url

    with listen("127.0.0.1", 0) as listening:
        port = listening.getsockname()[1]
        assert _url(listening, "token") == f"http://127.0.0.1:{port}/token/"
        with spoken("zh"):
            assert _url(listening, "token") == f"http://127.0.0.1:{port}/token/?lang=zh"


def test_in_a_browser(run: Path, serving: Callable[..., Any], tmp_path: Path) -> None:
    """Thousands of points on a phone and on a screen; it grows, two presses stop the run; it outlives the server."""
    write(run / "metrics.jsonl", *(step(number, 9000, loss=2 + number % 7 / 9) for number in range(21, 6000)))
    said = [{"row": "a:1", "prompt": "<script>p", "expected": "e", "reply": "r", "ended": "stop"}]
    write(run / "samples.jsonl", {"step": 0, "seconds": 1.0, "samples": said})
    with serving(run) as page, lock_run(run), browser(tmp_path / "profile") as tab:
        for width, dark, lang, word in ((360, True, "zh", "保存检查点并停止"), (1280, False, "en", "Stop with")):
            tab.show(f"http://127.0.0.1:{page.port}/{TOKEN}/?lang={lang}", width=width, dark=dark)
            tab.until(f"document.querySelectorAll('svg').length >= 5 && document.body.innerText.includes('{word}')")
            assert tab.run("document.documentElement.scrollWidth") <= width
            # No tile's figure is cut.
            assert tab.run("[...document.querySelectorAll('dd')].every(one => one.scrollWidth <= one.clientWidth)")
            assert tab.run("getComputedStyle(document.body).backgroundColor < 'rgb(2'") == dark
        write(run / "metrics.jsonl", step(6000, 9000))
        tab.until("document.body.innerText.includes('6,000 / 9,000')")
        tab.run("document.querySelector('button[data-run]').click()")
        assert not is_asked(run)
        tab.run("document.querySelector('button[data-run]').click()")
        tab.until("!document.querySelector('button[data-run]')")
        assert is_asked(run)
        page.web.should_exit = True
        tab.until("!document.getElementById('link').hidden")
        assert "slimtune watch" in tab.run("document.getElementById('link').textContent")
        assert tab.run("document.querySelectorAll('svg').length") >= 5
        assert tab.complaints == []
        assert {address.split("/")[2] for address in tab.asked if not address.startswith("data:")} <= {
            f"127.0.0.1:{page.port}", "blank"
        }  # fmt: skip
