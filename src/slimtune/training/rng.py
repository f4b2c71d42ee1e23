"""The state of every random generator that training draws from: Python, NumPy, torch, CUDA. No pickle."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["RandomState", "rng_preserved"]


@dataclass(frozen=True)
class RandomState:
    """What all generators were at one moment. Capturing waits for no kernel."""

    python: tuple[Any, ...]
    numpy: dict[str, Any]
    torch: Tensor
    cuda: tuple[Tensor, ...]

    @classmethod
    def capture(cls) -> RandomState:
        """The generators' state now."""
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        return cls(random.getstate(), dict(np.random.get_state(legacy=False)), torch.get_rng_state(), tuple(cuda))

    def restore(self) -> None:
        """Set every generator to this state.

        States of CUDA devices that this machine doesn't have are left out: such a run can't go on bit by bit anyway.
        """
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.torch)
        devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
        for device, state in enumerate(self.cuda[:devices]):
            torch.cuda.set_rng_state(state, device)

    def to_tensors(self) -> dict[str, Tensor]:
        """As uint8 tensors for safetensors; Python's and NumPy's states are JSON texts in bytes."""
        inner = self.numpy["state"]
        plain = {**self.numpy, "state": {"key": inner["key"].tolist(), "pos": int(inner["pos"])}}
        cuda = {f"cuda.{device}": state for device, state in enumerate(self.cuda)}
        return {"python": _to_bytes(self.python), "numpy": _to_bytes(plain), "torch": self.torch, **cuda}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> RandomState:
        """What :meth:`to_tensors` wrote."""
        version, words, gauss = _from_bytes(tensors["python"])
        plain = _from_bytes(tensors["numpy"])
        plain["state"]["key"] = np.array(plain["state"]["key"], dtype=np.uint32)
        devices = sum(name.startswith("cuda.") for name in tensors)
        cuda = tuple(tensors[f"cuda.{device}"] for device in range(devices))
        return cls((version, tuple(words), gauss), plain, tensors["torch"], cuda)


@contextmanager
def rng_preserved() -> Iterator[None]:
    """Put the generators back at the end: what the body draws doesn't show afterwards."""
    state = RandomState.capture()
    try:
        yield
    finally:
        state.restore()


def _to_bytes(value: Any) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).clone()


def _from_bytes(tensor: Tensor) -> Any:
    return json.loads(bytes(tensor.tolist()))
