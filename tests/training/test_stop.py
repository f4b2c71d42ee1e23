"""Signals and the watchdog by themselves; the campaigns send them to whole runs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from slimtune.errors import GuardStop, StopRequested
from slimtune.training.stop import STOP_SIGNALS, StopSignals, Watchdog

CHINESE = {"LC_ALL": "zh_CN.UTF-8"}


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_outside_of_training_a_signal_stops_where_it_is(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with pytest.raises(StopRequested, match=number.name) as stop, StopSignals(Path("RUN")):  # noqa: PT012
        os.kill(os.getpid(), number)
        time.sleep(5)
    assert stop.value.exit_code == 75
    assert "slimtune resume RUN" in str(stop.value)
    assert signal.getsignal(number) is before


def test_in_training_it_waits_for_the_body() -> None:
    steps = []
    with pytest.raises(StopRequested), StopSignals() as signals, signals.deferred():  # noqa: PT012
        os.kill(os.getpid(), signal.SIGTERM)
        while signals.requested is None:
            time.sleep(0.01)
        steps.append("done")
    assert steps == ["done"]


def test_what_a_library_makes_of_it_is_still_a_stop() -> None:
    with pytest.raises(StopRequested), StopSignals():  # noqa: PT012
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        except StopRequested:
            raise RuntimeError("some issues during conversion") from None


def test_a_guard_stays_a_guard() -> None:
    with pytest.raises(GuardStop), StopSignals() as signals, signals.deferred():  # noqa: PT012
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.1)
        raise GuardStop("loss is nan")


SECOND = """
import os, signal, sys, time
from slimtune.training.stop import StopSignals
with StopSignals(rank=0 if sys.argv[2:] else None) as signals, signals.deferred():
    print("ready", flush=True)
    import threading
    threading.Event().wait() if sys.argv[1] == "wait" else [time.sleep(0.01) for _ in iter(int, 1)]
"""


@pytest.mark.parametrize("how", ["wait", "loop"])
def test_a_second_signal_ends_the_process_at_once(how: str) -> None:
    process = subprocess.Popen([sys.executable, "-c", SECOND, how], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 75


def test_a_launchers_copy_is_no_second_signal() -> None:
    process = subprocess.Popen([sys.executable, "-c", SECOND, "loop", "rank"], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    for _ in range(3):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.05)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(2)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 75


WAITS = """
import os, sys, threading
from slimtune.training.stop import StopSignals
kind = sys.argv[1]
with StopSignals() as signals, signals.deferrable():
    while True:
        try:
            print("ready", flush=True)
            threading.Event().wait() if kind == "swallowed" else os.read(os.pipe()[0], 1)
        except Exception:
            if kind != "swallowed":
                threading.Event().wait()  # a library that joins its threads on the way out
"""


@pytest.mark.parametrize(("kind", "number"), [("swallowed", signal.SIGTERM), ("joins", signal.SIGINT)])
def test_before_the_first_step_one_signal_is_enough(kind: str, number: signal.Signals) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", WAITS, kind], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 75
    assert f"stopped by {number.name}" in said


HOLDS_THE_LOCK_AT_FIRST = """
import collections, ctypes, itertools, os, signal
from slimtune.training.stop import StopSignals
with StopSignals() as signals, signals.deferrable():
    # All in C, with the interpreter's lock: the signal, and then what has no end.
    asks = map(ctypes.PyDLL(None).kill, [os.getpid()], [int(signal.SIGTERM)])
    collections.deque(itertools.chain(asks, itertools.repeat(0)), maxlen=0)
"""


def test_before_the_first_step_even_what_holds_the_interpreter_is_ended() -> None:
    done = subprocess.run([sys.executable, "-c", HOLDS_THE_LOCK_AT_FIRST], capture_output=True, text=True, timeout=60)
    assert done.returncode == -signal.SIGKILL
    assert "asked to stop, and Python itself hangs" in done.stderr


def test_from_the_first_step_on_it_waits_for_the_steps_end() -> None:
    ended = []
    with pytest.raises(StopRequested), StopSignals() as signals, signals.deferrable():  # noqa: PT012
        assert signals._unheard is not None
        signals.defer()
        assert signals._unheard is None
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(6)  # longer than the grace of what isn't deferred
        signals.defer()  # as each step does
        ended.append("step")
    assert ended == ["step"]


HANG = """
import sys, threading
from pathlib import Path
from slimtune.training.stop import Watchdog
def stuck_here():
    threading.Event().wait()
