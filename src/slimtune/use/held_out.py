"""The rows that a run held out of its training, found again in the data that its config names."""

from __future__ import annotations

from dataclasses import dataclass

from slimtune.config import Config
from slimtune.data.conversation import RowRefused, normalise
from slimtune.data.documents import Documents
from slimtune.data.held_out import held_out_facts
from slimtune.data.preflight import prove
from slimtune.data.sources import Row, read_rows, sources_of
from slimtune.errors import UserError
from slimtune.use.load import Opened
from slimtune.use.questions import Question

__all__ = ["HeldOut", "held_out_of"]


@dataclass(frozen=True)
class HeldOut:
    """Held-out rows of a run, as training renders them and as questions."""

    config: Config
    documents: Documents

    def questions(self) -> list[Question]:
        """The rows that ask something and have an answer, in the data's order."""
        documents = self.documents
        wanted = {(int(documents.store.places[at][0]), str(documents.store.place(int(at)))) for at in documents.chosen}
        asked = []
        data, held_out = sources_of(self.config)
        for number, source in enumerate(held_out or data):
            for row in read_rows(source, seed=self.config.seed, whole=self.config.format):
                if (number, str(row.place)) in wanted and (question := self._question(row)) is not None:
                    asked.append(question)
        return asked

    def _question(self, row: Row) -> Question | None:
        config = self.config
        try:
            made = normalise(row.value, shape=config.shape, mapping=config.map, prefer=config.prefer)
        except RowRefused as refused:
            raise UserError(f"{row.place}: {refused}", rule="It was trained on by a function of Python's.") from None
        if made.text is not None or made.messages[-1]["role"] != "assistant" or len(made.messages) < 2:
            return None
        reference = str(made.messages[-1].get("content") or "")
        return Question(made.messages[:-1], made.tools, reference, str(row.place), made.variables)


def held_out_of(opened: Opened) -> HeldOut:
    """The rows that what is opened held out of its training.

    Raises:
        UserError: It is no run, held none out, or the data isn't what it was.
    """
    run = opened.found.run
    remembered = run.held_out() if run is not None else None
    if run is None or remembered is None:
        raise UserError(f"{opened.found.name} remembers no held-out rows", way_out="Give DATA.")
    # The template and the added tokens are the opened tokenizer's; their files may be gone.
    config = run.config().model_copy(update={"template": None, "add_tokens": None})
    try:
        documents = prove(config, opened.tokenizer).eval
    except UserError as error:
        raise UserError(
            f"the held-out rows of {opened.found.name} can't be found again: {error.what}",
            rule=error.rule,
            way_out="Give DATA, or put the run's data back where it was.",
        ) from None
    if documents is None or held_out_facts(documents) != remembered:
        raise UserError(
            f"the held-out rows of {opened.found.name} aren't what they were",
            rule="Its data, or how slimtune reads it, has changed since: rows that were trained on may be among them.",
            way_out="Give DATA.",
        )
    return HeldOut(config, documents)
