"""A small general set: what a model should still be able to do after it learnt something else.

Written for slimtune. Each question has a short right answer that a program can look for, so that what a tuning broke
shows as a count. It measures no model's worth; it is compared with itself, before and after.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

__all__ = ["GENERAL", "GeneralQuestion"]


@dataclass(frozen=True)
class GeneralQuestion:
    """A question, and the pattern that a right answer holds."""

    kind: str
    text: str
    pattern: str
    expected: str
    """The same for people to read."""
    system: str = ""

    @property
    def messages(self) -> list[dict[str, str]]:
        """As a conversation."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, {"role": "user", "content": self.text}]

    def is_right(self, reply: str) -> bool:
        """Whether the reply holds the answer, as a word of its own and in any case."""
        return re.search(self.pattern, reply, re.IGNORECASE) is not None


def _word(*answers: str) -> tuple[str, str]:
    """The pattern of one of these, as a word of its own, and how it is shown."""
    return rf"(?<!\w)(?:{'|'.join(map(re.escape, answers))})(?!\w)", " / ".join(answers)


_Q = GeneralQuestion
GENERAL: tuple[GeneralQuestion, ...] = (
    # The first sixteen are also the prompts of the parity certificate: several languages, kinds and lengths.
    _Q("fact", "What is the capital of France?", *_word("Paris")),
    _Q("sum", "What is 7 + 5?", *_word("12", "twelve")),
    _Q("chinese", "中国的首都是哪里？", "北京", "北京"),
    _Q("code", "Write a Python function `add(a, b)` that returns the sum of a and b.", r"def add\(", "def add("),
    _Q(
        "format",
        "Name three colours, separated by commas. Write nothing else.",
        r"\w+, ?\w+,? (?:and )?\w+",
        "three words, separated by commas",
    ),
    _Q(
        "system", "Who are you?", *_word("captain"), system="You are Captain Nemo. Always say that you are the captain."
    ),
    _Q("translation", "Translate into French: Good morning.", "bonjour", "bonjour"),
    _Q(
        "reading",
        "Read the text and answer in one word.\n\nAnna put the key under the green stone by the gate, for the "
        "drawer was locked and Tom would come home late. When Tom came, he went to the stone.\n\nWho hid the key?",
        *_word("Anna"),
    ),
    _Q("chinese", "请用一句话解释什么是水循环。", "[水雨云]", "水 / 雨 / 云"),
    _Q("german", "Wie heißt die Hauptstadt von Deutschland?", *_word("Berlin")),
    _Q("fact", "Which planet is known as the Red Planet?", *_word("Mars")),
    _Q("code", "In Python, which keyword starts the definition of a function?", *_word("def")),
    _Q("sum", "A box holds 4 rows of 6 eggs. How many eggs are in the box?", *_word("24", "twenty-four")),
    _Q("format", 'Answer with this JSON and nothing else: {"ok": true}', r'\{\s*"ok"\s*:\s*true\s*\}', '{"ok": true}'),
    _Q("opposite", "What is the opposite of hot?", *_word("cold")),
    _Q("russian", "Как называется столица России?", "Москв", "Москва"),
    _Q("fact", "How many days are in a week?", *_word("7", "seven")),
    _Q(
        "fact",
        "What gas do plants take in from the air for photosynthesis?",
        r"carbon dioxide|CO2|CO₂",
        "carbon dioxide / CO2",
    ),
    _Q("fact", "Who wrote the play Romeo and Juliet?", "Shakespeare", "Shakespeare"),
    _Q("fact", "At what temperature in degrees Celsius does water boil at sea level?", *_word("100")),
    _Q("fact", "What is the largest ocean on Earth?", *_word("Pacific")),
    _Q("fact", "What is the chemical symbol of gold?", *_word("Au")),
    _Q("fact", "In which country are the pyramids of Giza?", *_word("Egypt")),
    _Q("fact", "How many legs does a spider have?", *_word("8", "eight")),
    _Q("fact", "What is frozen water called?", *_word("ice")),
    _Q("sum", "What is 9 times 3?", *_word("27", "twenty-seven")),
    _Q("sum", "What is 100 minus 1?", *_word("99", "ninety-nine")),
    _Q("sum", "What is half of 50?", *_word("25", "twenty-five")),
    _Q("sum", "Which number is larger, 17 or 71?", *_word("71")),
    _Q("opposite", "What is the opposite of 'up'?", *_word("down")),
    _Q("opposite", "What is a word that means the same as 'big'?", *_word("large", "huge", "great", "enormous")),
    _Q("grammar", "What is the past tense of the verb 'go'?", *_word("went")),
    _Q("grammar", "What is the plural of 'child'?", *_word("children")),
    _Q("translation", "Translate into Spanish: thank you.", "gracias", "gracias"),
    _Q("translation", "把“猫”翻译成英文。", *_word("cat", "cats")),
    _Q("chinese", "一年有多少个月？", "12|十二", "12 / 十二"),
    _Q("chinese", "太阳从哪个方向升起？", "东", "东"),
    _Q("chinese", "请写出“大”的反义词。", "小", "小"),
    _Q("format", "Repeat this word exactly once and write nothing else: lantern", r"^\W*lantern\W*$", "lantern"),
    _Q("format", "Count from 1 to 5.", r"1\D+2\D+3\D+4\D+5", "1, 2, 3, 4, 5"),
    _Q("format", "Write the word 'stone' in capital letters.", r"(?-i:STONE)", "STONE"),
    _Q("reading", "Tom has a red ball and Lisa has a blue ball. What colour is Lisa's ball?", *_word("blue")),
    _Q("reading", "All cats are animals. Mia is a cat. Is Mia an animal? Answer yes or no.", *_word("yes")),
    _Q("code", "Which command prints text in Python?", *_word("print")),
)
