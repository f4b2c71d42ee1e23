"""One kernel beside plain torch: right first, then how fast.

A case says what the kernel computes into which tensors, what plain torch does for the same, how many bytes the kernel
must move at least, and the float64 reference. Run on a CUDA machine; prints one line a case with the ratio to torch.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

DEVICE, DTYPE = "cuda", torch.bfloat16
# A bfloat16 result that is rounded once is within half a unit in the last place; sums in another order add a little.
BOUND = 4.5e-3


@dataclass
class Case:
    name: str
    kernel: Callable[[], object]
    torch: Callable[[], object]
    bytes: int
    """What must be read and written at least."""
    got: Callable[[], Tensor] | None = None
    """The kernel's result, freshly computed, to compare with want."""
    want: Callable[[], Tensor] | None = None
    bound: float = BOUND
    launches: int = 1


def microseconds(run: Callable[[], object], *, repeats: int = 20) -> float:
    """Median time of one call on the device, the L2 cache flushed before each."""
    run()
    torch.cuda.synchronize()
    flush = torch.empty(64 << 20, dtype=torch.int32, device="cuda")
    times = []
    for _ in range(repeats):
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3)
    return statistics.median(times)


def error(case: Case) -> float | None:
    if case.got is None or case.want is None:
        return None
    got, want = case.got().double(), case.want().double()
    if not torch.isfinite(got).all():
        return float("inf")
    return float((got - want).abs().max() / want.abs().max().clamp(min=1e-30))


def report(cases: Iterable[Case]) -> bool:
    """Print a line for each case; False if a result was wrong."""
    right = True
    for case in cases:
        started = time.perf_counter()
        wrong = error(case)
        bad = wrong is not None and wrong > case.bound
        right &= not bad
        ours, theirs = microseconds(case.kernel), microseconds(case.torch, repeats=5)
        print(
            f"{case.name:44s} {ours:9.1f} us {case.bytes / ours / 1e3:7.0f} GB/s   torch {theirs:9.1f} us"
            f"  x{theirs / ours:6.2f}   error {'-' if wrong is None else format(wrong, '.1e'):>7s}"
            f"{'  WRONG' if bad else ''}  [{time.perf_counter() - started:.1f} s]",
            flush=True,
        )
    return right


def main(cases: Callable[[], Iterable[Case]]) -> None:
    if not torch.cuda.is_available():
        raise SystemExit("needs a CUDA device")
    print(torch.cuda.get_device_name(), "torch", torch.__version__, flush=True)
    raise SystemExit(0 if report(cases()) else 1)


def random(*shape: int, dtype: torch.dtype = DTYPE, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, device=DEVICE) * scale).to(dtype)
