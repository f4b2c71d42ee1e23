"""What a device waits for: the idle time between its kernels over some steps, by what stands before and after it."""

from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

LEAST_US = 15.0
"""Shorter gaps are summed up as one."""
_WORK = ("kernel", "gpu_memcpy", "gpu_memset")


@contextmanager
def watched(first: int, steps: int) -> Iterator[dict[str, Any]]:
    """Within this, ``steps`` of a training are profiled from step ``first`` on; afterwards what was found."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    from slimtune.training.hooks import Hooks

    found: dict[str, Any] = {}
    plain, running = Hooks.on_step_begin, profile(activities=[ProfilerActivity.CUDA])

    def on_step_begin(hooks: Any, args: Any, state: Any, control: Any, **rest: Any) -> None:
        if state.global_step == first:
            torch.cuda.synchronize()
            running.start()
        elif state.global_step == first + steps:
            torch.cuda.synchronize()
            running.stop()
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder) / "trace.json"
                running.export_chrome_trace(str(file))
                found.update(gaps(json.loads(file.read_text())["traceEvents"], steps))
        plain(hooks, args, state, control, **rest)

    with mock.patch.object(Hooks, "on_step_begin", on_step_begin):
        yield found


def gaps(events: list[dict[str, Any]], steps: int) -> dict[str, Any]:
    """Milliseconds a step: from the first kernel to the last, busy, idle; and idle by (kernel before, kernel after)."""
    work = sorted((each for each in events if each.get("cat") in _WORK), key=lambda each: each["ts"])
    if not work:
        return {}
    idle: dict[str, list[float]] = defaultdict(lambda: [0.0, 0])
    began, end, before = work[0]["ts"], work[0]["ts"], ""
    for each in work:
        gap = each["ts"] - end
        if gap > 0 and before:
            key = f"{before} -> {each['name'][:48]}" if gap >= LEAST_US else "short ones"
            idle[key][0] += gap
            idle[key][1] += 1
        if each["ts"] + each["dur"] > end:
            end, before = each["ts"] + each["dur"], each["name"][:48]
    waited = sum(spent for spent, _ in idle.values())
    most = sorted(idle.items(), key=lambda item: -item[1][0])[:25]
    return {
        "whole_ms": round((end - began) / steps / 1e3, 3),
        "idle_ms": round(waited / steps / 1e3, 3),
        "kernels": round(len(work) / steps, 1),
        "idle_us_a_step": {key: [round(spent / steps, 1), round(count / steps, 2)] for key, (spent, count) in most},
    }
