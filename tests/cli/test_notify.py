"""--notify: an address gets JSON, a command gets it on its input; what fails is a line, and ends in time."""

from __future__ import annotations

import json
import shlex
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from slimtune.cli import notify
from slimtune.cli.notify import check_targets, notifying
from slimtune.errors import GuardStop, StopRequested, UserError


class Inbox(BaseHTTPRequestHandler):
    got: list[tuple[str, Any]]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.got.append((self.path, json.loads(body)))
        status = int(self.path.strip("/") or 200)
        self.send_response(status)
        if status == 302:
            self.send_header("Location", "/200")
        self.end_headers()

    def do_GET(self) -> None:
        self.do_POST()

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def inbox() -> Iterator[tuple[str, list[tuple[str, Any]]]]:
    got: list[tuple[str, Any]] = []
    server = HTTPServer(("127.0.0.1", 0), type("Own", (Inbox,), {"got": got}))
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", got
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run whose name would do something in a shell that read it."""
    path = tmp_path / "a $(touch hit) `touch hit`; touch hit"
    path.mkdir()
    facts = {"base": {"model": "m"}, "training": {"steps": 7, "last_loss": 1.5}, "verdict": {"outcome": "better"}}
    (path / "facts.json").write_text(json.dumps(facts), encoding="utf-8")
    return path


def ended(targets: list[str], run: Path | None, error: BaseException | None = None) -> None:
    with suppress(type(error) if error is not None else KeyError), notifying(targets, lambda: run):
        if error is not None:
            raise error


@pytest.mark.parametrize(
    ("error", "outcome", "code"),
    [
        (None, "done", 0), (GuardStop("loss is nan", rule="r"), "guard", 3), (UserError("no room"), "error", 2),
        (ZeroDivisionError("x"), "error", 1),
    ],
)  # fmt: skip
def test_an_address_gets_what_happened(
    inbox: tuple[str, list[tuple[str, Any]]], run: Path, error: Exception | None, outcome: str, code: int,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    url, got = inbox
    ended([url], run, error)
    ((_, told),) = got
    assert (told["outcome"], told["exit_code"], told["run"], told["steps"]) == (outcome, code, str(run), 7)
    assert str(error or "done").splitlines()[0] in told["text"]
    assert capsys.readouterr().err == ""


def test_a_model_that_is_worse_and_a_run_that_never_began(inbox: tuple[str, list[Any]], run: Path) -> None:
    url, got = inbox
    (run / "facts.json").write_text('{"training": {"steps": 1}, "verdict": {"outcome": "worse"}}', encoding="utf-8")
    ended([url], run)
    ended([url], None, UserError("no model"))
    assert [(told["outcome"], told["exit_code"]) for _, told in got] == [("worse", 4), ("error", 2)]


def test_who_asked_for_the_stop_is_not_told(inbox: tuple[str, list[Any]], run: Path) -> None:
    ended([inbox[0]], run, StopRequested("stopped by SIGTERM"))
    ended([inbox[0]], run, KeyboardInterrupt())
    assert inbox[1] == []


def test_a_command_reads_it_and_nothing_of_the_run_is_run(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    script = 'cat > told.json; printf "%s\\n" "$SLIMTUNE_OUTCOME" "$SLIMTUNE_RUN" $SLIMTUNE_MESSAGE > names'
    ended([script], run, GuardStop("loss is nan in $(touch hit)"))
    assert json.loads((tmp_path / "told.json").read_text("utf-8"))["message"] == "loss is nan in $(touch hit)"
    assert (tmp_path / "names").read_text("utf-8").splitlines()[:3] == ["guard", str(run), "loss"]
    assert not list(tmp_path.rglob("hit"))


def test_what_fails_is_a_line_and_the_outcome_stays(
    inbox: tuple[str, list[tuple[str, Any]]], run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url, got = inbox
    targets = [f"{url}/500", f"{url}/302", "http://127.0.0.1:1/secret", "echo what >&2; exit 3", "true"]
    with pytest.raises(GuardStop, match="loss is nan"), notifying(targets, lambda: run):
        raise GuardStop("loss is nan")
    assert {path for path, _ in got} == {"/500", "/302"}  # it isn't sent on
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4
    assert "it answered 500" in lines[0]
    assert "it answered 302" in lines[1]
    assert "refused" in lines[2]
    assert "secret" not in lines[2]
    assert "it ended with exit code 3: what" in lines[3]


def test_what_hangs_is_left(run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(notify, "SECONDS", 0.3)
    began = time.monotonic()
    ended(["sleep 60 & sleep 60"], run)
    assert time.monotonic() - began < 30
    assert "ended after" in capsys.readouterr().err


@pytest.mark.parametrize("target", ["", " ", "http://", "ftp://host/x", "htps://host"])
def test_what_is_neither_is_refused_before_anything(target: str) -> None:
    with pytest.raises(UserError, match="neither an address nor a command"):
        check_targets([target])
    check_targets(["https://host/x", "notify-send done", f"curl -d @- {shlex.quote('https://host')}"])
