"""What the model will see of each clip, or why a clip is left out.

Writes dataset_report.csv (a table), dataset.json and dataset/ (for the page dataset.html),
contact_sheet.png (pictures of all clips) and held_out/ (those of the held-out clips).
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from cogvx.data.encode import EncodedClip, EncodedCut, Rejected
from cogvx.data.flags import (
    FLAG_KINDS,
    Flag,
    estimate,
    flags_of_caption,
    flags_of_clip,
    flags_of_likeness,
)
from cogvx.data.lettering import drawable, font
from cogvx.data.sources import Data
from cogvx.data.split import Split
from cogvx.files import replacing, write_bytes, write_csv, write_json

COLUMNS = [
    "origin",
    "video",
    "image",
    "use",
    "flags",
    "frames",
    "first_frame",
    "last_frame",
    "cuts",
    "taken",
    "repeated",
    "file_frames",
    "file_fps",
    "file_width",
    "file_height",
    "size",
    "cropped",
    "treatment",
    "moving",
    "jumps",
    "bars",
    "alike",
    "latent_shape",
    "tokens",
    "prompt",
]
MOST_ON_SHEET = 60
MOST_HELD_OUT = 12
# On the page of the data: rows, clips that play, and their bytes.
MOST_LISTED, MOST_PLAYED, MOST_BYTES = 5000, 2000, 64 * 2**20


@dataclass(frozen=True)
class Inspected:
    """What is known of a set of clips, for the table and the page."""

    rows: list[dict]  # of each example: the table's columns, and its flags and caption
    clips: list[EncodedClip]  # in the order of the first rows
    texts: Texts

    def counts(self) -> dict[str, int]:
        """How many examples have a flag of each kind, in the order of FLAG_KINDS."""
        found = Counter(kind for row in self.rows for kind in {f.kind for f in row["flags"]})
        return {kind: found[kind] for kind in FLAG_KINDS if found[kind]}


@dataclass(frozen=True)
class Texts:
    """What is known of captions."""

    about: dict[str, dict]  # by caption: what facts_of_prompt() found, or estimate()
    most_tokens: int  # that the model sees
    estimated: bool  # no tokenizer was at hand

    @classmethod
    def estimated_of(cls, clips: list[EncodedClip], most_tokens: int) -> Texts:
        about = {clip.example.prompt: estimate(clip.example.prompt) for clip in clips}
        return cls(about, most_tokens, estimated=True)


def inspected(
    clips: list[EncodedClip],
    split: Split,
    rejected: list[Rejected],
    data: Data,
    texts: Texts,
    model_fps: float,
) -> Inspected:
    same = first_of_the_same(clips, split.digests)
    captions = Counter(clip.example.prompt for clip in clips)
    if len(captions) == 1:
        # One caption for all clips is meant; the page says it once.
        captions = Counter(captions.keys())
    names = [clip.example.origin for clip in clips]
    rows = []
    for place, clip in enumerate(clips):
        prompt, alike = clip.example.prompt, alike_of(place, split)
        text, others = texts.about[prompt], captions[prompt] - 1
        flags = [
            *flags_of_likeness(place, split.uses, same[place], alike, names),
            *flags_of_clip(clip.about, clip.size, data, clip.example, model_fps),
            *flags_of_caption(clip.example, text, data.of(clip.example), texts.most_tokens, others),
        ]
        first = split.first_alike[place]
        rows.append(
            row_of(clip, split.uses[place])
            | {"alike": None if first is None else names[first], "tokens": text["tokens"]}
            | {"cut_off": text.get("cut_off") or "", "flags": flags}
        )
    rows += [row_of_rejected(bad) for bad in rejected]
    return Inspected(rows, clips, texts)


def row_of(clip: EncodedClip, use: str) -> dict:
    return {
        **{name: clip.about[name] for name in COLUMNS if name in clip.about},
        "origin": clip.example.origin,
        "video": str(clip.example.video),
        "image": clip.example.image,
        "use": use,
        "size": str(clip.size),
        "cuts": len(clip.cuts),
        "taken": ", ".join(map(taken, clip.cuts)),
        "latent_shape": "x".join(map(str, clip.latent_shape)),
        "prompt": clip.example.prompt,
    }


def row_of_rejected(bad: Rejected) -> dict:
    flag = Flag("left out", f"It {bad.reason}.", "repair it, or take it off the list")
    return {
        "origin": bad.example.origin,
        "video": str(bad.example.video),
        "image": bad.example.image,
        "use": f"left out: it {bad.reason}",
        "prompt": bad.example.prompt,
        "flags": [flag],
    }


def first_of_the_same(clips: list[EncodedClip], digests: list[str]) -> list[int | None]:
    """For each example another one with the same file's content, which is not another part of it.

    The parts that data.long_files makes of one file are meant, and so are several captions.
    """
    first, found = {}, []
    for place, (clip, digest) in enumerate(zip(clips, digests, strict=True)):
        other = first.setdefault(digest, place)
        listed_anew = str(clips[other].example.video) != str(clip.example.video)
        equal = clips[other].example.prompt == clip.example.prompt and clip.example.start == 0
        found.append(other if other != place and (listed_anew or equal) else None)
    return found


def alike_of(place: int, split: Split) -> int | None:
    """The first example that looks like this one, and is of another file."""
    other = split.first_alike[place]
    return None if other is None or split.digests[other] == split.digests[place] else other


def write_report(folder: Path, found: Inspected) -> None:
    rows = [
        {name: row.get(name) for name in COLUMNS}
        | {"flags": "; ".join(dict.fromkeys(flag.kind for flag in row["flags"]))}
        for row in found.rows
    ]
    write_csv(folder / "dataset_report.csv", rows, COLUMNS)


def write_dataset(folder: Path, found: Inspected) -> None:
    """dataset.json and dataset/*.mp4, of which records/dataset.py makes a page.

    At most MOST_LISTED examples, and MOST_PLAYED clips in MOST_BYTES. Those with flags come first.
    """
    order = sorted(range(len(found.rows)), key=lambda place: not found.rows[place]["flags"])
    listed, played, size = sorted(order[:MOST_LISTED]), {}, 0
    for place in [place for place in order if place < len(found.clips)][:MOST_PLAYED]:
        video = clip_of(found.clips[place])
        size += 0 if video is None else len(video)
        if video is None or size > MOST_BYTES:
            continue
        played[place] = f"dataset/{place + 1:05d}.mp4"
        write_bytes(folder / played[place], video)
    rows = [
        {name: value for name, value in found.rows[place].items() if name != "image"}
        | {
            "number": place + 1,
            "clip": played.get(place),
            "flags": [dataclasses.asdict(flag) for flag in found.rows[place]["flags"]],
        }
        for place in listed
    ]
    about = {
        "most_tokens": found.texts.most_tokens,
        "estimated": found.texts.estimated,
        "uses": Counter(row["use"].partition(":")[0] for row in found.rows),
        "counts": {kind: [count, FLAG_KINDS[kind]] for kind, count in found.counts().items()},
        "all": len(found.rows),
        "captions": len({clip.example.prompt for clip in found.clips}),
        "unmeasured": sum("moving" not in clip.about for clip in found.clips),
    }
    write_json(folder / "dataset.json", about | {"rows": rows})


def clip_of(clip: EncodedClip) -> bytes | None:
    """Its mp4. None for a file of the cache of an earlier version."""
    return clip.picture("preview").tobytes() if "preview" in clip.about["shapes"] else None


def taken(encoded: EncodedCut) -> str:
    """The first and the last frame of a cut."""
    mirrored = " mirrored" if encoded.cut.flipped else ""
    return f"{encoded.about['first_frame']} to {encoded.about['last_frame']}{mirrored}"


def write_contact_sheet(folder: Path, clips: list[EncodedClip], uses: list[str]) -> None:
    """The first, middle and last frame of up to MOST_ON_SHEET clips, as the model sees them."""
    from PIL import Image, ImageDraw
    from safetensors.torch import load_file

    shown = list(zip(clips, uses, strict=True))[:MOST_ON_SHEET]
    strips = [load_file(clip.first.path)["thumbnails"].numpy() for clip, _ in shown]  # [3, h, w, C]
    # Clips of several buckets have pictures of several sizes.
    height, width = (max(strip.shape[side] for strip in strips) for side in (1, 2))
    columns, gap, text = min(3, len(shown)), 8, 30
    cell_width, cell_height = 3 * width + gap, height + text + gap
    rows = -(-len(shown) // columns)
    sheet = Image.new("RGB", (columns * cell_width + gap, rows * cell_height + gap), "white")
    pen = ImageDraw.Draw(sheet)
    for number, ((clip, use), strip) in enumerate(zip(shown, strips, strict=True)):
        left, top = gap + number % columns * cell_width, gap + number // columns * cell_height
        for place, frame in enumerate(strip):
            sheet.paste(Image.fromarray(frame), (left + place * width, top))
        before = "" if use == "train" else f"{use.partition(':')[0]}: "
        label = f"{before}{clip.example.video.name}, {clip.about['frames']} frames"
        write_line(pen, (left, top + height + 1), label, 3 * width, "black")
        write_line(pen, (left, top + height + 14), clip.example.prompt, 3 * width, "dimgray")
    with replacing(folder / "contact_sheet.png") as partial:
        sheet.save(partial, format="png")


def write_held_out(folder: Path, clips: list[EncodedClip], uses: list[str]) -> None:
    """The first, middle and last frame of up to MOST_HELD_OUT clips, as held_out/01.png and so on.

    The pictures are in the order of the clips in dataset_report.csv.
    """
    import numpy
    from PIL import Image
    from safetensors.torch import load_file

    aside = [clip for clip, use in zip(clips, uses, strict=True) if use == "held out"]
    for number, clip in enumerate(aside[:MOST_HELD_OUT], start=1):
        frames = load_file(clip.first.path)["thumbnails"].numpy()  # [3, h, w, C]
        with replacing(folder / "held_out" / f"{number:02d}.png") as partial:
            Image.fromarray(numpy.concatenate(list(frames), axis=1)).save(partial, format="png")


def write_line(pen, place: tuple[int, int], text: str, width: int, colour: str) -> None:
    """As much of the text as fits into `width` pixels."""
    pen.font = font(10, text)
    pen.text(place, fitted(pen, drawable(text), width), colour)


def fitted(pen, text: str, width: int) -> str:
    """As much of the text as fits into `width` pixels."""
    if pen.textlength(text) <= width:
        return text
    while text and pen.textlength(text + "...") > width:
        text = text[:-1]
    return text + "..."
