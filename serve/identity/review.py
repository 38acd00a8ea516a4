"""What a person should look at in a gallery of identities, as text, and what to do about it."""

from __future__ import annotations

from collections.abc import Sequence

from serve.identity.confusable import ConfusablePair
from serve.identity.hardest import Hardest
from serve.item import Item


def review_lines(gallery: str, pairs: Sequence[ConfusablePair], hardest: Hardest) -> list[str]:
    """Both lists, each followed by what to do."""
    return [*_pair_lines(gallery, pairs), *_query_lines(gallery, hardest)]


def _pair_lines(gallery: str, pairs: Sequence[ConfusablePair]) -> list[str]:
    if not pairs:
        return [f"{gallery}: fewer than two identities are enrolled, so none can be confused"]
    return [
        f"{gallery}: identities that look most alike, by their two most similar pictures",
        *(f"  {pair.second.score:.4f}  {_named(pair.first)}  ~  {_named(pair.second)}" for pair in pairs),
        f"One and the same: simclr reid merge {gallery} ONE OTHER --into ONE",
        f"A picture with the wrong name: simclr gallery relabel {gallery} --ids ID --identity RIGHT",
    ]


def _query_lines(gallery: str, hardest: Hardest) -> list[str]:
    if not hardest.queries:
        return [f"{gallery}: no identity has two pictures, of different cameras or of unknown ones, so none can be asked for"]
    return [
        f"{gallery}: pictures that find the others of their identity worst; of {hardest.asked:,} asked: "
        f"mAP {hardest.mean_average_precision:.1%}, rank-1 {hardest.rank1:.1%}",
        *(
            f"  AP {query.average_precision:6.1%}  first right {query.first_right:6,}  {_named(query.item)}"
            for query in hardest.queries
        ),
        f"Two under one name: simclr reid split {gallery} NAME --ids ID ... --into NEW",
        f"A picture of nobody, or unusable: simclr gallery remove {gallery} ID",
    ]


def _named(item: Item) -> str:
    camera = "" if item.camera is None else f" camera={item.camera}"
    return f"{item.identity}{camera} #{item.id} {item.source}"
