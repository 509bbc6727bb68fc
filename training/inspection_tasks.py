"""Find instructions that differ only in their spelling: for a policy they are different tasks."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from difflib import SequenceMatcher
from itertools import combinations

ALIKE = 0.9  # ratio of difflib above which two instructions are compared word by word
# ratio above which two words are spellings of one: "cube" and "cubes", not "into" and "onto"
SAME_WORD = 0.8
FILLERS = {"a", "an", "the", "please"}  # words without a meaning of their own
MOST_COMPARED = 400  # instructions whose pairs are compared, which takes a few seconds at most


def similar_tasks(tasks: Sequence[str]) -> list[tuple[str, str]]:
    """Pairs of instructions that differ only in their spelling.

    They differ in case, punctuation, white space and articles, or are alike (`ALIKE`) and differ in
    the spelling of words. The latter are not searched among more than `MOST_COMPARED` instructions.
    """
    same: dict[str, list[str]] = defaultdict(list)
    for task in tasks:
        same[plain(task)].append(task)
    pairs = [(first, other) for first, *others in same.values() for other in others]
    if len(same) <= MOST_COMPARED:
        pairs += [(same[a][0], same[b][0]) for a, b in combinations(same, 2) if _alike(a, b)]
    return pairs


def plain(task: str) -> str:
    """An instruction in lower case, without punctuation and articles, with single spaces."""
    words = re.sub(r"[\W_]+", " ", task.casefold()).split()
    return " ".join(word for word in words if word not in FILLERS) or task


def _alike(first: str, second: str) -> bool:
    """Whether two plain instructions differ only in the spelling of words."""
    matcher = SequenceMatcher(None, first, second, autojunk=False)
    if (
        matcher.real_quick_ratio() < ALIKE
        or matcher.quick_ratio() < ALIKE
        or matcher.ratio() < ALIKE
    ):
        return False
    words = first.split()
    others = second.split()
    return len(words) == len(others) and all(map(_same_word, words, others))


def _same_word(first: str, second: str) -> bool:
    """Whether two words are spellings of one; numbers never are."""
    numbers = any(character.isdigit() for character in first + second)
    return first == second or (
        not numbers and SequenceMatcher(None, first, second).ratio() >= SAME_WORD
    )