with Watchdog(1.0, Path(sys.argv[1]) / "stacks.txt", run=Path("RUN")) as watchdog:
    watchdog.beat(sys.argv[2])
    threading.Thread(target=threading.Event().wait, name="another", daemon=True).start()
    stuck_here()
"""


@pytest.mark.parametrize(
    ("activity", "environment", "said"),
    [
        (
            "a step",
            {},
            "slimtune: no progress in a step for 1 s (watchdog: 1 s)\nAll threads' stacks are in {}.\nGo on: ",
        ),
        (
            "a save",
            CHINESE,
            "slimtune: 保存检查点在 1 秒内没有进展（watchdog：1 秒）\n所有线程的调用栈在 {} 中。\n继续：",
        ),
    ],
)
def test_a_hang_ends_with_all_stacks(tmp_path: Path, activity: str, environment: dict[str, str], said: str) -> None:
    command, file = [sys.executable, "-c", HANG, str(tmp_path), activity], tmp_path / "stacks.txt"
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)
    assert done.returncode == 75
    assert done.stderr == said.format(file) + "slimtune resume RUN\n"
    stacks = file.read_text()
    assert f"no progress in {activity}" in stacks
    assert "stuck_here" in stacks
    assert stacks.lower().count("thread 0x") >= 3


def test_progress_and_rest_keep_it_quiet(tmp_path: Path) -> None:
    with Watchdog(0.5, tmp_path / "stacks.txt") as watchdog:
        watchdog.beat("save")
        watchdog.rest("save")
        for _ in range(10):
            watchdog.beat("step")
            time.sleep(0.1)
    assert not (tmp_path / "stacks.txt").exists()


def test_zero_turns_it_off(tmp_path: Path) -> None:
    with Watchdog(0.0, tmp_path / "stacks.txt") as watchdog:
        watchdog.beat("step")
    assert not (tmp_path / "stacks.txt").exists()


def test_the_way_on_can_be_pasted_into_a_shell() -> None:
    signals = StopSignals()
    signals.run = Path("runs/my run")
    assert "slimtune resume 'runs/my run'" in str(signals.stop())


def test_when_all_is_done_there_is_nothing_to_go_on_with() -> None:
    with pytest.raises(StopRequested) as stop, StopSignals(Path("RUN")) as signals:  # noqa: PT012
        signals.finished = True
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)
    assert "resume" not in str(stop.value)
    assert "The run is whole: RUN" in str(stop.value)


STOPPED = """
import sys, threading, time
from pathlib import Path
from slimtune.training.stop import Watchdog
with Watchdog(1.0, Path(sys.argv[1])) as watchdog:
    watchdog.beat("save")
    for number in range(int(sys.argv[2])):
        if number % 2 == 0:
            watchdog.beat("save")
        print(number, flush=True)
        time.sleep(0.2)
"""


def test_time_in_which_the_process_was_stopped_does_not_count(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", STOPPED, str(tmp_path / "stacks.txt"), "10"], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(signal.SIGSTOP)
    time.sleep(3.5)  # longer than the watchdog, and than what stands behind it
    process.send_signal(signal.SIGCONT)
    assert process.wait(60) == 0
    assert not (tmp_path / "stacks.txt").exists()


HOLDS_THE_LOCK = """
import ctypes, sys
from pathlib import Path
from slimtune.training.stop import Watchdog
def stuck_here():
    ctypes.PyDLL(None).pause()  # as a library's deadlock: without letting go of the interpreter's lock
with Watchdog(0.5, Path(sys.argv[1])) as watchdog:
    watchdog.beat("step")
    stuck_here()
"""


def test_a_hang_that_holds_the_interpreter_ends_with_its_stacks(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLDS_THE_LOCK, str(tmp_path / "stacks.txt")]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | CHINESE)
    assert done.returncode == -signal.SIGKILL
    assert "slimtune: Python 本身已停滞 1 秒。" in done.stderr
    assert "stuck_here" in (tmp_path / "stacks.txt").read_text()
