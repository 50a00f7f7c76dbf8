"""What is done to captions: several of one text, the word of what is learned, shuffled tags.

Everything that training can draw is made here, before the text encoder runs.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cogvx.data.listed import shortened
from cogvx.errors import UserError
from cogvx.progress import counted

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# data.id_token_position: anything else is the text that the word takes the place of.
START, END = "start", "end"
# data.caption_split: each line of a text is a caption.
LINES = "lines"


@dataclass(frozen=True)
class Phrasing:
    """data.id_token and the other settings of captions. See conf/data/text_files.yaml."""

    id_token: str | None
    position: str
    share: float
    split: str | None
    shuffles: int
    keep_tags: int

    def several(self, text: str) -> list[str]:
        """The captions that one text holds, each in one line."""
        if self.split is None:
            return [text]
        parts = text.splitlines() if self.split == LINES else text.split(self.split)
        return [part.strip() for part in parts if part.strip()]

    def variants(self, captions: Sequence[str]) -> list[str]:
        """Each caption as it is written, then with its tags in other orders."""
        found = [
            variant
            for caption in captions
            for variant in (caption, *other_orders(caption, self.shuffles, self.keep_tags))
        ]
        return list(dict.fromkeys(found))

    def named(self, caption: str) -> str:
        """The caption with the id_token."""
        if not self.id_token:
            return caption
        if self.position == START:
            return f"{self.id_token} {caption}"
        if self.position == END:
            return f"{caption} {self.id_token}"
        return self.place().sub(lambda _: self.id_token, caption)

    def plain(self, caption: str) -> str:
        """The caption without the id_token, for the epochs in which it is left out."""
        if self.position in (START, END) or is_word(self.position):
            return caption
        return " ".join(caption.replace(self.position, "").split())

    def place(self) -> re.Pattern:
        """The text that the id_token takes the place of; a word only where it is a whole one."""
        if is_word(self.position):
            return as_a_word(self.position)
        return re.compile(re.escape(self.position))

    def require_place(self, captions: list[str]) -> None:
        """UserError if no caption has the text that the id_token takes the place of."""
        if not self.id_token or self.position in (START, END):
            return
        without = [caption for caption in captions if not self.place().search(caption)]
        if without:
            raise UserError(
                f"data.id_token_position={self.position}: {len(without)} of "
                f"{counted(len(captions), 'caption')} do not have this text, in whose place "
                f"{self.id_token} is put, such as {shortened(without[0])!r}. Write it there, or: "
                f"data.id_token_position=start"
            )

    def said(self, captions: list[str]) -> list[str]:
        """A warning, if captions have the id_token already."""
        if not self.id_token or self.position not in (START, END):
            return []
        there = [text for text in captions if as_a_word(self.id_token).search(text)]
        if not there:
            return []
        return [
            f"warning {len(there)} of {counted(len(captions), 'caption')} have {self.id_token} "
            f"already, such as {shortened(there[0])!r}; it is put in once more. Leave out "
            f"data.id_token, or take it out of the captions"
        ]


def is_word(text: str) -> bool:
    """Whether it is a word or several, and no placeholder such as {} or [V]."""
    return text[:1].isalnum() and text[-1:].isalnum()


def as_a_word(text: str) -> re.Pattern:
    return re.compile(rf"(?<!\w){re.escape(text)}(?!\w)")


def require_readable(id_tokens: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> None:
    """UserError for a word of which the tokenizer knows no letter: all such words look alike."""
    for word in id_tokens:
        ids = tokenizer(word, add_special_tokens=False).input_ids
        known = [each for each in ids if each != tokenizer.unk_token_id]
        # The mark of a word's beginning is a piece of its own.
        if not "".join(tokenizer.convert_ids_to_tokens(known)).strip("\u2581"):
            raise UserError(
                f"data.id_token={word}: the text encoder knows none of its letters, so it looks "
                f"like every other word of that kind. Take a rare word of English letters: "
                f"data.id_token=RABBIT"
            )


def other_orders(caption: str, count: int, keep: int) -> list[str]:
    """`count` orders of the caption's comma-separated tags. The first `keep` tags stay in place.

    The orders follow from the caption, so the cache has them when the run is started again.
    """
    tags = [tag.strip() for tag in caption.split(",") if tag.strip()]
    if count == 0 or len(tags) - keep < 2:
        return []
    generator, found = random.Random(caption), []
    for _ in range(count):
        rest = tags[keep:]
        generator.shuffle(rest)
        found.append(", ".join([*tags[:keep], *rest]))
    return found
