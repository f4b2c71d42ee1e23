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
        "Ireland", "Sweden", "Egypt", "Mexico", "Turkey", "Austria", "Peru", "Thailand", "Hungary",
    ),
    "What is {}?": (
        "3 + 4", "9 + 8", "20 - 6", "15 - 9", "6 times 7", "5 times 5", "12 divided by 3", "a quarter of 20",
        "10 + 25", "the double of 14", "30 minus 11", "2 + 2 + 2", "photosynthesis", "a volcano", "gravity",
        "a prime number", "an adjective", "the Internet", "a metaphor", "democracy", "an eclipse",
        "a variable in a program", "the moon", "bread made of", "8 + 6", "13 - 4", "7 times 8", "16 divided by 4",
        "a third of 12", "11 + 22", "50 minus 5", "4 times 25", "a desert", "a mammal", "electricity", "a verb",
        "an island", "a thermometer", "a poem", "rust", "a spreadsheet", "an earthquake", "the heart for",
        "inflation", "a loop in a program", "a dictionary",
    ),
    "What is the opposite of {}?": (
        "big", "early", "happy", "light", "open", "rich", "soft", "to remember", "empty", "long", "young", "to win",
    ),
    "What is the chemical symbol of {}?": ("iron", "oxygen"),
    "Who wrote {}?": ("Don Quixote", "Faust", "the Odyssey", "War and Peace", "Alice in Wonderland"),
    "In which country is {}?": ("the Eiffel Tower", "the Great Wall", "Machu Picchu", "Mount Fuji", "the Taj Mahal"),
    "How many {}?": (
        "hours are in a day", "months are in a year", "minutes are in an hour", "letters are in the English alphabet",
        "sides has a triangle", "continents are there", "players has a football team", "legs has an ant",
        "cents are in a dollar",
    ),
    "Which planet is {}?": ("the largest", "nearest to the Sun", "known for its rings"),
    "What is the past tense of the verb '{}'?": (
        "see", "run", "take", "write", "eat", "bring", "think", "sing", "find", "drink",
    ),
    "What is the plural of '{}'?": ("mouse", "foot", "box", "leaf", "tooth", "city", "man", "knife"),
    "Translate into French: {}": (
        "Good night.", "I am hungry.", "Where is the station?", "Thank you very much.", "Good evening.",
    ),
    "Translate into Spanish: {}": (
        "Good evening.", "My name is Anna.", "The house is white.", "See you tomorrow.", "please",
    ),
    "Translate into German: {}": ("Good day.", "I don't know.", "The train is late.", "Welcome."),
    "Translate into English: {}": (
        "Bonjour, comment ça va ?", "¿Dónde está el baño?", "Ich habe einen Hund.", "我喜欢喝茶。",
    ),
    "{}": (
        "How many legs does a dog have?", "Who painted the Mona Lisa?", "Who invented the telephone?",
        "Which animal is the tallest on land?", "What do bees make?", "What colour do blue and yellow make?",
        "In which ocean does Hawaii lie?", "What does a thermometer measure?", "What is steam made of?",
        "Which metal is liquid at room temperature?", "On which continent is Brazil?",
        "What is the fastest land animal?", "Which language is spoken in Austria?", "What do we breathe in?",
        "What do plants need to grow?", "What is the longest river in Africa?",
        "What is the highest mountain on Earth?", "What is the smallest continent?",
        "Which gas do balloons fly with?", "What does a clock show?", "Which season comes after winter?",
        "What is snow made of?", "What does a baker make?", "Which organ pumps blood?",
        "What is the currency of Japan?", "Which bird can't fly?", "What is milk used for?",
        "Name two fruits, separated by a comma. Write nothing else.",
        "Name four animals, separated by commas. Write nothing else.",
        "Repeat this word exactly once and write nothing else: window",
        "Repeat this sentence exactly: The lamp is on.", "Repeat this number exactly: 4711",
        "Name three animals, one a line.", "Name two cities in Italy, separated by a comma. Write nothing else.",
        "Write the word 'HOUSE' in small letters.",
        'Answer with this JSON and nothing else: {"name": "Tom", "age": 7}',
        'Answer with this JSON and nothing else: ["a", "b"]', "Count from 3 to 8.", "Count from 10 to 14.",
        "Count down from 5 to 1.", "Write the word 'garden' in capital letters.",
        "Write the days of the week, one a line.", "List three things that one finds in a kitchen.",
        "Answer yes or no: is ice cold?", "Answer yes or no: can fish fly to the moon?",
        "Answer in one word: what do cows drink?", "Answer in one word: what colour is grass?",
        "Answer yes or no: is 7 an even number?", "Answer yes or no: is Paris in France?",
        "Spell the word 'bridge' letter by letter.", "Write a Python function `double(x)` that returns twice x.",
        "Write a Python function `is_even(n)`.", "Write a Python loop that prints the numbers from 1 to 3.",
        "In Python, how do you write a comment?", "In Python, which keyword starts a loop?",
        "Which Python function tells how long a list is?", "How do I open a file in Python?",
        "Write a Python function `greet(name)`.", "Write a Python list of three fruits.",
        "What does `print(2 + 3)` show in Python?", "What is a function in a program?",
        "What does `len([1, 2, 3])` give in Python?",
        "Write an SQL query that selects all rows of the table `users`.", "What is HTML used for?",
        "Write a shell command that lists the files of a folder.",
        "Paul has two apples and buys three more. How many has he?",
        "Mia has 10 sweets and eats 4. How many are left?",
        "Read the text and answer in one word.\n\nOmar left the bag at the station, and Lee took it home. Who left it?",
        "A bus has 20 seats and 8 people sit in it. How many seats are free?",
        "All birds have feathers. A robin is a bird. Has a robin feathers? Answer yes or no.",
        "Read the text and answer in one word.\n\nThe cat slept on the red chair while the dog ate. Who slept?",
        "Read the text and answer in a few words.\n\nMaria took the bus to the market and bought bread. What was it?",
        "Summarise in one sentence: The river rose after three days of rain, and the bridge had to be closed.",
        "Make this sentence polite: Give me the salt.", "Correct the spelling: I recieved your leter.",
        "Rewrite in the past: She walks to school.", "Write a sentence with the words 'sun' and 'window'.",
        "Write a short birthday wish.", "Write two lines about the sea.",
        "Give a title for a story about a lost key.", "Hello", "How are you?", "Good morning, can you help me?",
        "Thank you for your help.", "Tell me a short joke.", "What can you do?",
        "I feel tired today. What could I do?", "Recommend a simple dinner.", "How do I boil an egg?",
        "How do I plant a tree?", "How do I clean a window?", "How can I sleep better?",
        "Write a short thank-you note.", "Tell me something about cats.", "What is your favourite colour?",
        "Explain in one sentence what a library is.", "Explain to a child why it rains.",
        "Summarise in one sentence: The shop opened at nine, and by noon all the bread had been sold.",
        "Why is the sky blue?", "Why do leaves fall in autumn?", "Give me one tip for learning a language.",
        "What should I pack for a rainy day?", "日本的首都是哪里？", "一个星期有几天？", "请写出“高”的反义词。",
        "把“谢谢”翻译成英文。", "三加五等于多少？", "请用一句话介绍长城。", "水在多少摄氏度结冰？",
        "请说出三种水果。", "你好！", "月亮围绕什么转？", "法国的首都是哪里？", "一天有多少个小时？",
        "请写出“快”的反义词。", "把“书”翻译成英文。", "十减四等于多少？", "请用一句话解释什么是雪。",
        "世界上最高的山是哪座？", "请说出两种动物。", "谢谢你！", "鱼生活在哪里？", "Wie viele Tage hat ein Jahr?",
        "Nenne drei Farben.", "Was ist das Gegenteil von kalt?", "Wie geht es dir?",
        "Wie heißt die Hauptstadt von Italien?", "Wie viele Beine hat eine Katze?",
        "Quelle est la capitale de l'Espagne ?", "Combien font deux et trois ?", "¿Cuántos días tiene una semana?",
        "¿De qué color es la nieve?", "Сколько будет два плюс два?", "Какого цвета трава?",
        "Как называется столица Франции?", "¿Cuál es la capital de Italia?", "Quel jour vient après lundi ?",
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
    ("Where do you work?", "You are a doctor named Mr. Lind. Always say that you are a doctor."),
    ("What is the sun?", "Answer in one short sentence."),
    ("Which animal barks?", "Always answer with exactly one word."),
    ("Tell me about your work.", "You are a baker. Always speak of bread."),
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
