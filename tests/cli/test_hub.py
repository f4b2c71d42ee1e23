"""The hub where there is no network, or nothing is answered: said soon, and without its client; one that answers is
left to that client."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from slimtune.cli import hub
from slimtune.cli.hub import cached_models, check_model, look_for_hub
from slimtune.errors import UserError
from slimtune.language import spoken

VARIABLES = (*hub._ASKED_OFFLINE, "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HTTP_PROXY", "NO_PROXY", "ALL_PROXY",
             "HF_HUB_ETAG_TIMEOUT")  # fmt: skip
SILENT = 1
"""A port of this machine where nobody listens."""


@pytest.fixture(autouse=True)
def nothing_set(tmp_path: Path) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name in (*VARIABLES, *map(str.lower, VARIABLES)):
            patch.setenv(name, "")  # so that what the tested code sets is taken back
            patch.delenv(name)
        patch.setenv("HF_HOME", str(tmp_path))
        patch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{SILENT}")
        yield


@pytest.fixture
def listening() -> Iterator[str]:
    """Where connections are taken and nothing is answered."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


class Elsewhere(BaseHTTPRequestHandler):
    """Sends everybody, after a while, to where nobody answers."""

    def do_HEAD(self) -> None:
        time.sleep(0.5)
        self.send_response(307)
        self.send_header("Location", f"http://127.0.0.1:{SILENT}")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Nothing."""


@pytest.fixture
def slow() -> Iterator[str]:
    """A hub, or a proxy, that answers after a while."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Elsewhere) as server:
        Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_hub_that_takes_no_connection_is_said_once_and_left_alone(capsys: pytest.CaptureFixture[str]) -> None:
    with spoken("zh"):
        assert not look_for_hub("smollm2-135m", "a/b")
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    assert capsys.readouterr().err == "无法连接 127.0.0.1：连接被拒绝。只读取缓存中已有的内容，不下载。\n"
    assert not look_for_hub("a/c")
    assert capsys.readouterr().err == ""


def test_it_isnt_asked_without_need(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "_unreachable", lambda url: pytest.fail(url))
    assert look_for_hub("smollm2-135m", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    assert look_for_hub("a/b")
    monkeypatch.setenv("HF_HUB_OFFLINE", "yes")
    with pytest.raises(UserError, match="a/b isn't in the hub's cache"):
        check_model("a/b")


def test_a_slow_one_is_left_to_its_client(slow: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", slow)
    assert look_for_hub("a/b")
    monkeypatch.setenv("HTTP_PROXY", f"127.0.0.1:{SILENT}")
    assert not look_for_hub("a/b")


def test_one_that_never_answers_isnt_waited_for(
    listening: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(hub, "_ANSWER", 0.4)
    monkeypatch.setenv("HF_ENDPOINT", listening)
    assert not look_for_hub("a/b")
    assert "can't be reached: no answer within 0 s" in capsys.readouterr().err
    assert os.environ.pop("HF_HUB_OFFLINE") == "1"
    monkeypatch.setenv("HF_HUB_ETAG_TIMEOUT", "1")  # as long as its client would wait
    assert not look_for_hub("a/b")
    assert "no answer within 1 s" in capsys.readouterr().err


def test_behind_a_proxy_that_is_what_must_be_there(slow: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://hub.invalid")
    monkeypatch.setenv("HTTP_PROXY", slow)
    assert look_for_hub("a/b")
    monkeypatch.setattr(hub, "_ANSWER", 0.1)
    assert not look_for_hub("a/b")
    del os.environ["HF_HUB_OFFLINE"]
    monkeypatch.setenv("NO_PROXY", "hub.invalid")
    assert not look_for_hub("a/b")


@pytest.mark.parametrize("scheme", ["http", "socks5"])
def test_a_proxy_for_all_is_asked_in_its_place(
    scheme: str, slow: str, listening: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "_ANSWER", 1.0)
    monkeypatch.setenv("HF_ENDPOINT", listening)
    monkeypatch.setenv("ALL_PROXY", slow.replace("http", scheme))
    assert look_for_hub("a/b")


def test_a_model_that_is_in_its_cache_needs_no_hub(tmp_path: Path) -> None:
    assert cached_models() == []
    for name, files in (("whole", ("config.json", "model.safetensors")), ("half", ("config.json",)), ("none", ())):
        folder = tmp_path / "hub" / f"models--a--{name}" / "snapshots" / "1"
        folder.mkdir(parents=True)
        for file in files:
            (folder / file).write_text("{}")
    assert cached_models() == ["a/whole"]
    for name in ("whole", "half"):  # of the latter the config alone may be what is wanted
        check_model(f"a/{name}")
        del os.environ["HF_HUB_OFFLINE"]
    with pytest.raises(UserError, match="a/none isn't in the hub's cache"):
        check_model("a/none")


@pytest.mark.parametrize("words", [("train", "a/b", __file__), ("plan", "a/b"), ("chat", "a/b")])
def test_the_verbs_know_it_without_the_libraries(words: tuple[str, ...]) -> None:
    script = (
        f"import sys; sys.argv = ['slimtune', *{words!r}]\n"
        "from slimtune.cli import main\n"
        "try: main()\n"
        "finally: print(*{'torch', 'huggingface_hub', 'transformers'} & set(sys.modules))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "\n")
    assert "can't be reached" in done.stderr
    assert "isn't in the hub's cache" in done.stderr
