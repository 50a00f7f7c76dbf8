"""Errors that a user can mend: printed in words, without a traceback, with exit code 2."""

import difflib
from collections.abc import Iterable

MOST_SHOWN = 12


class UserError(Exception):
    """A mistake outside this code.

    Its text says what is wrong and where, what was found, what is allowed, and what to type.
    """


def listed(headline: str, problems: Iterable[str]) -> str:
    """A headline and its problems, one to a line. After MOST_SHOWN only their number is given."""
    problems = list(problems)
    lines = [f"  - {problem}" for problem in problems[:MOST_SHOWN]]
    if len(problems) > MOST_SHOWN:
        lines.append(f"  ... and {len(problems) - MOST_SHOWN} more like these")
    return "\n".join([headline, *lines])


def did_you_mean(word: str, allowed: Iterable[str]) -> str:
    """The end of a sentence: `; did you mean X or Y?`, or a full stop when no allowed word is near."""
    near = difflib.get_close_matches(word, list(allowed), n=2, cutoff=0.6)
    return f"; did you mean {' or '.join(near)}?" if near else "."


def first_line(error: object) -> str:
    """The first line of an error that says something; the error's type when it says nothing."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
