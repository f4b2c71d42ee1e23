"""The page to try a server by, in a browser, on a server that only notes what it is asked."""

from __future__ import annotations

import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from pathlib import Path
from threading import Thread
from typing import Any

from tests.serve.chromium import browser

MODELS = ["smollm2-135m", "my-run"]


def test_each_reply_names_its_model_and_another_model_begins_another_conversation(tmp_path: Path) -> None:
    asked: list[dict[str, Any]] = []

    class Noting(BaseHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:
            pass

        def _answer(self, kind: str, text: str) -> None:
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.end_headers()
            self.wfile.write(text.encode())

        def do_GET(self) -> None:
            if self.path == "/v1/models":
                self._answer("application/json", json.dumps({"data": [{"id": name} for name in MODELS]}))
            else:
                page = files("slimtune.serve").joinpath("page.html").read_text("utf-8")
                self._answer("text/html; charset=utf-8", page)

        def do_POST(self) -> None:
            asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            said = {"choices": [{"delta": {"content": f"reply {len(asked)}"}}], "usage": {"completion_tokens": 2}}
            self._answer("text/event-stream", f"data: {json.dumps(said)}\n\ndata: [DONE]\n\n")

    def ask(text: str) -> None:
        number = len(asked) + 1
        tab.run(f"at('text').value = {text!r}; at('form').requestSubmit()")
        tab.until(f"!running && document.body.innerText.includes('reply {number}')")

    server = ThreadingHTTPServer(("127.0.0.1", 0), Noting)
    Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}/"
    try:
        with browser(tmp_path / "profile") as tab:
            tab.show(f"{address}?lang=zh", width=360, dark=True)
            tab.until("document.querySelectorAll('#model option').length == 2")
            assert tab.run("document.getElementById('send').textContent") == "发送"
            assert tab.run("document.documentElement.scrollWidth") <= 360
            tab.show(f"{address}?lang=en")
            tab.until("document.querySelectorAll('#model option').length == 2")
            ask("one")
            ask("two")
            assert [each["content"] for each in asked[1]["messages"]] == ["one", "reply 1", "two"]
            assert tab.run("[...document.querySelectorAll('.who')].map(one => one.textContent)") == MODELS[:1] * 2
            tab.run("at('model').value = 'my-run'; at('model').dispatchEvent(new Event('change'))")
            assert tab.run("document.querySelectorAll('.turn').length") == 0
            ask("three")
            assert (asked[2]["model"], [each["content"] for each in asked[2]["messages"]]) == ("my-run", ["three"])
            assert tab.run("document.querySelector('.who').textContent") == "my-run"
            assert tab.complaints == []
    finally:
        server.shutdown()
        server.server_close()
