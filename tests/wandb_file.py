"""What wandb has written into a run's folder, read from its own file."""

import json
import struct
from pathlib import Path

BLOCK = 32768  # bytes of LevelDB's log format, after 7 bytes of wandb's own
WHOLE, LAST = 1, 4  # kinds of a part


def records(folder: Path) -> list:
    """Every record of the folder's only wandb run."""
    from wandb.proto.wandb_internal_pb2 import Record

    [path] = folder.glob("wandb/*run-*/*.wandb")
    content, place, found, parts = path.read_bytes(), 7, [], b""
    while place + 7 <= len(content):
        if (left := BLOCK - place % BLOCK) < 7:
            place += left
            continue
        _, length, kind = struct.unpack("<IHB", content[place : place + 7])
        parts += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (WHOLE, LAST):
            found.append(Record.FromString(parts))
            parts = b""
    return found


def histories(folder: Path) -> list[dict]:
    """Every line of the run's history: names and values."""
    lines = [each.history.item for each in records(folder) if each.HasField("history")]
    return [
        {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in line}
        for line in lines
    ]
