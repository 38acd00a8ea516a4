"""What the command line may be asked for; light, so that `--help` answers at once."""

from __future__ import annotations

from typing import Literal, TypeAlias

ProtocolName: TypeAlias = Literal[
    "market",
    "duke",
    "msmt17",
    "cuhk03",
    "cuhk03-classic",
    "veri",
    "vehicleid",
    "mars",
    "sysu30k",
    "cross-camera",
    "single-camera",
]
Flip: TypeAlias = Literal["none", "sum", "sysu-official"]
