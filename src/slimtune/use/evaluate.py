"""Loss and perplexity on the supervised tokens of held-out rows, with intervals that say how much the rows decide."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from slimtune.config import Config
from slimtune.data.documents import Documents
from slimtune.data.preflight import prove
from slimtune.data.stdin import keep_stdin
from slimtune.families.rotation import turns_anew
from slimtune.run.interval import Interval, bootstrap
from slimtune.use.attention import any_length
from slimtune.use.cache import Holds, what_it_holds
from slimtune.use.load import Opened
from slimtune.use.way import apart, at_once, is_rounding, trial_prompts

__all__ = ["Losses", "documents_of", "goes_alone", "losses"]

_TOKENS_AT_ONCE = {"cpu": 2048, "cuda": 16384}


@dataclass(frozen=True)
class Losses:
    """Each document's summed loss and supervised tokens."""

    nats: npt.NDArray[np.float64]
    """[documents]."""
    tokens: npt.NDArray[np.int64]
    """[documents]."""

    def mean(self) -> Interval:
        """Loss of a supervised token, in nats; documents are resampled, for tokens of one reply go together."""
        return bootstrap(self.nats, self.tokens)


def documents_of(opened: Opened, data: tuple[str, ...]) -> Documents:
    """Held-out rows as training renders them, with the run's own data options.

    Raises:
        UserError: The data can't be read, or the run's own rules refuse it.
    """
    trained = opened.found.passport.config if opened.found.passport else {"model": opened.found.name}
    # What only training needs, and files that may be gone, are left out.
    mine = {
        "data": data,
        "eval": (),
        "eval_share": 0.0,
        "early_stopping": None,
        "template": None,
        "add_tokens": None,
        "output": None,
    }
    config = Config.make(**{**trained, **mine})
    with TemporaryDirectory() as folder:
        return prove(keep_stdin(config, Path(folder)), opened.tokenizer).train


@torch.inference_mode()
def losses(opened: Opened, documents: Documents) -> Losses:
    """Cross-entropy of each document's supervised tokens, the first token of each left out, as in training.

    Args:
        opened: The model; within :meth:`Opened.as_base` it is the base that is measured.
        documents: What it is measured on.
    """
    nats = np.zeros(len(documents))
    tokens = np.zeros(len(documents), dtype=np.int64)
    padded = len(np.unique(documents.lengths)) > 1  # rows of one length have no padding that could change anything
    most = 0 if padded and goes_alone(opened, int(documents.lengths.max())) else _TOKENS_AT_ONCE[opened.device.type]
    for batch in _batches(documents.lengths, most):
        rows = [documents[int(at)] for at in batch]
        width = max(len(ids) for ids, _ in rows)
        ids = torch.full((len(rows), width), opened.pad_id)
        mask = torch.zeros(len(rows), width, dtype=torch.int64)
        labels = torch.full((len(rows), width), -100)
        for row, (document, supervised) in enumerate(rows):
            length = len(document)
            ids[row, :length] = torch.tensor(document)
            mask[row, :length] = 1
            labels[row, :length] = torch.where(torch.tensor(supervised), ids[row, :length], -100)
        logits = _logits(opened, ids, mask)
        targets = labels[:, 1:].to(opened.device)
        for row, at in enumerate(batch):
            loss = nn.functional.cross_entropy(logits[row, :-1].float(), targets[row], reduction="sum")
            nats[at], tokens[at] = float(loss), int((targets[row] != -100).sum())
    return Losses(nats, tokens)


def _logits(opened: Opened, ids: Tensor, mask: Tensor) -> Tensor:
    with any_length():
        logits: Tensor = opened.model(
            input_ids=ids.to(opened.device), attention_mask=mask.to(opened.device), use_cache=False
        ).logits
    return logits


def goes_alone(opened: Opened, longest: int) -> bool:
    """Whether a row's logits change with its padding, tried on two rows, or with one of ``longest`` beside it."""
    config = opened.model.config.get_text_config(decoder=True)
    turns = turns_anew(config)
    # Sparse attention picks its keys among those of the padding's width, and ties fall otherwise in another width.
    if what_it_holds(config) is Holds.OTHER or (turns is not None and longest > turns):
        return True
    long, short = trial_prompts(opened)
    ids = torch.tensor([long, short + [opened.pad_id] * (len(long) - len(short))])
    mask = torch.tensor([[1] * len(long), [1] * len(short) + [0] * (len(long) - len(short))])
    expected = at_once(opened.model, short[:1], short[1:])
    return not is_rounding(apart(_logits(opened, ids, mask)[1, : len(short)], expected), opened.model)


def _batches(lengths: npt.NDArray[np.int32], most: int) -> Iterator[list[int]]:
    """Document numbers, the like-sized together, at most ``most`` tokens with padding; each alone if that is more."""
    batch: list[int] = []
    for at in np.argsort(-lengths, kind="stable").tolist():
        if batch and (len(batch) + 1) * int(lengths[batch[0]]) > most:
            yield batch
            batch = []
        batch.append(at)
    if batch:
        yield batch
