"""Recognize split names (train, test, val) in names of folders and shards."""

from __future__ import annotations

import re

__all__ = ["split_kind", "split_template", "split_word"]

_WORDS = {
    "train": ("training", "train"),
    "test": ("testing", "test"),
    "val": ("validation", "valid", "val", "development", "devel", "dev", "evaluation", "eval"),
}
_KINDS = {word: kind for kind, words in _WORDS.items() for word in words}
_NAME = re.compile(rf"({'|'.join(_KINDS)})(?:[-_ ]?(?:set|data|images|split)|[-_ ]?\d{{4}})?", re.IGNORECASE)
# A word of a longer name, delimited by punctuation, digits and changes of case (trainA, seg_train, ILSVRC2012_img_val).
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])")


def split_kind(name: str) -> str | None:
    """Return train, test or val if a folder's name is a split name, else None."""
    match = _NAME.fullmatch(name.strip())
    return _KINDS[match[1].lower()] if match else None


def split_word(name: str) -> str | None:
    """Return the split that one word of a longer name means; None for no such word, or for several splits."""
    found = {kind for word in _WORD.findall(name) if (kind := split_kind(word)) is not None}
    return found.pop() if len(found) == 1 else None


def split_template(name: str) -> str:
    """Return a name with "*" for split names and "#" for numbers: equal for seg_train and seg_test."""
    text = _WORD.sub(lambda word: word[0].lower() if split_kind(word[0]) is None else "*", name)
    return re.sub(r"\d+", "#", text)
