"""What is wrong with a caption that a model wrote, and what it is told when asked again."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum

from cogvx.inference.chat import Answer, Chat, Messages, in_one_line

# How a refusal begins, in small letters and with plain apostrophes.
REFUSALS = re.compile(
    r"((i'm|i am) (very |so )?)?sorry\b|as an ai\b|i('m| am) (unable|not able)\b|"
    r"(unfortunately, )?i (cannot|can't|can not|won't)\b|i don't see any (image|video|picture)"
)


class Fault(Enum):
    """Why an answer is no caption. The value is what the model is told."""

    empty = "Answer with the caption, and with nothing else."
    cut_off = "Answer with the caption only, in at most 100 words."
    too_long = "Answer with the caption only, in at most 100 words, and repeat nothing."
    refusal = "It is a clip from an ordinary video. Answer with the caption of what can be seen."

    @property
    def word(self) -> str:
        return self.name.replace("_", " ")

    @property
    def said(self) -> str:
        """After "the answer is"."""
        return "a refusal" if self is Fault.refusal else self.word


def fault_of(answer: Answer, most_words: int | None) -> Fault | None:
    """None: nothing is wrong. most_words: None for any number."""
    text = in_one_line(answer.text)
    if not answer.complete:
        return Fault.cut_off
    if not text:
        return Fault.empty
    if REFUSALS.match(text.lower().replace("\u2019", "'")):
        return Fault.refusal
    return Fault.too_long if most_words is not None and len(text.split()) > most_words else None


@dataclass
class Asking:
    """Asks once, and once again where the answer is no caption. Counts both."""

    chat: Chat
    most_words: int | None
    asked_again: Counter = field(default_factory=Counter)  # by Fault
    failed: int = 0  # conversations whose second answer was no caption either

    def answers(self, conversations: list[Messages]) -> list[str | Fault]:
        """For each conversation one line of text, or what is wrong also with the second answer."""
        if not conversations:
            return []
        found = [self.judged(answer) for answer in self.chat(conversations)]
        again = [place for place, each in enumerate(found) if isinstance(each, Fault)]
        if not again:
            return found
        self.asked_again.update(found[place] for place in again)
        told = [reminded(conversations[place], found[place]) for place in again]
        for place, answer in zip(again, self.chat(told), strict=True):
            found[place] = self.judged(answer)
        self.failed += sum(isinstance(each, Fault) for each in found)
        return found

    def judged(self, answer: Answer) -> str | Fault:
        return fault_of(answer, self.most_words) or in_one_line(answer.text)

    def counts(self) -> Iterator[str]:
        """`3 cut off`, for each fault of first answers."""
        return (f"{number} {fault.word}" for fault, number in self.asked_again.items())


def reminded(messages: Messages, fault: Fault) -> Messages:
    """The conversation with a sentence at the end of its last message.

    The same conversation would get the same answer again.
    """
    *before, last = messages
    content = last["content"]
    if isinstance(content, str):
        return [*before, {**last, "content": f"{content}\n\n{fault.value}"}]
    return [*before, {**last, "content": [*content, {"type": "text", "text": fault.value}]}]
