"""How much the gateway takes on. Standard library only: the command line shows these defaults."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Bounds of the gateway's work, memory and time. Raises: ValueError."""

    at_once: int = 16
    """Requests inside: decoded, sent to the encoder, answered."""
    waiting: int = 32
    """Requests beside those that read their body or stand in line; one more is refused at once."""
    batches: int = 2
    """Batches at the encoder together; two for each of its servers, so that the next is there when one is done."""
    wait_s: float = 5.0
    """Longest stand in line."""
    upload_s: float = 30.0
    """Longest upload of a body."""
    answer_s: float = 30.0
    """Longest stay inside, from the first step to the last byte of the answer."""
    max_bytes: int = 16 * 2**20
    """Largest body. In memory are at most at_once + waiting of them."""
    max_pictures: int = 64
    """Most pictures of one request."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 0 or (value == 0 and name != "waiting"):
                raise ValueError(f"{name} is {value}, wanted more than 0")
