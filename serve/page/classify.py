"""The tab Classify: what the linear heads say of a picture."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import gradio as gr

from serve.classify import Head
from serve.errors import SimclrError
from serve.page.cards import message
from serve.page.desk import Desk, Query, complaint
from serve.page.widgets import QUIET, listen, query_widgets
from serve.preprocess import ImageError

TOP_CLASSES = 5


def classify(desk: Desk, heads: Mapping[str, Head], query: Query, name: str) -> tuple[dict[str, float] | None, str]:
    """Class -> probability by the head of that name, and a message."""
    if query is None:
        return None, message("Give a picture, or click an example.")
    try:
        vectors_1D = desk.vectors([query])
    except (SimclrError, ImageError) as error:
        return None, complaint(error, query)
    head = heads[name]
    (chances_C,) = head.probabilities(vectors_1D)
    unsure = f": uncertain, no class reaches {head.abstain_below:.3g}" if head.decide(chances_C) is None else ""
    return dict(zip(head.classes, chances_C.tolist(), strict=True)), message(f"Classes of {desk.name(query)}{unsure}")


def classify_tab(desk: Desk, heads: Mapping[str, Head]) -> None:
    """The widgets."""
    names = list(heads)
    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            query = query_widgets(desk, "Picture to classify", desk.examples())
            chosen = gr.Dropdown(names, value=names[0], label="Head", visible=len(names) > 1)
        with gr.Column(scale=3, min_width=300):
            said = gr.HTML(message("Give a picture, or click an example."))
            answer = gr.Label(label="Most likely classes", num_top_classes=TOP_CLASSES)
            rule = gr.HTML(_accuracy(heads[names[0]]))
    listen([query.change, chosen.input], partial(classify, desk, heads), [query, chosen], [answer, said])
    chosen.input(lambda name: _accuracy(heads[name]), chosen, rule, **QUIET)


def _accuracy(head: Head) -> str:
    """How good the head was where that was measured: on a test set, else on what was held back from the fit."""
    for name, pictures in (("test_accuracy", "of its test set"), ("held_back_accuracy", "held back while it was fitted")):
        if (accuracy := head.report.get(name)) is not None:
            return f'<p class="sc-rule">Of the labelled pictures {pictures}, this head named {accuracy:.1%} correctly.</p>'
    return ""
