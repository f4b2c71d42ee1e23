"""Does it still say the same? The certificate that goes with a merged model or an export.

The same prompts go through the adapter on its base and through the copy that was made of them. Compared are the
prompts' token ids, the first token of each reply, and, along the adapter's own greedy reply, the divergence
KL(adapter || copy) of each next-token distribution, in nats.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slimtune.errors import GuardStop
from slimtune.use.attention import any_length
from slimtune.use.general import GENERAL
from slimtune.use.generate import generate
from slimtune.use.load import Opened
from slimtune.use.sampling import Sampling

__all__ = ["PROMPTS", "Certificate", "Reference", "Voice", "certify", "reference", "transformers_voice"]

PROMPTS = tuple(question.messages for question in GENERAL[:16])
"""The prompts that are compared: from the package's general set, several languages and kinds."""
REPLY_TOKENS = 16
_NEAR_TIE = 0.1
_TIMES_ROUNDING = 2.0


@dataclass(frozen=True)
class Voice:
    """One side of the comparison."""

    name: str
    prompt_ids: Callable[[Sequence[Any]], list[int]]
    """The ids that this side makes of a conversation."""
    log_probabilities: Callable[[list[int], int], Tensor]
    """(ids, first): next-token log-probabilities in fp32 at positions ``first`` … end, [positions, vocabulary]."""


@dataclass(frozen=True)
class Reference:
    """What the adapter on its base says: kept, so that it needn't stay in memory beside the copy."""

    name: str
    prompts: list[list[int]]
    replies: list[list[int]]
    log_probabilities: list[Tensor]
    """Each [reply tokens + 1, vocabulary], fp32."""


@dataclass(frozen=True)
class Certificate:
    """The comparison's result, and the thresholds that it was held to."""

    reference: str
    copy: str
    made: str
    prompts: int
    prompt_ids_equal: int
    """Prompts whose token ids are the same on both sides."""
    first_token_agrees: int
    """Prompts whose likeliest first token is the same, or nearly tied with it (0.1 nats) in the adapter's own eyes."""
    positions: int
    top_token_agrees: float
    """Share of positions whose likeliest token is the same."""
    kl_mean: float
    kl_max: float
    kl_mean_allowed: float
    first_token_allowed: float
    kl_mean_of_rounding: float | None = None
    """What rounding alone makes of the adapter's side, the most of several draws; None where it wasn't asked for."""

    @property
    def holds(self) -> bool:
        """Whether the copy says the same, within the thresholds."""
        return (
            self.prompt_ids_equal == self.prompts
            and self.first_token_agrees >= self.first_token_allowed * self.prompts
            and self.kl_mean <= self.kl_mean_allowed
        )

    def beside(self, rounded: Certificate) -> Certificate:
        """The same, held to twice what rounding makes of the model, and to one first token fewer."""
        most = max(rounded.kl_mean, self.kl_mean_of_rounding or 0.0)
        return replace(
            self,
            kl_mean_of_rounding=most,
            kl_mean_allowed=_TIMES_ROUNDING * most,
            first_token_allowed=min(self.first_token_allowed, (rounded.first_token_agrees - 1) / rounded.prompts),
        )

    def line(self) -> str:
        """For the screen."""
        rounding = "" if self.kl_mean_of_rounding is None else f", by rounding {self.kl_mean_of_rounding:.2e}"
        return (
            f"{self.copy} against {self.reference}: prompt ids equal {self.prompt_ids_equal}/{self.prompts}, "
            f"first token {self.first_token_agrees}/{self.prompts}, top token {self.top_token_agrees:.1%} of "
            f"{self.positions}, KL {self.kl_mean:.2e} (allowed {self.kl_mean_allowed:.0e}{rounding})"
        )

    def write(self, file: Path) -> None:
        """As JSON, with whether it holds."""
        file.write_text(json.dumps({"holds": self.holds, **asdict(self)}, indent=2) + "\n", encoding="utf-8")

    def require(self) -> None:
        """Stop if the copy doesn't say the same.

        Raises:
            GuardStop: A threshold is broken.
        """
        if not self.holds:
            raise GuardStop(
                f"{self.copy} does not say what {self.reference} says: {self.line()}",
                rule="The parity certificate's thresholds: all prompt ids, "
                f"{self.first_token_allowed:.0%} of first tokens, mean KL {self.kl_mean_allowed:.0e}.",
                way_out="Nothing is left of it; --no-parity writes it all the same, to look into.",
            )


def reference(opened: Opened, prompts: Iterable[Sequence[Any]] = PROMPTS) -> Reference:
    """Ask the adapter on its base: greedy replies, and the distributions along them."""
    voice = transformers_voice(opened, f"{opened.found.name} on its base's own weights")
    made = Reference(voice.name, [], [], [])
    made.prompts.extend(voice.prompt_ids(messages) for messages in prompts)
    replies = {
        reply.index: reply.ids for reply in generate(opened, made.prompts, Sampling(max_new_tokens=REPLY_TOKENS))
    }
    for index, ids in enumerate(made.prompts):
        made.replies.append(replies[index])
        made.log_probabilities.append(voice.log_probabilities(ids + replies[index], len(ids) - 1))
    return made


def transformers_voice(opened: Opened, name: str) -> Voice:
    """A model in Transformers as one side."""

    def log_probabilities(ids: list[int], first: int) -> Tensor:
        with torch.inference_mode(), any_length():
            # Without a cache, for which hybrid families have classes of their own.
            logits = opened.model(torch.tensor([ids], device=opened.device), use_cache=False).logits[0, first:]
        made: Tensor = logits.float().log_softmax(-1).cpu()
        return made

    return Voice(name, opened.prompt_ids, log_probabilities)


def certify(
    said: Reference,
    copy: Voice,
    *,
    kl_mean_allowed: float,
    first_token_allowed: float = 1.0,
    prompts: Iterable[Sequence[Any]] = PROMPTS,
) -> Certificate:
    """Hold ``copy`` to what the adapter said."""
    ids_equal = first_agrees = top_agrees = 0
    divergences: list[Tensor] = []
    for messages, ids, reply, expected in zip(prompts, said.prompts, said.replies, said.log_probabilities, strict=True):
        ids_equal += copy.prompt_ids(messages) == ids
        got = copy.log_probabilities(ids + reply, len(ids) - 1)[:, : expected.shape[1]]
        chosen = got[0].argmax()
        first_agrees += bool(expected[0].max() - expected[0, chosen] < _NEAR_TIE)
        top_agrees += int((got.argmax(-1) == expected.argmax(-1)).sum())
        divergences.append((expected.exp() * (expected - got)).sum(-1))
    every = torch.cat(divergences)
    return Certificate(
        reference=said.name,
        copy=copy.name,
        made=datetime.now(UTC).isoformat(timespec="seconds"),
        prompts=len(said.prompts),
        prompt_ids_equal=ids_equal,
        first_token_agrees=first_agrees,
        positions=every.numel(),
        top_token_agrees=top_agrees / every.numel(),
        kl_mean=float(every.mean()),
        kl_max=float(every.max()),
        kl_mean_allowed=kl_mean_allowed,
        first_token_allowed=first_token_allowed,
    )
