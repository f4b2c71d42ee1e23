"""General prompts that a base answers before its training, so that what it could is trained on beside what it learns.

Written for slimtune: facts, sums, words, several languages, code, formats, reading, roles, talk. None of them is a
question of the general set (:mod:`slimtune.use.general`), which measures what is kept.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

__all__ = ["PROMPTS", "Prompt"]

Prompt = tuple[str, str]
"""(what is asked, a system text or nothing)."""

_LISTS: dict[str, tuple[str, ...]] = {
    "What is the capital of {}?": (
        "Italy", "Spain", "Japan", "Canada", "Greece", "Portugal", "Norway", "India", "Kenya", "Chile", "Poland",
        "Ireland",
    ),
    "What is {}?": (
        "3 + 4", "9 + 8", "20 - 6", "15 - 9", "6 times 7", "5 times 5", "12 divided by 3", "a quarter of 20",
        "10 + 25", "the double of 14", "30 minus 11", "2 + 2 + 2",
        "photosynthesis", "a volcano", "gravity", "a prime number", "an adjective", "the Internet", "a metaphor",
        "democracy", "an eclipse", "a variable in a program", "the moon", "bread made of",
    ),
    "What is the opposite of {}?": ("big", "early", "happy", "light", "open", "rich", "soft", "to remember"),
    "What is the past tense of the verb '{}'?": ("see", "run", "take", "write", "eat", "bring"),
    "What is the plural of '{}'?": ("mouse", "foot", "box", "leaf", "tooth"),
    "Translate into French: {}": ("Good night.", "I am hungry.", "Where is the station?", "Thank you very much."),
    "Translate into Spanish: {}": ("Good evening.", "My name is Anna.", "The house is white.", "See you tomorrow."),
    "Translate into German: {}": ("Good day.", "I don't know.", "The train is late."),
    "Translate into English: {}": (
        "Bonjour, comment ça va ?", "¿Dónde está el baño?", "Ich habe einen Hund.", "我喜欢喝茶。",
    ),
    "{}": (
        "How many hours are in a day?", "How many months are in a year?", "How many legs does a dog have?",
        "Who painted the Mona Lisa?", "Who wrote Don Quixote?", "Which planet is the largest?",
        "Which animal is the tallest on land?", "What do bees make?", "What colour do blue and yellow make?",
        "In which ocean does Hawaii lie?", "What does a thermometer measure?", "What is steam made of?",
        "Which metal is liquid at room temperature?", "On which continent is Brazil?",
        "What is the fastest land animal?",
        "Which language is spoken in Austria?", "What is the chemical symbol of iron?", "What do we breathe in?",
        "Name two fruits, separated by a comma. Write nothing else.",
        "Name four animals, separated by commas. Write nothing else.",
        "Repeat this word exactly once and write nothing else: window",
        "Repeat this sentence exactly: The lamp is on.",
        'Answer with this JSON and nothing else: {"name": "Tom", "age": 7}',
        'Answer with this JSON and nothing else: ["a", "b"]',
        "Count from 3 to 8.", "Count down from 5 to 1.", "Write the word 'garden' in capital letters.",
        "Write the days of the week, one a line.", "List three things that one finds in a kitchen.",
        "Answer yes or no: is ice cold?", "Answer yes or no: can fish fly to the moon?",
        "Answer in one word: what do cows drink?", "Spell the word 'bridge' letter by letter.",
        "Write a Python function `double(x)` that returns twice x.",
        "Write a Python function `is_even(n)`.", "Write a Python loop that prints the numbers from 1 to 3.",
        "In Python, how do you write a comment?", "What does `len([1, 2, 3])` give in Python?",
        "Write an SQL query that selects all rows of the table `users`.", "What is HTML used for?",
        "Write a shell command that lists the files of a folder.",
        "Paul has two apples and buys three more. How many has he?",
        "A bus has 20 seats and 8 people sit in it. How many seats are free?",
        "All birds have feathers. A robin is a bird. Has a robin feathers? Answer yes or no.",
        "Read the text and answer in one word.\n\nThe cat slept on the red chair while the dog ate. Who slept?",
        "Read the text and answer in a few words.\n\nMaria took the bus to the market and bought bread. What was it?",
        "Summarise in one sentence: The river rose after three days of rain, and the bridge had to be closed.",
        "Make this sentence polite: Give me the salt.", "Correct the spelling: I recieved your leter.",
        "Rewrite in the past: She walks to school.", "Write a sentence with the words 'sun' and 'window'.",
        "Write a short birthday wish.", "Write two lines about the sea.", "Give a title for a story about a lost key.",
        "Hello", "How are you?", "Good morning, can you help me?", "Thank you for your help.", "Tell me a short joke.",
        "What can you do?", "I feel tired today. What could I do?", "Recommend a simple dinner.",
        "How do I boil an egg?", "How do I plant a tree?", "Why is the sky blue?", "Why do leaves fall in autumn?",
        "Give me one tip for learning a language.", "What should I pack for a rainy day?",
        "日本的首都是哪里？", "一个星期有几天？", "请写出“高”的反义词。", "把“谢谢”翻译成英文。", "三加五等于多少？",
        "请用一句话介绍长城。", "水在多少摄氏度结冰？", "请说出三种水果。", "你好！", "月亮围绕什么转？",
        "Wie viele Tage hat ein Jahr?", "Nenne drei Farben.", "Was ist das Gegenteil von kalt?", "Wie geht es dir?",
        "Quelle est la capitale de l'Espagne ?", "Combien font deux et trois ?", "¿Cuántos días tiene una semana?",
        "¿De qué color es la nieve?", "Сколько будет два плюс два?", "Какого цвета трава?",
    ),
}  # fmt: skip
_ROLES: tuple[Prompt, ...] = (
    ("What do you do all day?", "You are a gardener named Rosa. Always say that you are a gardener."),
    ("Introduce yourself.", "You are a pirate. Speak like one."),
    ("What is 4 + 4?", "You are a teacher. Explain in one sentence."),
    ("What is the weather like?", "Always answer with exactly one word."),
    ("Tell me about the sea.", "Answer in one short sentence."),
    ("What should I eat?", "You answer in French."),
    ("Hi", "You are a polite hotel receptionist."),
    ("How do I open a jar?", "You are a helpful assistant. Use at most ten words."),
)


def _all() -> Iterator[Prompt]:
    for pattern, words in _LISTS.items():
        yield from ((pattern.replace("{}", word, 1), "") for word in words)
    yield from _ROLES


def _mixed() -> tuple[Prompt, ...]:
    prompts = list(_all())
    random.Random(22).shuffle(prompts)
    return tuple(prompts)


PROMPTS = _mixed()
"""All of them, in an order that has each kind near its beginning."""
