"""What a video file holds, and its frames as a player shows them. Read by PyAV (FFmpeg).

F frames, H height, W width, C is 3 (R, G, B).
"""

from __future__ import annotations

import bisect
import contextlib
import itertools
import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy

from cogvx.data import hdr
from cogvx.data.webp import is_webp, webp_frames, webp_size, webp_times
from cogvx.errors import first_line
from cogvx.files import LFS_POINTER

if TYPE_CHECKING:
    import av

# Transparent parts are shown over black, as video editors show them.
BACKGROUND = 0
# A file is cut off if its frames end this many seconds before its header says.
MISSING_SECONDS = 0.5
# FFmpeg's names of formats with an index of key frames, by which a file is entered in its middle.
INDEXED = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm")
# Only to read frames after this one: less is read from the start as fast.
FAR_IN = 100
# It is entered so many frames before the first one that is wanted: deinterlacing looks back.
FRAMES_BEFORE = 3
# A frame is read whole before it is scaled. 8192x8192 pixels are 200 MB.
FEWEST_PIXELS_OF_A_SIDE, MOST_PIXELS = 8, 8192 * 8192
# A film of 23 hours at 60 frames a second has half as many. The times of all are in memory.
MOST_FRAMES = 10_000_000
# How files begin that name other files, which FFmpeg would read in their place.
PLAYLISTS = (b"#EXTM3U", b"ffconcat", b"[playlist]", b"v=0")
# FFmpeg's names of the formats that it may read here: of video, of pictures, and of sound, to say
# that a file holds no video. Its other readers open what a file names, on this disk or on the
# network (hls, sdp, concat, vobsub), or a numbered row of files (image2).
FORMATS = (
    *("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "avi", "mpegts", "mpeg", "mpegvideo", "flv"),
    *("asf", "ogg", "mxf", "nut", "rm", "dv", "wtv", "ivf", "obu", "av1", "h264", "hevc", "vvc"),
    *("m4v", "mjpeg", "yuv4mpegpipe", "gif", "apng", "png_pipe", "jpeg_pipe", "webp_pipe"),
    *("bmp_pipe", "tiff_pipe", "ppm_pipe", "pgm_pipe", "j2k_pipe", "mp3", "wav", "flac", "aac"),
)
# Only the file itself, whatever stands in it.
ONLY_THIS_FILE = {"format_whitelist": ",".join(FORMATS), "protocol_whitelist": "file"}
# What an mp4 or mov file is made of, at the top (ISO/IEC 14496-12; QuickTime).
BOXES = {
    *(b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"uuid", b"pnot", b"udta", b"meta"),
    *(b"moof", b"mfra", b"sidx", b"ssix", b"styp", b"prft", b"emsg", b"pdin", b"PICT", b"junk"),
}


class BadClip(Exception):
    """Why a clip cannot be used. The other clips still can."""


@dataclass(frozen=True)
class FileFacts:
    """What is known of a video file without its frames."""

    frames: int  # that a player shows
    fps: float
    seconds: float  # from the first frame to the last
    width: int  # pixels, upright, as wide as high
    height: int


@dataclass(frozen=True)
class Footage:
    """The frames that a player shows, and what must be done to each."""

    path: Path
    stream: int | None  # its number in the file; None for animated WebP
    times: list[int]  # when each frame is shown, in units of `unit`, in order
    unit: float  # seconds
    fps: float
    width: int  # of a frame as it is stored
    height: int
    pixel_aspect: float  # the width of a pixel, divided by its height
    quarter_turns: int  # to the left
    transfer: int  # the curve of the signal (ITU-T H.273, table 3)
    alpha: bool  # some parts are transparent
    interlaced: bool
    hidden: int  # frames that only help to decode others

    @property
    def stamps(self) -> list[float]:
        """The second at which each frame is shown."""
        return [time * self.unit for time in self.times]

    @property
    def upright_pixel_aspect(self) -> float:
        """Of the frames as they are returned: a quarter turn swaps width and height."""
        return 1 / self.pixel_aspect if self.quarter_turns % 2 else self.pixel_aspect

    @property
    def facts(self) -> FileFacts:
        width, height = self.width * self.pixel_aspect, self.height
        if self.quarter_turns % 2:
            width, height = height, width
        seconds = self.stamps[-1] - self.stamps[0]
        return FileFacts(len(self.times), self.fps, seconds, round(width), round(height))

    @property
    def treatment(self) -> list[str]:
        """What is done to its frames besides decoding them, for the report."""
        found = {
            f"{self.hidden} hidden frames left out": self.hidden,
            "deinterlaced": self.interlaced,
            "transparent parts over black": self.alpha,
            f"from {hdr.HDR_NAMES.get(self.transfer)} to SDR": self.transfer in hdr.SDR_OF,
            f"pixels {self.pixel_aspect:g} times as wide as high": self.pixel_aspect != 1,
            f"turned by {90 * self.quarter_turns} degrees": self.quarter_turns,
        }
        return [name for name, holds in found.items() if holds]


# -- what the file says --------------------------------------------------------------------------


def survey(path: Path) -> Footage:
    """Reads the whole file, and decodes its first frame. BadClip if it cannot be used."""
    require_file(path)
    if missing := missing_bytes(path):
        whole = missing + path.stat().st_size
        raise BadClip(f"is cut off: the last {missing} of its {whole} bytes are missing")
    if is_webp(path) and (footage := survey_webp(path)):
        return without_idle_alpha(footage)
    # A stream is gone when its file is closed.
    with opened(path) as container:
        stream = best_stream(container)
        # What the header says, before a frame of that size is made.
        require_not_huge(stream.width or 0, stream.height or 0)
        # The packets themselves are the whole file.
        found = [(p.pts, p.is_discard) for p in counted_packets(container, stream)]
        number, times = stream.index, shown_times(found)
        require_whole(container, stream, len(found), times)
    with opened(path) as container:
        stream = container.streams[number]
        first = next(decoded(container, stream), None)
        if first is None:
            raise BadClip("has no frame that can be decoded")
        require_usual_size(first.width, first.height)
        footage = Footage(
            path=path,
            stream=number,
            times=times,
            unit=float(stream.time_base),
            fps=float(stream.average_rate or 0),
            width=first.width,
            height=first.height,
            pixel_aspect=float(stream.sample_aspect_ratio or 1),
            quarter_turns=round(first.rotation / 90) % 4,
            transfer=int(stream.codec_context.color_trc),
            alpha=has_alpha(stream, first),
            interlaced=bool(first.interlaced_frame),
            hidden=sum(discarded for _, discarded in found),
        )
    return without_idle_alpha(footage)


def survey_webp(path: Path) -> Footage | None:
    """None for a picture that does not move: FFmpeg reads it."""
    try:
        width, height = webp_size(path)
        require_usual_size(width, height)
        times = webp_times(path)
    except (OSError, ValueError) as error:
        raise BadClip(f"cannot be opened as a video: {what_it_is(path, error)}") from error
    if len(times) == 1:
        return None
    return Footage(
        path=path,
        stream=None,
        times=times,
        unit=1e-3,
        fps=1000 * (len(times) - 1) / times[-1],
        width=width,
        height=height,
        pixel_aspect=1.0,
        quarter_turns=0,
        transfer=0,
        alpha=True,
        interlaced=False,
        hidden=0,
    )


def without_idle_alpha(footage: Footage) -> Footage:
    """Many files can hold transparent parts and have none: every GIF, most pictures."""
    if not footage.alpha:
        return footage
    opaque = all(
        frame.to_ndarray(format="rgba")[..., 3].min() == 255 for _, frame in shown_frames(footage)
    )
    return replace(footage, alpha=not opaque)


def require_file(path: Path) -> None:
    """BadClip if there is nothing to read, or if FFmpeg would read other files."""
    if not path.is_file():
        raise BadClip("is no file")
    with path.open("rb") as file:
        start = file.read(16)
    if not start:
        raise BadClip("is empty (0 bytes)")
    if start.startswith(PLAYLISTS):
        raise BadClip("is a list of other files, and no video")


def require_usual_size(width: int, height: int) -> None:
    if min(width, height) < FEWEST_PIXELS_OF_A_SIDE:
        least = FEWEST_PIXELS_OF_A_SIDE
        raise BadClip(f"has frames of {width}x{height}: both sides need {least} pixels or more")
    require_not_huge(width, height)


def require_not_huge(width: int, height: int) -> None:
    if width * height > MOST_PIXELS:
        raise BadClip(
            f"has frames of {width}x{height}, too large to be read: at most {MOST_PIXELS // 10**6} "
            f"million pixels. Scale it down: ffmpeg -i CLIP -vf scale=1920:-2 SMALLER.mp4"
        )


@contextlib.contextmanager
def opened(path: Path) -> Iterator[av.container.InputContainer]:
    import av

    # With PyAV's own log, a decoder's thread would wait for Python, and Python for the thread.
    av.logging.restore_default_callback()
    av.logging.set_libav_level(av.logging.PANIC)
    try:
        with av.open(f"file:{path}", options=ONLY_THIS_FILE) as container:
            yield container
    except MemoryError:
        raise
    except (av.error.FFmpegError, OSError) as error:
        raise BadClip(f"cannot be opened as a video: {what_it_is(path, error)}") from error


def what_it_is(path: Path, error: Exception) -> str:
    """What a file is that is no video, as far as its first bytes tell."""
    with path.open("rb") as file:
        start = file.read(64)
    if start.startswith(LFS_POINTER):
        return "it is a pointer of Git LFS; git lfs pull fetches the video itself"
    if start.lstrip()[:1] in (b"<", b"{"):
        return "it is a text file, perhaps an error page that was saved as a video"
    said = first_line(error).split("; last error log")[0].split(": '")[0].partition("] ")[2]
    said = said or "no format that is read here"
    return f"{path.stat().st_size} bytes, truncated or of another kind ({said})"


def best_stream(container: av.container.InputContainer) -> av.video.stream.VideoStream:
    """The largest picture that moves. The cover of a song is none."""
    import av

    cover = av.stream.Disposition.attached_pic
    found = [s for s in container.streams.video if not s.disposition & cover]
    if not found:
        what = "holds no video" + (", only a cover picture" if container.streams.video else "")
        raise BadClip(what)
    found = [stream for stream in found if stream.codec_context is not None]
    if not found:
        raise BadClip("has a codec that FFmpeg does not know")
    return max(found, key=lambda stream: (stream.width or 0) * (stream.height or 0))


def counted_packets(container, stream) -> Iterator[av.Packet]:
    """The packets with frames. BadClip if there are too many of them."""
    number = 0
    for packet in container.demux(stream):
        if not packet.size:
            continue
        number += 1
        if number > MOST_FRAMES:
            raise BadClip(f"has more than {MOST_FRAMES // 10**6} million frames: cut it into parts")
        yield packet


def shown_times(found: list[tuple[int | None, bool]]) -> list[int]:
    """When each frame is shown. found: the time of each packet, and whether it is not shown."""
    if not found:
        raise BadClip("has no frames")
    if any(time is None for time, _ in found):
        raise BadClip(
            "has frames without a time. This writes a copy with times: "
            "ffmpeg -i CLIP -c copy COPY.mkv"
        )
    # A file that was cut without encoding holds frames that only help to decode others.
    shown = sorted({time for time, discarded in found if not discarded})
    if not shown:
        raise BadClip("has no frame that a player shows")
    return shown


def require_whole(container, stream, packets: int, shown: list[int]) -> None:
    """BadClip if the frames end before the file's header says."""
    missing = stream.frames - packets
    if missing > MISSING_SECONDS * float(stream.average_rate or 1):
        raise BadClip(
            f"is cut off: its header says {stream.frames} frames, and {packets} are there"
        )
    expected = seconds_in_header(container, stream)
    there = (shown[-1] - min(shown[0], stream.start_time or 0)) * float(stream.time_base)
    if expected is None or there + MISSING_SECONDS + last_frame(stream, shown) >= expected:
        return
    raise BadClip(
        f"is cut off: its header says {expected:.1f} s, and its frames end at {there:.1f} s"
    )


def last_frame(stream, shown: list[int]) -> float:
    """How long the last frame is shown, in seconds: as long as the one before it."""
    return (shown[-1] - shown[-2]) * float(stream.time_base) if len(shown) > 1 else 0.0


def seconds_in_header(container, stream) -> float | None:
    if stream.duration:
        return float(stream.duration * stream.time_base)
    if "DURATION" in stream.metadata:
        hours, minutes, seconds = stream.metadata["DURATION"].split(":")
        ends = 3600 * int(hours) + 60 * int(minutes) + float(seconds)
        return ends - float((stream.start_time or 0) * stream.time_base)
    # A longer sound would count too.
    alone = len(container.streams) == 1 and container.duration
    return container.duration / 1e6 if alone else None


def has_alpha(stream, frame) -> bool:
    in_webm = stream.metadata.get("alpha_mode") == "1"
    return in_webm or any(component.is_alpha for component in frame.format.components)


def missing_bytes(path: Path) -> int:
    """How many bytes are missing at the end of an mp4 or mov file. 0 for other formats.

    Every box in the file gives its length. Decoders ignore a missing part and return fewer frames
    without an error.
    """
    size, place = path.stat().st_size, 0
    with path.open("rb") as file:
        while place + 8 <= size:
            file.seek(place)
            length, kind = struct.unpack(">I4s", file.read(8))
            if place == 0 and kind != b"ftyp":
                return 0
            # Something else follows the video. Players ignore it.
            if kind not in BOXES:
                return 0
            # 1: the length follows, in 8 bytes. 0: the box ends with the file.
            if length == 1:
                length = struct.unpack(">Q", file.read(8).rjust(8, b"\0"))[0]
            if length < 8:
                return 0
            place += length
    return max(0, place - size)


# -- its frames ----------------------------------------------------------------------------------


def wanted_frames(footage: Footage, wanted: set[int]) -> Iterator[tuple[int, numpy.ndarray]]:
    """The frames that are shown at these times, each with its time: [H, W, C] uint8.

    The file is read from its start, or from a key frame before the first one, to the last one.
    BadClip if one cannot be decoded.
    """
    last, missing = max(wanted), set(wanted)
    key_frame_before = start_far_in(footage, min(wanted))
    for start in (key_frame_before, None) if key_frame_before is not None else (None,):
        try:
            for time, frame in shown_frames(footage, start):
                if time in missing:
                    missing.remove(time)
                    yield time, pixels_of(frame, footage)
                if time >= last:
                    break
        # Some files cannot be entered in their middle.
        except BadClip:
            if start is None:
                raise
        if not missing:
            return
    raise BadClip(f"is damaged: {len(missing)} of its {len(wanted)} frames cannot be decoded")


def start_far_in(footage: Footage, first: int) -> int | None:
    """A time a little before `first`, if it is far from the start of the file."""
    number = bisect.bisect_left(footage.times, first) - FRAMES_BEFORE
    return footage.times[number] if number >= FAR_IN else None


def shown_frames(footage: Footage, start: int | None = None) -> Iterator[tuple[int, av.VideoFrame]]:
    """Every frame, with its time. BadClip if the file is damaged.

    With `start`: only those from the last key frame before that time, if the file's format has an
    index of them.
    """
    if footage.stream is None:
        yield from frames_of_webp(footage)
        return
    with opened(footage.path) as container:
        stream = container.streams[footage.stream]
        if start is not None and container.format.name in INDEXED:
            container.seek(start, stream=stream)
        frames = decoded(container, stream, alpha=footage.alpha)
        if footage.interlaced:
            frames = deinterlaced(frames, stream)
        for time, frame in timed(frames, footage, container):
            # A part of it is guessed, and the next frames are made of it.
            if frame.is_corrupt:
                raise BadClip(f"is damaged: the frame at {time * footage.unit:.2f} s is not whole")
            yield time, frame


def frames_of_webp(footage: Footage) -> Iterator[tuple[int, av.VideoFrame]]:
    import av

    try:
        for time, pixels in zip(footage.times, webp_frames(footage.path), strict=True):
            yield time, av.VideoFrame.from_ndarray(pixels, format="rgba")
    except (OSError, ValueError) as error:
        raise BadClip("stops while its frames are decoded: truncated or damaged") from error


def timed(
    frames: Iterator[av.VideoFrame], footage: Footage, container
) -> Iterator[tuple[int, av.VideoFrame]]:
    """Each frame with its time."""
    if container.format.name == "avi":
        # It numbers frames as they are stored. The decoder brings them into the order of showing.
        yield from zip(footage.times, frames, strict=False)
        return
    for frame in frames:
        if frame.pts is not None:
            yield round(float(frame.pts * frame.time_base) / footage.unit), frame


def decoded(container, stream, *, alpha: bool = False) -> Iterator[av.VideoFrame]:
    """Every frame that a player shows. BadClip if the file is damaged."""
    import av

    try:
        if alpha and stream.codec_context.name in ("vp8", "vp9"):
            yield from decoded_with_alpha(container, stream)
        else:
            yield from container.decode(stream)
    except MemoryError:
        raise
    except av.error.FFmpegError as error:
        raise BadClip("stops while its frames are decoded: truncated or damaged") from error


def decoded_with_alpha(container, stream) -> Iterator[av.VideoFrame]:
    """FFmpeg's own decoders of VP8 and VP9 leave out the transparency."""
    import av

    name = {"vp8": "libvpx", "vp9": "libvpx-vp9"}[stream.codec_context.name]
    decoder = av.CodecContext.create(name, "r")
    for packet in container.demux(stream):
        yield from decoder.decode(packet)


def deinterlaced(frames: Iterator[av.VideoFrame], stream) -> Iterator[av.VideoFrame]:
    """One frame for each, by FFmpeg's filter bwdif."""
    import av

    graph = av.filter.Graph()
    source, sink = graph.add_buffer(template=stream), graph.add("buffersink")
    filtered = graph.add("bwdif", "mode=send_frame")
    source.link_to(filtered)
    filtered.link_to(sink)
    graph.configure()
    for frame in itertools.chain(frames, [None]):
        graph.push(frame)
        while True:
            try:
                yield graph.pull()
            except (av.error.BlockingIOError, av.error.EOFError):
                break


def pixels_of(frame: av.VideoFrame, footage: Footage) -> numpy.ndarray:
    """[H, W, C] uint8, upright."""
    if footage.transfer in hdr.SDR_OF:
        pixels = hdr.sdr_bytes(frame.to_ndarray(format="rgb48le"), footage.transfer)
    elif footage.alpha:
        rgba = frame.to_ndarray(format="rgba").astype(numpy.float32)
        pixels = BACKGROUND + (rgba[..., :3] - BACKGROUND) * rgba[..., 3:] / 255
        pixels = pixels.round().astype(numpy.uint8)
    else:
        pixels = frame.to_ndarray(format="rgb24")
    return numpy.rot90(pixels, footage.quarter_turns)
