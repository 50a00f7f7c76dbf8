"""HDR video as the SDR picture that a viewer of ordinary video would see.

C is 3 (R, G, B). Signals and light are floats; 1.0 is the highest code value of a signal, and
diffuse white (a white sheet of paper) of light. Highlights that are brighter become white.

Sources: ITU-R BT.2100 (the curves HLG and PQ), BT.2087 (from BT.2020 to BT.709 colours), BT.2408
(diffuse white is 75 % of the HLG signal, and 203 cd/m2 of PQ), BT.709 and BT.1886 (SDR's curves).
"""

from __future__ import annotations

import numpy

HLG_A, HLG_B, HLG_C = 0.17883277, 0.28466892, 0.55991073
HLG_WHITE = 0.75
PQ_M1, PQ_M2 = 2610 / 16384, 2523 / 32
PQ_C1, PQ_C2, PQ_C3 = 3424 / 4096, 2413 / 128, 2392 / 128
PQ_PEAK, PQ_WHITE = 10_000, 203  # cd/m2
BT2020_TO_BT709 = numpy.array(
    [[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]],
    dtype=numpy.float32,
)


def hlg_light(signal: numpy.ndarray) -> numpy.ndarray:
    """The light in the scene."""
    dark = signal**2 / 3
    return numpy.where(signal <= 0.5, dark, (numpy.exp((signal - HLG_C) / HLG_A) + HLG_B) / 12)


def pq_light(signal: numpy.ndarray) -> numpy.ndarray:
    """The light of the display."""
    root = signal ** (1 / PQ_M2)
    light = numpy.maximum(root - PQ_C1, 0) / (PQ_C2 - PQ_C3 * root)
    return light ** (1 / PQ_M1) * PQ_PEAK / PQ_WHITE


def camera_signal(light: numpy.ndarray) -> numpy.ndarray:
    """BT.709: from the light in the scene to the signal."""
    return numpy.where(light < 0.018, 4.5 * light, 1.099 * light**0.45 - 0.099)


def display_signal(light: numpy.ndarray) -> numpy.ndarray:
    """BT.1886: from the light of the display to the signal."""
    return light ** (1 / 2.4)


def sdr_of_hlg(signal: numpy.ndarray) -> numpy.ndarray:
    """[..., C] to [..., C]."""
    light = hlg_light(signal) / hlg_light(numpy.float32(HLG_WHITE))
    return camera_signal((light @ BT2020_TO_BT709.T).clip(0, 1))


def sdr_of_pq(signal: numpy.ndarray) -> numpy.ndarray:
    """[..., C] to [..., C]."""
    return display_signal((pq_light(signal) @ BT2020_TO_BT709.T).clip(0, 1))


# By the transfer characteristic that the file names (ITU-T H.273, table 3).
SDR_OF = {16: sdr_of_pq, 18: sdr_of_hlg}
HDR_NAMES = {16: "HDR10 (PQ)", 18: "HDR (HLG)"}


def sdr_bytes(codes: numpy.ndarray, transfer: int) -> numpy.ndarray:
    """[H, W, C] uint16 -> [H, W, C] uint8."""
    signal = codes.astype(numpy.float32) / 65535
    return (SDR_OF[transfer](signal) * 255).round().clip(0, 255).astype(numpy.uint8)
