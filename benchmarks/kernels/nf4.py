"""The NF4 dequantiser with double quantisation; beside bitsandbytes' own where it is installed, else plain torch."""

from collections.abc import Iterator
from importlib.util import find_spec

import torch
from bench import DTYPE, Case, main

from slimtune.engine.kernels import nf4, reference_nf4


def bitsandbytes(packed: torch.Tensor, absmax: torch.Tensor, nested: nf4.NestedScales, shape: tuple[int, int]):
    import bitsandbytes.functional as bnb

    inner = bnb.QuantState(absmax=nested.absmax, code=nested.code, blocksize=256, dtype=torch.float32)
    state = bnb.QuantState(absmax, shape, None, 64, "nf4", DTYPE, nested.offset, inner)
    return lambda: bnb.dequantize_4bit(packed, state)


def cases() -> Iterator[Case]:
    for shape in ((2048, 2048), (11008, 2048), (2048, 5504), (18944, 3584)):
        rows, columns = shape
        blocks = rows * columns // 64
        packed = torch.randint(256, (rows * columns // 2, 1), dtype=torch.uint8, device="cuda")
        absmax = torch.randint(256, (blocks,), dtype=torch.uint8, device="cuda")
        nested = nf4.NestedScales(
            torch.rand(-(-blocks // 256), device="cuda"),
            torch.linspace(-1, 1, 256, device="cuda"),
            torch.tensor(0.03, device="cuda"),
        )
        out = torch.empty(rows, columns + 24, dtype=DTYPE, device="cuda")[:, :columns]
        options = {"shape": shape, "dtype": DTYPE, "nested": nested}
        yield Case(
            f"nf4 {rows}x{columns}, double quantised, strided",
            lambda p=packed, a=absmax, k=options, o=out: nf4.dequantize(p, a, **k, out=o),
            bitsandbytes(packed, absmax, nested, shape)
            if find_spec("bitsandbytes")
            else lambda p=packed, a=absmax, k=options: reference_nf4.dequantize(p, a, **k),
            rows * columns * 5 // 2 + blocks,
            lambda p=packed, a=absmax, k=options, o=out: nf4.dequantize(p, a, **k, out=o),
            lambda p=packed, a=absmax, k=options: reference_nf4.dequantize(p, a, **k),
            bound=0.0,
        )


if __name__ == "__main__":
    main(cases)
