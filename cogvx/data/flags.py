"""What is odd about a clip or its caption: one sentence each, and what to type to mend it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cogvx.data.phrasing import END, START, as_a_word
from cogvx.progress import counted

if TYPE_CHECKING:
    from cogvx.data.buckets import Size
    from cogvx.data.sources import Data, Example

# From here on a clip is flagged.
LEAST_UNUSED = 0.5  # share of the file
LEAST_CROPPED = 0.25  # share of the picture
MOST_STATIC = 0.005  # share of pixels that move
LEAST_BARS = 0.04  # share of the height, or of the width
OTHER_SPEED = 0.1  # share by which a clip may be played faster or slower
# Tokens of T5 for each word of English, about.
TOKENS_PER_WORD = 1.35
# Frequent words that say in which language a text is: two or more, and more than of English.
ENGLISH = "English"
FREQUENT = {
    ENGLISH: "a an the of and in on at with is are to its his her over from by",
    "German": "der die das und ein eine mit auf im ist den dem von zu einem",
    "French": "le la les des et un une dans sur est avec du de au qui",
    "Spanish": "el los las y un una con en es del por que se su de la",
    "Italian": "il lo gli e un una con su di che nel della in sulla",
    "Portuguese": "o os um uma com em do da por que se no na de e",
    "Dutch": "de het een en met op is van in te aan zijn over door",
}
LONG_ENOUGH = 5  # words, to say in which language a text is
OTHER_LETTERS = 0.2  # share of letters that are not Latin


@dataclass(frozen=True)
class Flag:
    kind: str  # of FLAG_KINDS
    said: str
    mend: str


# In the order in which they are shown.
FLAG_KINDS = {
    "left out": "The file cannot be used.",
    "seen in training": "It is held out, and a clip like it is trained on.",
    "hard cut": "A new scene begins within the clip.",
    "nothing moves": "All frames are nearly the same.",
    "black bars": "The picture has black bars.",
    "cropped": "A large part of the picture is cut off.",
    "mostly unused": "Most of the file is not used.",
    "frames repeated": "Frames are shown twice.",
    "other speed": "It plays faster or slower than the model expects.",
    "same file": "The same file is listed elsewhere.",
    "looks alike": "It looks like another clip.",
    "no caption": "The caption is empty.",
    "same caption": "Other clips have the same caption.",
    "long caption": "The model does not see the end of the caption.",
    "unknown letters": "The text encoder does not know some letters.",
    "not English": "The model was trained on English captions.",
    "id_token": "The caption has the word for what is learned already.",
}


def flags_of_clip(
    about: dict, size: Size, data: Data, example: Example, model_fps: float
) -> list[Flag]:
    """about: what facts_of() and measured() found. Earlier versions of the cache have less."""
    found = [
        flag_of_use(about, data, example),
        flag_of_crop(about, data),
        flag_of_repeats(about, data),
        flag_of_speed(about, data, model_fps),
        flag_of_motion(about),
        flag_of_jumps(about),
        flag_of_bars(about, size, data),
    ]
    return [flag for flag in found if flag is not None]


def flag_of_use(about: dict, data: Data, example: Example) -> Flag | None:
    first, last, frames = about["first_frame"], about["last_frame"], about["file_frames"]
    unused = 1 - (last - first + 1) / frames
    if data.long_files.name != "head" or example.end is not None or unused < LEAST_UNUSED:
        return None
    return Flag(
        "mostly unused",
        f"Only frames {first} to {last} of {frames} are used; {unused:.0%} of the file is not.",
        "data.long_files=sliding (or random, scenes)",
    )


def flag_of_crop(about: dict, data: Data) -> Flag | None:
    cropped = about.get("cropped", 0.0)
    if cropped < LEAST_CROPPED:
        return None
    size = f"{about['file_width']}x{about['file_height']}"
    return Flag(
        "cropped",
        f"{cropped:.0%} of the picture ({size}) is cut off.",
        "data.buckets=auto" if data.buckets is None else "data.video_reshape_mode=pad",
    )


def flag_of_repeats(about: dict, data: Data) -> Flag | None:
    if not about["repeated"] or about["file_frames"] == 1:
        return None
    said = f"{counted(about['repeated'], 'frame')} of {about['frames']} repeat another one"
    if about.get("own_frames", about["frames"]) < about["frames"]:
        return Flag(
            "frames repeated",
            f"{said}: the file is shorter than the clip.",
            "data.short_files=drop",
        )
    rate = about["file_fps"]
    if data.fps is None or rate >= data.fps:
        return Flag(
            "frames repeated",
            f"{said}: the file's frames come at uneven times.",
            "nothing, if the film stands still there",
        )
    return Flag(
        "frames repeated",
        f"{said}: the file has {rate:g} fps, and data.fps is {data.fps:g}.",
        f"leave the clip out, or for all clips: data.fps={int(rate) or rate}",
    )


def flag_of_speed(about: dict, data: Data, model_fps: float) -> Flag | None:
    """With data.fps=null every frame is used, and the model expects its own rate."""
    rate = data.fps or about["file_fps"]
    if not rate or abs(model_fps / rate - 1) <= OTHER_SPEED or about["frames"] == 1:
        return None
    share = model_fps / rate
    how = f"{1 / share:.2g} times slower" if share < 1 else f"{share:.2g} times faster"
    return Flag(
        "other speed",
        f"{rate:g} of its frames per second are used, and the model makes {model_fps:g}: "
        f"videos will be {how} than what was filmed.",
        f"data.fps={model_fps:g}",
    )


def flag_of_motion(about: dict) -> Flag | None:
    share = about.get("moving")
    if share is None or share >= MOST_STATIC:
        return None
    return Flag(
        "nothing moves",
        f"Less than {MOST_STATIC:.1%} of the picture changes: the model learns to stand still.",
        "leave the clip out, or choose another part: data.skip_frames_start=50",
    )


def flag_of_jumps(about: dict) -> Flag | None:
    jumps = about.get("jumps")
    if not jumps:
        return None
    where = f"frame{'s' if len(jumps) > 1 else ''} {', '.join(map(str, jumps[:5]))}"
    more = " and more" if len(jumps) > 5 else ""
    return Flag(
        "hard cut",
        f"A new scene begins at {where}{more} of the file.",
        "data.long_files=scenes",
    )


def flag_of_bars(about: dict, size: Size, data: Data) -> Flag | None:
    """Bars on both sides: a dark edge on one side may be a part of the picture."""
    top, bottom, left, right = about.get("bars", (0, 0, 0, 0))
    if data.video_reshape_mode.name == "pad":
        return None
    if min(top, bottom) > 0 and (top + bottom) / size.height >= LEAST_BARS:
        said = f"Black bars: {top} rows at the top and {bottom} at the bottom, of {size.height}."
    elif min(left, right) > 0 and (left + right) / size.width >= LEAST_BARS:
        said = f"Black bars: {left} columns at the left and {right} at the right, of {size.width}."
    else:
        return None
    return Flag(
        "black bars",
        said,
        "cut them off: ffmpeg -i in.mp4 -vf cropdetect, then -vf crop=...",
    )


# -- captions ------------------------------------------------------------------------------------


def flags_of_caption(
    example: Example, text: dict, data: Data, most_tokens: int, others: int
) -> list[Flag]:
    """text: of facts_of_prompt(), or estimate(). others: clips with the same caption."""
    found, caption = [], without_id_token(example.prompt, data)
    if not caption:
        return [Flag("no caption", "The caption is empty.", "task=caption writes one")]
    if others:
        found.append(
            Flag(
                "same caption",
                f"{counted(others, 'other clip has', 'other clips have')} the same caption.",
                "say in each caption what is different; task=caption writes captions",
            )
        )
    if text["tokens"] > most_tokens:
        about = "about " if text.get("estimated") else ""
        found.append(
            Flag(
                "long caption",
                f"The caption has {about}{text['tokens']} tokens, and the model sees "
                f"{most_tokens}.",
                "shorten it, with what matters first",
            )
        )
    if text.get("unknown"):
        words = ", ".join(text["unknown"][:3])
        found.append(
            Flag(
                "unknown letters",
                f"The text encoder does not know letters of: {words}.",
                "write in English letters",
            )
        )
    if language := other_language(caption):
        said = f"The caption seems to be {language}; the model was trained on English."
        found.append(Flag("not English", said, "translate it, or task=caption"))
    return [*found, *flags_of_id_token(caption, data)]


def without_id_token(prompt: str, data: Data) -> str:
    """The caption without the id_token that was put before or after it."""
    if data.id_token and data.id_token_position == START:
        return prompt.removeprefix(f"{data.id_token} ").strip()
    if data.id_token and data.id_token_position == END:
        return prompt.removesuffix(f" {data.id_token}").strip()
    return prompt.strip()


def flags_of_id_token(caption: str, data: Data) -> list[Flag]:
    """caption: without the word, if it was put at the start or the end."""
    if not data.id_token or data.id_token_position not in (START, END):
        return []
    if not as_a_word(data.id_token).search(caption):
        return []
    said = f"The caption has {data.id_token} already, so it is there twice."
    return [Flag("id_token", said, "data.id_token=null, or take it out of the caption")]


def estimate(caption: str) -> dict:
    """The number of tokens, where no tokenizer is at hand."""
    words = re.findall(r"\w+|[^\w\s]", caption)
    return {"tokens": round(len(words) * TOKENS_PER_WORD) + 1, "estimated": True}


def other_language(caption: str) -> str | None:
    """`French`, or `in other letters`. None for English, and where it cannot be said."""
    letters = [letter for letter in caption if letter.isalpha()]
    # Latin letters end at U+024F.
    other = sum(ord(letter) > 0x24F for letter in letters)
    if letters and other / len(letters) >= OTHER_LETTERS:
        return "in other letters than English"
    words = re.findall(r"\w+", caption.lower())
    if len(words) < LONG_ENOUGH:
        return None
    counts = {
        name: sum(word in known.split() for word in words) for name, known in FREQUENT.items()
    }
    best = max(counts, key=counts.get)
    return best if counts[best] >= 2 and counts[best] > counts[ENGLISH] else None


# -- clips beside each other ---------------------------------------------------------------------


def flags_of_likeness(
    place: int, uses: list[str], same: int | None, alike: int | None, names: list[str]
) -> list[Flag]:
    """same, alike: another example with the same file, or one that looks alike."""
    other = same if same is not None else alike
    if other is None:
        return []
    how = "is the same file as" if same is not None else "looks like"
    if {uses[place], uses[other]} == {"train", "held out"}:
        what = "it is held out" if uses[place] == "held out" else "that one is held out"
        return [
            Flag(
                "seen in training",
                f"It {how} {names[other]}, and {what}: the held-out loss is too low.",
                "data.near_duplicates_together=true",
            )
        ]
    kind = "same file" if same is not None else "looks alike"
    mend = "list one of them" if same is not None else "list one of them, if they are the same"
    return [Flag(kind, f"It {how} {names[other]}.", mend)]
