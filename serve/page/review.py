"""What to look at: identities that are easily confused, and pictures that find their own identity worst."""

from __future__ import annotations

from functools import partial
from typing import Any

import gradio as gr

from serve.errors import SimclrError
from serve.identity.confusable import ConfusablePair, confusable_pairs
from serve.identity.enrolled import Enrolled
from serve.identity.hardest import hardest_queries
from serve.page.cards import cards, headline, message, text
from serve.page.desk import Desk, complaint
from serve.page.reid import REID_RULE, rank_list
from serve.page.widgets import clickable, listen, pickable, picked

SHOWN, RANKED = 12, 24
PAIRS_RULE = (
    "Pictures of two identities that are most alike. The same one twice? Click on a picture, and merge its identity into the "
    "other. A picture with the wrong name? Split it off. Two who look alike: leave them; a threshold has to live with them."
)
WORST_RULE = (
    "Each picture asks for its own identity in the other cameras; those that find it worst come first, with their average "
    "precision (AP). Click on one: its rank list says whether the name is wrong, the crop is bad, or the encoder fails."
)


def pairs(desk: Desk) -> str:
    """The most similar pictures of two identities, side by side."""
    try:
        found = confusable_pairs(Enrolled.of(desk.gallery), SHOWN)
    except SimclrError as error:
        return complaint(error)
    if not found:
        return message("Nothing to confuse: fewer than two identities are enrolled.")
    items = [item for pair in found for item in (pair.first, pair.second)]
    both = cards(items, ["" for _ in items], hint="Click to open its identity under Everybody")
    shown = [_pair(pair, both[2 * i] + both[2 * i + 1]) for i, pair in enumerate(found)]
    return f'<div class="sc-pairs">{"".join(shown)}</div>'


def _pair(pair: ConfusablePair, both: str) -> str:
    names = f"<b>{text(pair.first.identity)}</b> and <b>{text(pair.second.identity)}</b>"
    score = f'<span class="sc-score">{pair.second.score:.3f}</span>'
    return f'<figure class="sc-pair"><figcaption><span>{names}</span>{score}</figcaption>{both}</figure>'


def worst(desk: Desk) -> tuple[str, int | None]:
    """The worst queries as cards, and the worst of all."""
    try:
        hardest = hardest_queries(Enrolled.of(desk.gallery), SHOWN)
    except SimclrError as error:
        return complaint(error), None
    if not hardest.queries:
        return message("Nothing to ask: no identity has been seen by two cameras."), None
    title = f"{hardest.asked:,} asked: mAP {hardest.mean_average_precision:.1%}, rank-1 {hardest.rank1:.1%}; the worst first"
    heads = [headline("AP", f"{query.average_precision:.1%}") for query in hardest.queries]
    some = "".join(cards([query.item for query in hardest.queries], heads, hint="Click to see its rank list"))
    return f'{message(title)}<div class="sc-grid sc-narrow">{some}</div>', hardest.queries[0].item.id


def ranked(desk: Desk, query: int | None) -> str:
    """The rank list of one of the gallery's pictures."""
    if query is None:
        return ""
    try:
        item = desk.gallery.item(query)
    except SimclrError as error:
        return complaint(error)
    return rank_list(desk, query, RANKED, item.identity, item.camera, False)


def review_tab(desk: Desk, chosen: gr.State, tabs: gr.Tabs, everybody: str) -> None:
    """The widgets; a click on a picture of a pair chooses its identity and selects the tab `everybody`."""
    query = gr.State(None)

    def open_identity(event: gr.EventData) -> tuple[Any, Any]:
        try:
            return desk.gallery.item(picked(event)).identity, gr.Tabs(selected=everybody)
        except SimclrError as error:  # removed since it was shown
            complaint(error)
            return gr.skip(), gr.skip()

    with gr.Accordion("Confusable pairs"):
        gr.HTML(f'<p class="sc-rule">{PAIRS_RULE}</p>')
        find_pairs = gr.Button("Find confusable pairs")
        alike = clickable("")
    with gr.Accordion("Worst queries first"):
        gr.HTML(f'<p class="sc-rule">{WORST_RULE}</p>')
        find_worst = gr.Button("Find the worst queries")
        with gr.Row():
            with gr.Column(scale=1, min_width=280):
                hard = pickable("", query)
            with gr.Column(scale=2, min_width=300):
                gr.HTML(f'<p class="sc-rule">{REID_RULE}</p>')
                answer = gr.HTML(apply_default_css=False)
    visible: dict[str, Any] = {"show_progress": "full", "api_visibility": "private"}
    find_pairs.click(partial(pairs, desk), None, alike, **visible)
    find_worst.click(partial(worst, desk), None, [hard, query], **visible)
    listen([query.change], partial(ranked, desk), query, answer)
    listen([alike.click], open_identity, None, [chosen, tabs])
