"""The tab Search: the pictures most similar to one, among those that pass a filter."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial

import gradio as gr

from serve.errors import SimclrError
from serve.filters import And, Condition, Where, parse_where
from serve.page.cards import message, result
from serve.page.desk import Desk, Query, complaint, itself
from serve.page.widgets import Choices, condition_box, count_slider, listen, pickable, query_widgets
from serve.preprocess import ImageError

FILTER_FIELDS = ("label", "identity", "camera")
SEARCH_HINT = "Drop a picture on the left, paste one, or click an example: the most similar pictures appear here."


def search(desk: Desk, query: Query, k: int, expression: str | None = None, *chosen: Sequence[str]) -> str:
    """Result cards for a query; `chosen` holds the values ticked per field of FILTER_FIELDS."""
    if query is None:
        return message(SEARCH_HINT)
    try:
        where = _where(expression, chosen)
        hits = desk.gallery.search(desk.asked(query), int(k), where, itself(query))
    except (SimclrError, ImageError) as error:
        return complaint(error, query)
    return result(f"The {len(hits)} pictures most similar to {desk.name(query)}; score = cosine", hits)


def _where(expression: str | None, chosen: Iterable[Sequence[str]]) -> Where:
    ticked = [Condition(field, "in", tuple(values)) for field, values in zip(FILTER_FIELDS, chosen, strict=False) if values]
    return And((*ticked, parse_where(expression or "")))


def search_tab(desk: Desk, choices: Choices) -> None:
    """The widgets."""
    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            query = query_widgets(desk, "Picture to search with", desk.examples())
            with gr.Accordion("Options: how many, which ones", open=False):
                k = count_slider()
                ticked = [choices.box(field, multiselect=True) for field in FILTER_FIELDS]
                expression = condition_box()
        with gr.Column(scale=3, min_width=300):
            results = pickable(message(SEARCH_HINT), query)
    triggers = [query.change, k.release, expression.submit, *(box.change for box in ticked)]
    listen(triggers, partial(search, desk), [query, k, expression, *ticked], results)
