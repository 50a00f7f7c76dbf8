"""What a user typed: is it KEY=VALUE, and what is wrong with it in words.   [no torch]"""

from __future__ import annotations

import shlex

from cogvx.compose import Composer, checked, keys_of, settings, text_settings
from cogvx.config import CONF, HYDRAS, Wrong, hydra_says
from cogvx.errors import UserError, listed
from cogvx.groups import GROUPS
from cogvx.options.other_names import OTHER_NAMES
from cogvx.wording import unknown_option, unknown_setting

# Hydra's own options
SHOW = ("--cfg", "-c", "--info", "-i", "--help", "-h", "--hydra-help", "--version")
COMPLETE = ("--shell-completion", "-sc")
RUN = ("--run", "-r", "--multirun", "-m", "--resolve")
FOLLOWED_BY_A_VALUE = (
    *("--cfg", "-c", "--package", "-p", "--experimental-rerun"),
    *("--config-path", "-cp", "--config-name", "-cn", "--config-dir", "-cd"),
)
INFO = ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")
HYDRAS_OPTIONS = {*SHOW, *COMPLETE, *RUN, *FOLLOWED_BY_A_VALUE}


def require_key_value(arguments: list[str]) -> None:
    """UserError if an argument is neither KEY=VALUE nor an option of Hydra's.

    It names every such argument, and gives the command as it was probably meant.
    """
    meant, problems, rest = [], [], list(arguments)
    while rest:
        if rest[0].partition("=")[0] in HYDRAS_OPTIONS:
            meant += hydras_option(rest)
            continue
        settings_meant, problem = setting(rest)
        meant += settings_meant
        if problem is not None:
            problems.append(problem)
    if problems:
        command = shlex.join(["python", "launch.py", *dict.fromkeys(meant)])
        headline = "settings are written KEY=VALUE, without spaces and dashes:"
        raise UserError(listed(headline, problems) + f"\nThe whole command:  {command}")


def hydras_option(rest: list[str]) -> list[str]:
    """Takes an option and its value from the front of `rest`."""
    option = rest.pop(0)
    has_value = option in FOLLOWED_BY_A_VALUE or (option in ("--info", "-i") and rest[:1] in INFO)
    return [option, rest.pop(0)] if has_value and rest else [option]


def setting(rest: list[str]) -> tuple[list[str], str | None]:
    """Takes one setting from the front of `rest`: what to type for it, and what was wrong."""
    word = rest.pop(0)
    following = rest[0] if rest else ""
    if word.startswith("-") and len(word) > 1:
        return dashed(word, rest)
    if "=" not in word and following.startswith("="):  # lora.rank = 16, lora.rank =16
        value = rest.pop(0)[1:] or (rest.pop(0) if rest else "")
        return corrected(f"{word} = {value}", word, value)
    if word.endswith("=") and is_plain(following):  # lora.rank= 16
        return corrected(f"{word} {following}", word[:-1], rest.pop(0))
    if "=" not in word:
        return bare(word, rest)
    if not is_plain(following) or word.startswith(("~", "+")):
        return [word], None
    key, _, value = word.partition("=")
    words = [value]
    while rest and is_plain(rest[0]):
        words.append(rest.pop(0))
    meant = f"{key}={' '.join(words)}"
    if key in text_settings():
        return [meant], f"a text with spaces needs quotes: type {shlex.quote(meant)}"
    return [word], f"{' '.join(words[1:])}, after {word}, is not KEY=VALUE"


def is_plain(word: str) -> bool:
    """Whether this is a word of a text, and neither a setting nor an option."""
    return bool(word) and "=" not in word and not word.startswith(("-", "~"))


def dashed(word: str, rest: list[str]) -> tuple[list[str], str | None]:
    """--rank 16, --rank=16, --use_8bit_adam"""
    name, equals, value = word.partition("=")
    if not equals:
        value = rest.pop(0) if rest and (is_plain(rest[0]) or is_number(rest[0])) else "true"
    return corrected(
        word if equals else f"{word} {value}", name.lstrip("-").replace("-", "_"), value
    )


def is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def bare(word: str, rest: list[str]) -> tuple[list[str], str | None]:
    """A word without "=": `plan`, or `lora.rank 16`."""
    if word.startswith("~"):  # Hydra's way to remove a setting
        return [word], None
    if rest and is_plain(rest[0]) and (word in settings() or word in (*GROUPS, *OTHER_NAMES)):
        return corrected(f"{word} {rest[0]}", word, rest.pop(0))
    choices = [f"{group}={word}" for group, options in GROUPS.items() if word in options]
    if choices:
        return choices[:1], f"{word}: did you mean {' or '.join(choices)}?"
    return [], f"{word} is not KEY=VALUE. A text with spaces needs quotes: 'KEY=one two'"


def corrected(typed: str, key: str, value: str) -> tuple[list[str], str]:
    """The setting as it is written here, and the sentence that says so."""
    if key in settings() or key in (*GROUPS, "experiment", "sweep"):
        meant = f"{key}={value}"
        return [meant], f"{typed}: type {shlex.quote(meant)}"
    other = OTHER_NAMES.get(key)
    said = unknown_setting(key, value, settings())
    if other is None or other.ours is None:
        return [], said
    return [other.ours if "=" in other.ours else f"{other.ours}={value}"], said


# -- what Hydra refused, in words ---------------------------------------------------------------


def explain(error: Exception, overrides: list[str], composer: Composer) -> str:
    return str(Wrong(refusals(error, overrides, composer)))


def refusals(error: Exception, overrides: list[str], composer: Composer) -> list[str]:
    """Everything that is wrong with a command line that Hydra refused.

    Hydra stops at the first mistake, so the overrides are tried one by one. Where one has several
    values, the first of them is tried.
    """
    chosen = [o for o in overrides if o.split("=")[0].lstrip("+~") in (*GROUPS, "experiment")]
    problems, good, known = [], [], known_keys(composer)
    for override in [*chosen, *(o for o in overrides if o not in chosen)]:
        try:
            known = keys_of(composer.compose([*good, override]))
            good.append(override)
        except HYDRAS as found:
            problems.append(refused(found, override, known))
    try:
        checked(composer.compose(good))
    except Wrong as found:
        problems += found.problems
    except HYDRAS as found:
        problems.append(hydra_says(found))
    return problems or [hydra_says(error)]


def known_keys(composer: Composer) -> list[str]:
    try:
        return keys_of(composer.compose([]))
    except HYDRAS:
        return []


def refused(error: Exception, override: str, known: list[str]) -> str:
    """Why Hydra refused this override. known: the settings that exist."""
    key, _, value = override.partition("=")
    key, text = key.lstrip("+~"), str(error)
    if key in GROUPS and value not in GROUPS[key]:
        return unknown_option(key, value)
    if key == "experiment" and f"experiment/{value}" in text:
        return unknown_option(key, value, experiments())
    if key.startswith("lora.") and "lora" in known:
        return (
            f"{override}: with lora=null every weight is trained and there is no LoRA to set: "
            f"leave out one of the two"
        )
    if "not in struct" in text or "Could not override" in text:
        return unknown_setting(key, value, known)
    if text.startswith("Ambiguous value"):
        return (
            f"{override}: to run one job for each value, add -m; for a list, write [{value}]; "
            f"for text, quote it: '{key}=\"{value}\"'"
        )
    return f"{override}: {hydra_says(error)}"


def experiments() -> list[str]:
    return sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))
