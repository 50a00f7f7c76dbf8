"""Errors that a user can fix: printed without a traceback, with exit code 2."""

import difflib
import importlib.util
from collections.abc import Iterable

MOST_SHOWN = 12


class UserError(Exception):
    """Something outside this code is wrong.

    Its text says what is wrong and where, what was found, what is allowed, and what to type.
    """


def listed(headline: str, problems: Iterable[str]) -> str:
    """A headline and one line for each problem. After MOST_SHOWN lines, only how many follow."""
    problems = list(problems)
    lines = [f"  - {problem}" for problem in problems[:MOST_SHOWN]]
    if len(problems) > MOST_SHOWN:
        lines.append(f"  ... and {len(problems) - MOST_SHOWN} more like these")
    return "\n".join([headline, *lines])


def did_you_mean(word: str, allowed: Iterable[str]) -> str:
    """Ends a sentence with `; did you mean X or Y?`, or with a full stop if no word is similar."""
    near = difflib.get_close_matches(word, list(allowed), n=2, cutoff=0.6)
    return f"; did you mean {' or '.join(near)}?" if near else "."


def lacking(package: str, setting: str, install: str | None = None) -> list[str]:
    """What is wrong if this setting needs a package that is not installed, else nothing.

    install: what pip calls it, if it is not called as it is imported.
    """
    if importlib.util.find_spec(package) is not None:
        return []
    return [
        f"{setting} needs the package {package}, which is not installed: "
        f"pip install {install or package}"
    ]


def first_line(error: object) -> str:
    """The first line of the error's text that is not blank. Without one, the error's type."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
