"""How the next token is chosen: the same few options, with the same defaults, for every verb that answers."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import GenerationConfig

from slimtune.errors import UserError

if TYPE_CHECKING:
    from slimtune.use.load import Opened

__all__ = ["LEAST", "Draws", "Sampling"]

LEAST = 1e-6
"""The least temperature over 0, and the least top_p: far below, what is computed with them in fp32 isn't finite, or no
token is left to draw."""


@dataclass(frozen=True)
class Sampling:
    """Options of generation. The default is greedy: the same question gets the same answer.

    What a model's ``generation_config.json`` proposes (temperature, repetition penalty) is not taken over: scores
    before and after training compare only if both were drawn alike, by rules that are written down.
    """

    temperature: float = 0.0
    """0 takes the likeliest token; above it, tokens are drawn, the flatter the higher."""
    top_p: float = 1.0
    """Draw from the likeliest tokens that together have this probability."""
    top_k: int = 0
    """Draw from this many likeliest tokens; 0: from all."""
    max_new_tokens: int = 512
    """Most tokens of one reply."""
    seed: int = 0
    """Seed of the draws."""

    def __post_init__(self) -> None:
        for name, value, holds, rule in (
            (
                "temperature",
                self.temperature,
                self.temperature == 0.0 or LEAST <= self.temperature <= 100.0,
                f"It is 0, or lies between {LEAST:g} and 100.",
            ),
            ("top_p", self.top_p, LEAST <= self.top_p <= 1.0, f"It lies between {LEAST:g} and 1."),
            ("top_k", self.top_k, self.top_k >= 0, "It is a number of tokens, or 0 for all."),
            ("max_new_tokens", self.max_new_tokens, self.max_new_tokens >= 1, "It is at least 1."),
        ):
            if not holds:
                raise UserError(f"{name} can't be {value}", rule=rule)

    @property
    def greedy(self) -> bool:
        """Whether nothing is drawn."""
        return self.temperature == 0.0

    def generation_config(self, opened: Opened, max_new_tokens: int) -> GenerationConfig:
        """The same as Transformers has it."""
        drawn = {} if self.greedy else {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        return GenerationConfig(  # type: ignore[no-untyped-call]
            do_sample=not self.greedy,
            max_new_tokens=max_new_tokens,
            eos_token_id=list(opened.stop_ids),
            pad_token_id=opened.pad_id,
            repetition_penalty=1.0,
            **drawn,
        )


class Draws:
    """Chooses the next token of each row of a batch; each row has random numbers of its own.

    Args:
        sampling: The options.
        rows: A number for each row that its random numbers follow from, together with the seed.
    """

    def __init__(self, sampling: Sampling, rows: Sequence[int]) -> None:
        self.sampling = sampling
        self._generators = [torch.Generator().manual_seed(_seed(sampling.seed, row)) for row in rows]

    def choose(self, logits: Tensor) -> Tensor:
        """The next tokens, int64 [rows], of logits [rows, vocabulary].

        Raises:
            UserError: They aren't finite: there is nothing to choose from.
        """
        # The highest is no number if any is none; minus infinity is the score of a token that can't be.
        if not bool(logits.amax(-1).isfinite().all()):
            raise UserError(
                "what the model computes for a prompt isn't finite",
                rule="A NaN or an infinity chooses no token.",
                way_out="Compute in other numbers: --compute-dtype fp32",
            )
        if self.sampling.greedy:
            return logits.argmax(-1)
        chances, tokens = (logits.float() / self.sampling.temperature).softmax(-1).sort(-1, descending=True)
        if self.sampling.top_k:
            chances[:, self.sampling.top_k :] = 0
        before = chances.cumsum(-1) - chances
        chances[:, 1:][before[:, 1:] >= self.sampling.top_p] = 0  # the likeliest always stays
        reached = chances.cumsum(-1)
        uniform = torch.stack([torch.rand(1, generator=generator) for generator in self._generators])
        # The first place where the sum of chances passes the random number; never one of chance 0.
        place = torch.searchsorted(reached, uniform.to(reached.device) * reached[:, -1:], right=True)
        last = (chances > 0).sum(-1, keepdim=True) - 1
        return tokens.gather(-1, place.minimum(last)).squeeze(-1)

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows alone."""
        self._generators = [self._generators[row] for row in rows.tolist()]


def _seed(seed: int, row: int) -> int:
    """One number of both, of 32 bits: torch's generator on the CPU takes no notice of the bits above."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{row}".encode(), digest_size=4).digest(), "little")
