"""How the attention kernels are cut: blocks by head dimension, as the device's shared memory allows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from slimtune.engine.kernels._triton import pow2, shared_memory

__all__ = ["MOST_COLUMNS", "Tile", "Tiles", "columns_of", "fits", "tiles_for"]

MOST_COLUMNS = 512
"""The largest head dimension that is taken."""


@dataclass(frozen=True)
class Tile:
    """How one kernel is cut."""

    queries: int
    """Queries in a block: 16 or a larger power of two."""
    keys: int
    """Keys in a block, likewise."""
    warps: int
    stages: int
    """How many blocks of what the inner loop reads are on their way at once."""


@dataclass(frozen=True)
class Tiles:
    """How the three kernels are cut."""

    forward: Tile
    keys: Tile
    """Of the kernel that makes dk and dv."""
    queries: Tile
    """Of the kernel that makes dq."""


# -- what the kernels share -------------------------------------------------------------------------------------------


# By columns, the best first; the first that fits the device's shared memory is taken. Reasons: on Hopper a product runs
# on the fast path (wgmma) with 64 rows and more, and two warp groups of 128 threads share a sum of 128 rows or of 512
# columns without spilling it; what the inner loop reads lies in shared memory twice or three times over, so that it is
# loaded while the block before is computed.
_FORWARD = {
    64: (Tile(128, 64, 4, 3),),
    128: (Tile(128, 64, 8, 3), Tile(128, 64, 8, 2)),
    256: (Tile(128, 64, 8, 2), Tile(64, 32, 4, 2)),
    512: (Tile(64, 32, 8, 2), Tile(32, 32, 8, 1)),
}
_KEYS = {
    64: (Tile(64, 64, 4, 2),),
    128: (Tile(32, 128, 8, 2),),
    256: (Tile(32, 64, 8, 2), Tile(32, 32, 8, 2)),
    512: (Tile(32, 64, 8, 1), Tile(16, 64, 8, 2), Tile(16, 32, 8, 2), Tile(16, 32, 8, 1)),
}
_QUERIES = {
    64: (Tile(128, 64, 8, 3),),
    128: (Tile(64, 64, 4, 2),),
    256: (Tile(128, 32, 8, 2), Tile(64, 32, 8, 2), Tile(64, 32, 8, 1)),
    512: (Tile(32, 32, 8, 2), Tile(64, 16, 8, 2), Tile(32, 16, 8, 2), Tile(32, 16, 8, 1)),
}
_PLAIN = (Tile(32, 32, 4, 1), Tile(16, 16, 4, 1))
"""For products by plain instructions, of which large blocks make long code: up to 64 columns, and past that."""
_TENSOR_CORES = 99 << 10
"""Shared memory of the smallest device whose tensor cores Triton uses (Ampere's and later); Turing has 64 KiB."""
_BESIDE = 1024
"""Bytes of shared memory that a program takes for less than blocks."""


def columns_of(head_dim: int) -> int:
    """A block's columns."""
    return max(16, pow2(head_dim))


def tiles_for(head_dim: int, dtype: torch.dtype, shared: int) -> Tiles | None:
    """What suits a device of so many bytes of shared memory a program; None if nothing fits it."""
    columns = columns_of(head_dim)
    plain = dtype == torch.float32 or shared < _TENSOR_CORES

    def first(tiles: tuple[Tile, ...], rows: Callable[[Tile], int]) -> Tile | None:
        room = (shared - _BESIDE) // (columns * dtype.itemsize)
        return next((tile for tile in tiles if rows(tile) <= room), None)

    # What a program holds, and what its inner loop reads, in rows.
    forward, keys, queries = (
        first(_PLAIN[columns > 64 :][:1] if plain else table[max(64, columns)], rows)
        for table, rows in (
            (_FORWARD, lambda tile: tile.queries + 2 * tile.stages * tile.keys),
            (_KEYS, lambda tile: 2 * tile.keys + 2 * tile.stages * tile.queries),
            (_QUERIES, lambda tile: 2 * tile.queries + 2 * tile.stages * tile.keys),
        )
    )
    return None if forward is None or keys is None or queries is None else Tiles(forward, keys, queries)


def fits(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether there is Triton for this device, and a block of so many columns has room in its shared memory."""
    return head_dim <= MOST_COLUMNS and tiles_for(head_dim, dtype, shared_memory(device)) is not None
