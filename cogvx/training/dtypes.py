"""Which weights are stored and trained in which precision."""

from __future__ import annotations

from collections import Counter

import torch


def count_dtypes(
    transformer: torch.nn.Module, arithmetic: torch.dtype
) -> dict[str, dict[str, int] | str]:
    """The number of frozen and trained weights by dtype. TypeError unless fp32 is trained."""
    counts = {"trained": Counter(), "frozen": Counter()}
    for parameter in transformer.parameters():
        kind = "trained" if parameter.requires_grad else "frozen"
        counts[kind][short_name(parameter.dtype)] += parameter.numel()
    if set(counts["trained"]) != {"float32"}:
        raise TypeError(
            f"trained weights are {dict(counts['trained'])}; small updates survive in float32 only"
        )
    numbers = {kind: dict(count) for kind, count in counts.items()}
    return numbers | {"arithmetic": short_name(arithmetic), "objective": "float32"}


def dtypes_line(dtypes: dict) -> str:
    """`dtypes`: from count_dtypes()."""
    trained, frozen = (
        " + ".join(f"{count / 1e6:.2f} M {dtype}" for dtype, count in dtypes[kind].items())
        for kind in ("trained", "frozen")
    )
    return (
        f"types   trained {trained}, frozen {frozen or 'none'}; "
        f"arithmetic {dtypes['arithmetic']}; noise, objective and optimizer float32"
    )


def short_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
