"""How much the gateway takes on. Standard library only: the command line shows these defaults."""

from __future__ import annotations

from dataclasses import dataclass

MAX_HITS = 1000
"""Most hits of one answer, and most items of one page."""
MAX_OFFSET = 10_000
"""Most hits to skip: an index finds those that are skipped as well."""
MAX_ROWS = 2**31
"""Most items to skip in a list, where they cost little."""
MAX_ID = 2**63 - 1
"""Ids are SQLite's."""
MAX_TEXT, MAX_URL = 1000, 2000
"""Characters of a label, an identity, a camera or a source; of an address."""
MAX_JSON_BYTES = 2**20
"""Largest JSON body: a vector of 40,000 numbers."""
MAY_BE_NONE = ("waiting", "rate_per_s")


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
    fetch_s: float = 10.0
    """Longest wait for a picture that is named by its URL."""
    answer_s: float = 30.0
    """Longest stay inside, from the first step to the last byte of the answer."""
    max_bytes: int = 16 * 2**20
    """Largest body, and largest picture that is fetched. In memory are at most at_once + waiting of them."""
    max_pictures: int = 64
    """Most pictures of one request."""
    rate_per_s: float = 0.0
    """Requests per second of one key, or of one address where there are no keys; 0: as many as find a place."""
    burst: int = 20
    """Requests that may come together before that rate counts."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not 0 <= value < float("inf") or (value == 0 and name not in MAY_BE_NONE):
                raise ValueError(f"{name} is {value}, wanted more than 0")
