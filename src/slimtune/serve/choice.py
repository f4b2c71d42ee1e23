"""How the next token of each request in a batch is chosen: by slimtune's own draws, each with a seed of its own.

Continuous batching draws for a whole batch from one random state, so a seed would not reproduce an answer. Here the
engine stays greedy (it takes the highest score), and this list stands where Transformers keeps its logits processors:
a request that draws gets its token from :class:`slimtune.use.sampling.Draws` and that token's score is made the
highest. So an answer follows from its request alone, whatever else is in the batch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList
from transformers.generation.continuous_batching.cb_logits_processors import ContinuousBatchingLogitsProcessorList

from slimtune.serve.guide import Guide
from slimtune.serve.refusal import Refusal
from slimtune.use.sampling import Draws, Sampling
from slimtune.use.way import FAULTS

__all__ = ["Chances", "Choice", "Chooser"]


@dataclass(frozen=True)
class Chances:
    """How likely a token was, by the model's own logits: before temperature and top-p."""

    logprob: float
    top: list[tuple[int, float]]
    """The likeliest tokens and their log probabilities."""


@dataclass
class Choice:
    """One request's way of choosing."""

    sampling: Sampling
    top_logprobs: int | None = None
    """How many likeliest tokens to note beside each; None: no log probabilities at all."""
    guide: Guide | None = None
    """What may be said at all."""
    chances: list[Chances] = field(default_factory=list)
    """One for each token so far, where log probabilities were asked for."""
    failed: Exception | None = None
    """What went wrong with this request, in a batch whose other requests go on."""

    def __post_init__(self) -> None:
        self._draws = Draws(self.sampling, [0])

    def choose(self, scores: Tensor) -> None:
        """Make the chosen token's score the highest of ``scores`` [vocabulary], in place.

        Raises:
            Refusal: The scores aren't finite: there is nothing to choose from.
        """
        if not scores.amax().isfinite():  # a score of minus infinity is a token that can't be; of NaN, amax is NaN
            raise Refusal(500, "what the model computes for this request isn't finite", "not_finite")
        if self.sampling.greedy and self.top_logprobs is None and self.guide is None:
            return
        allowed = scores if self.guide is None else self.guide.allowed(scores)
        token = int(self._draws.choose(allowed[None])[0])
        if self.guide is not None:
            self.guide.take(token)
        if self.top_logprobs is not None:
            logprobs = scores.log_softmax(-1)
            values, tokens = logprobs.topk(self.top_logprobs)
            top = list(zip(tokens.tolist(), values.tolist(), strict=True))
            self.chances.append(Chances(float(logprobs[token]), top))
        scores[token] = torch.inf


class Chooser(ContinuousBatchingLogitsProcessorList):
    """Stands in for a manager's list of logits processors. Called by its thread, once for each step."""

    def __init__(self) -> None:
        super().__init__(LogitsProcessorList())
        self.do_processing = True
        self.choices: dict[str, Choice] = {}
        """By request id; a request that is not here has been left."""
        self._rows: list[str] = []

    def prepare_tensor_args(self, requests_in_batch: list[Any], arg_storage: Tensor) -> Tensor:
        """Note which row of the coming scores is whose: one row for each request whose prompt is through."""
        self._rows = [future.state.request_id for future in requests_in_batch if future.has_new_token]
        return arg_storage

    def __call__(self, input_ids: Any, scores: Tensor, logits_processor_args: Tensor) -> Tensor:
        """Choose for every row of ``scores`` [rows, vocabulary].

        What goes wrong with one is noted there: raised here, it would end the engine for all.
        """
        for row, request in enumerate(self._rows):
            choice = self.choices.get(request)
            if choice is not None and choice.failed is None:
                try:
                    choice.choose(scores[row])
                except (Refusal, *FAULTS) as error:
                    choice.failed = error
        return scores
