"""The task of `fastkto demo`: sort the letters of a word, so that "dbac=" is answered "abcd".

Words, the split into training and held-out words, lessons, and the checker.
"""

import random
import zlib

LETTERS = "abcdefghijklmnop"
WORD_LENGTHS = range(4, 7)
LONGEST_ANSWER = max(WORD_LENGTHS) + 1  # tokens, with the end of the sequence
# One set of letters in eight is held out, in every order, so that neither a held-out prompt nor its
# answer is met in training. The split follows from the word alone and is the same for every seed.
HELD_OUT_EVERY = 8
HELD_OUT_PROMPTS = 1_000
# Share of lessons with the right answer; the others have it backwards.
RIGHT_LESSONS = 0.5


def draw_words(count: int, rng: random.Random, *, held_out: bool) -> list[str]:
    """`count` words of distinct letters, all from the held-out side of the split or none."""
    words: list[str] = []
    while len(words) < count:
        word = "".join(rng.sample(LETTERS, rng.choice(WORD_LENGTHS)))
        if (zlib.crc32(sort_letters(word).encode()) % HELD_OUT_EVERY == 0) == held_out:
            words.append(word)
    return words


def sort_letters(word: str) -> str:
    return "".join(sorted(word))


def to_prompt(word: str) -> str:
    return f"{word}="


def is_right(prompt: str, answer: str) -> bool:
    """The checker: is the answer the letters of the prompt in alphabetical order, and no more?"""
    return answer == sort_letters(prompt.removesuffix("="))


def success_rate(prompts: list[str], answers: list[list[str]]) -> float:
    """Share of right answers, in [0, 1]; `answers` holds one or more for each prompt."""
    verdicts = [
        is_right(prompt, answer)
        for prompt, samples in zip(prompts, answers, strict=True)
        for answer in samples
    ]
    return sum(verdicts) / len(verdicts)


def held_out_prompts() -> list[str]:
    """The prompts on which every run is measured, whatever its seed."""
    words = draw_words(HELD_OUT_PROMPTS, random.Random("held out"), held_out=True)
    return [to_prompt(word) for word in words]


def training_prompts(count: int, seed: int) -> list[str]:
    """Prompts for the model to answer; the answers become KTO's rows."""
    words = draw_words(count, random.Random(f"rows {seed}"), held_out=False)
    return [to_prompt(word) for word in words]


def make_lessons(count: int, seed: int) -> list[tuple[str, str]]:
    """Prompts with answers for supervised training, some right, the others backwards."""
    rng = random.Random(f"lessons {seed}")
    lessons = []
    for word in draw_words(count, rng, held_out=False):
        answer = sort_letters(word)
        lessons.append((to_prompt(word), answer if rng.random() < RIGHT_LESSONS else answer[::-1]))
    return lessons
