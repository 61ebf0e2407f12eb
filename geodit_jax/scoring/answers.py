"""Short answers: classes of scenes, and questions by type. Nothing here sees a picture.

A comparison that would need judgement is wrong, not right: an answer that says both yes and no, or
names two numbers or two classes, counts as wrong.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

UNITS = """
    zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen
    sixteen seventeen eighteen nineteen
"""
TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
NUMBER_WORDS = {word: value for value, word in enumerate(UNITS.split())}
NUMBER_WORDS |= {word: 10 * (index + 2) for index, word in enumerate(TENS)}
ARTICLES = frozenset({"a", "an", "the"})
WORD = re.compile(r"\d+(?:[.,]\d+)*|[^\W\d_][^\W_]*")
AREA = re.compile(r"(\d+(?:\.\d+)?)\s*(?:m2|m\u00b2|square met(?:er|re)s?)")
BETWEEN = re.compile(r"between\s+\d+\s*(?:m2|m\u00b2)?\s+and\s+(\d+)\s*(?:m2|m\u00b2)?")
MORE = re.compile(r"more than\s+(1000)\s*(?:m2|m\u00b2)?")
EDGES = (10, 100, 1000)
KINDS = ("yes_no", "area", "count_range", "number", "text")


# -------------------------------------------------------------------------------------- normalise
def split_words(text: str) -> list[str]:
    """Lower-case words without punctuation and articles, number words become digits.

    "The twenty-one Ships." -> 21 ships; "1,024" -> 1024
    """
    words = WORD.findall(text.lower())
    words = [word for word in words if word not in ARTICLES] or words
    merged: list[str] = []
    after_tens = False
    for word in words:
        value = NUMBER_WORDS.get(word)
        if after_tens and value in range(1, 10):
            merged[-1] = str(int(merged[-1]) + value)
        else:
            merged.append(word.replace(",", "") if value is None else str(value))
        after_tens = word in TENS
    return merged


def squeeze(text: str) -> str:
    """Letters and digits only, lower case: `Dense_Residential` and "dense residential" agree."""
    return "".join(c for c in text.lower() if c.isalnum())


def holds_words(text: str, wanted: str) -> bool:
    """Whether the words of `wanted` stand in `text` one after the other (whole words)."""
    words, run = split_words(text), split_words(wanted)
    return bool(run) and any(
        words[i : i + len(run)] == run for i in range(len(words) - len(run) + 1)
    )


# ---------------------------------------------------------------------------------------- classes
def same_class(prediction: str, truth: str) -> bool:
    """Equal up to case, spaces and punctuation."""
    return bool(squeeze(truth)) and squeeze(prediction) == squeeze(truth)


def name_class(text: str, classes: Sequence[str]) -> str | None:
    """The one class whose name stands in `text` in whole words; None for no class or several.

    Longer names come first and use up their words: "dense residential" is not `residential`.
    """
    words = [squeeze(word) for word in re.split(r"[\W_]+", text.lower()) if word]
    found = []
    for name in sorted(set(classes), key=lambda c: (-len(squeeze(c)), c)):
        spans = _find_spans(words, squeeze(name))
        if spans:
            found.append(name)
        for start, stop in spans:
            words[start:stop] = [""] * (stop - start)
    return found[0] if len(found) == 1 else None


def _find_spans(words: list[str], key: str) -> list[tuple[int, int]]:
    """Runs of whole words that, written together, are `key`."""
    spans = []
    for start in range(len(words)):
        joined = ""
        for stop in range(start, len(words)):
            joined += words[stop]
            if not words[stop] or len(joined) > len(key):
                break
            if joined == key:
                spans.append((start, stop + 1))
                break
    return spans


def contains_class(prediction: str, truth: str, classes: Sequence[str] = ()) -> bool:
    """The answer names the true class and no other one of `classes`."""
    known = {squeeze(name): name for name in (*classes, truth)}
    named = name_class(prediction, list(known.values()))
    return named is not None and squeeze(named) == squeeze(truth)


# -------------------------------------------------------------------------------------- questions
def bin_number(value: float, unit: str = "") -> str:
    """The range of a count (`unit` empty) or of an area (`m2`) as RSVQA groups them.

    0 stays; up to 10, up to 100, up to 1000, more. The upper edge belongs to the lower range.
    """
    if value <= 0:
        return f"0{unit}"
    low = 0
    for high in EDGES:
        if value <= high:
            return f"between {low}{unit} and {high}{unit}"
        low = high
    return f"more than {EDGES[-1]}{unit}"


def is_rsvqa_lr(dataset: str) -> bool:
    """Whether a dataset name means the low-resolution part of RSVQA (its counts are ranges)."""
    key = squeeze(dataset)
    return "rsvqalr" in key or key == "lrben"


def kind_of(truth: str, category: str = "", dataset: str = "") -> str:
    """How an answer is compared: `yes_no`, `area`, `count_range`, `number` or `text`.

    Read from the true answer. Counts become ranges for RSVQA-LR, or when the truth is a range.
    """
    text = " ".join(truth.lower().split())
    if text in ("yes", "no"):
        return "yes_no"
    ranged = bool(BETWEEN.fullmatch(text) or MORE.fullmatch(text))
    if AREA.fullmatch(text) or (ranged and _has_unit(text)):
        return "area"
    words = split_words(truth)
    number = len(words) == 1 and words[0][0].isdigit()
    if ranged or (number and category == "count" and is_rsvqa_lr(dataset)):
        return "count_range"
    return "number" if number else "text"


def canonical(text: str, kind: str) -> str | None:
    """The answer in the form in which its kind is compared; None when it says none or several."""
    words = split_words(text)
    if kind == "yes_no":
        said = {word for word in words if word in ("yes", "no")}
        return said.pop() if len(said) == 1 else None
    if kind in ("area", "count_range"):
        return _range_of(text.lower(), "m2" if kind == "area" else "")
    if kind == "number":
        numbers = {float(word) for word in words if _is_number(word)}
        return f"{numbers.pop():g}" if len(numbers) == 1 else None
    if kind != "text":
        raise ValueError(f"kind={kind!r}; use one of {', '.join(KINDS)}")
    return " ".join(words) or None


def _range_of(text: str, unit: str) -> str | None:
    between, more = BETWEEN.search(text), MORE.search(text)
    if between or more:
        return bin_number(float(between[1]) if between else EDGES[-1] + 1, unit)
    areas = AREA.findall(text) if unit else []
    numbers = areas or [word for word in split_words(text) if _is_number(word)]
    values = {float(number) for number in numbers}
    return bin_number(values.pop(), unit) if len(values) == 1 else None


def _has_unit(text: str) -> bool:
    return "m2" in text or "m\u00b2" in text


def _is_number(word: str) -> bool:
    return re.fullmatch(r"\d+(\.\d+)?", word) is not None


def is_right(
    prediction: str, answers: Sequence[str], category: str = "", dataset: str = ""
) -> bool:
    """Whether the prediction says one of the true answers, compared by `kind_of` each."""
    for truth in answers:
        kind = kind_of(truth, category, dataset)
        wanted = canonical(truth, kind)
        if wanted is not None and canonical(prediction, kind) == wanted:
            return True
    return False


def contains_answer(prediction: str, answers: Sequence[str]) -> bool:
    """Whether one of the true answers stands in the prediction in whole words (VRSBench's way)."""
    return any(holds_words(prediction, truth) for truth in answers)
