"""What the model will see of each clip, or why a clip is left out.

Writes dataset_report.csv (a table), contact_sheet.png (pictures of all clips) and held_out/ (those
of the held-out clips).
"""

from pathlib import Path

from cogvx.data.encode import EncodedClip, EncodedCut, Rejected
from cogvx.data.split import Split
from cogvx.files import replacing, write_csv

COLUMNS = [
    "origin",
    "video",
    "image",
    "use",
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
    "alike",
    "latent_shape",
    "prompt",
]
MOST_ON_SHEET = 60
MOST_HELD_OUT = 12


def write_report(
    folder: Path, clips: list[EncodedClip], split: Split, rejected: list[Rejected]
) -> None:
    names = [clip.example.origin for clip in clips]
    rows = [
        {
            **{name: clip.about[name] for name in COLUMNS if name in clip.about},
            "origin": clip.example.origin,
            "video": str(clip.example.video),
            "image": clip.example.image,
            "use": use,
            "size": str(clip.size),
            "cuts": len(clip.cuts),
            "taken": ", ".join(map(taken, clip.cuts)),
            "alike": None if first is None else names[first],
            "latent_shape": "x".join(map(str, clip.latent_shape)),
            "prompt": clip.example.prompt,
        }
        for clip, use, first in zip(clips, split.uses, split.first_alike, strict=True)
    ]
    rows += [
        {
            "origin": bad.example.origin,
            "video": str(bad.example.video),
            "image": bad.example.image,
            "use": f"left out: it {bad.reason}",
            "prompt": bad.example.prompt,
        }
        for bad in rejected
    ]
    write_csv(folder / "dataset_report.csv", rows, COLUMNS)


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
    pen.font = font(10)
    for number, ((clip, use), strip) in enumerate(zip(shown, strips, strict=True)):
        left, top = gap + number % columns * cell_width, gap + number // columns * cell_height
        for place, frame in enumerate(strip):
            sheet.paste(Image.fromarray(frame), (left + place * width, top))
        before = "" if use == "train" else f"{use.partition(':')[0]}: "
        label = f"{before}{clip.example.video.name}, {clip.about['frames']} frames"
        pen.text((left, top + height + 1), fitted(pen, label, 3 * width), "black")
        pen.text((left, top + height + 14), fitted(pen, clip.example.prompt, 3 * width), "dimgray")
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


def font(size: int):
    """A font with the letters of most alphabets. Pillow's own has those of English."""
    from PIL import ImageFont

    try:
        import matplotlib
    except ImportError:
        return ImageFont.load_default(size)
    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf"), size)


def fitted(pen, text: str, width: int) -> str:
    """As much of the text as fits into `width` pixels."""
    if pen.textlength(text) <= width:
        return text
    while text and pen.textlength(text + "...") > width:
        text = text[:-1]
    return text + "..."
