"""The widgets that several tabs have: the query, cards that can be clicked, drop-downs of what the gallery holds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import gradio as gr
from gradio.blocks import BlockContext
from gradio.components import Component
from gradio.data_classes import ImageData
from gradio.events import Dependency

from serve.filters import FIELDS
from serve.gallery import Gallery
from serve.item import Item
from serve.page.cards import cards
from serve.page.desk import Desk

MAX_HITS, MAX_CHOICES = 60, 1000
CONDITION_HINT = (
    f"fields: {', '.join(FIELDS)}; compare with = != < <= > >=, in (a, b), between 1 and 2, is known, is unknown; "
    "join with and, or, not, ( )"
)
QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
_PICK_JS = """element.addEventListener('click', event => {
  const card = event.target.closest('[data-id]');
  if (card) trigger('click', {id: Number(card.dataset.id)});
})"""
Widgets: TypeAlias = Component | Sequence[Component | BlockContext] | None


def query_widgets(desk: Desk, label: str, examples: Sequence[Item]) -> gr.State:
    """Upload, paste and examples; returns the state that holds the query."""
    query = gr.State(None)
    picture = gr.Image(
        label=label, type="filepath", sources=["upload", "clipboard"], height=230, buttons=[], elem_classes="sc-query",
        placeholder="Drop or paste a picture\nor click to choose one",
    )  # fmt: skip
    # Gradio would decode the upload here, and crash on a broken one: serve.preprocess shall, or say what is wrong. Replaced on
    # the object because Gradio writes a .pyi file next to every module that subclasses a component.
    picture.preprocess = _upload_path  # type: ignore[method-assign]
    if examples:
        strip = "".join(cards(examples))
        pickable(f'<p class="sc-rule">or start with one of these</p><div class="sc-strip">{strip}</div>', query)
    listen([picture.upload], lambda path: path, picture, query)
    listen([picture.clear], lambda: None, None, query)
    listen([query.change], desk.preview, query, picture)
    return query


def _upload_path(payload: ImageData | None) -> str | None:
    return None if payload is None else payload.path


def pickable(value: str, query: gr.State) -> gr.HTML:
    """HTML whose cards become the query when they are clicked."""
    html = clickable(value)
    listen([html.click], picked, None, query)
    return html


def clickable(value: str) -> gr.HTML:
    """HTML whose cards tell their item when they are clicked."""
    return gr.HTML(value, js_on_load=_PICK_JS, apply_default_css=False)


def picked(event: gr.EventData) -> int:
    """The item whose card was clicked."""
    return int(event.id)


def listen(triggers: Sequence[Any], callback: Callable[..., Any], inputs: Widgets, outputs: Widgets) -> Dependency:
    """On any of these events, put what the callback makes of the inputs into the outputs; of several meanwhile, on the last."""
    listener: Dependency = gr.on(triggers, callback, inputs, outputs, trigger_mode="always_last", **QUIET)
    return listener


def act(
    trigger: Any,  # noqa: ANN401
    callback: Callable[..., Any],
    inputs: Widgets,
    outputs: Widgets,
    js: str | None = None,
) -> None:
    """Do what changes the gallery; a second click meanwhile does nothing. `js` may fill in the inputs."""
    gr.on([trigger], callback, inputs, outputs, js=js, trigger_mode="once", api_visibility="private", show_progress="minimal")


def count_slider() -> gr.Slider:
    """How many results."""
    return gr.Slider(1, MAX_HITS, value=12, step=1, label="How many results")


def condition_box() -> gr.Textbox:
    """Which items count, in the language of filters."""
    return gr.Textbox(
        label="Condition", info=CONDITION_HINT, lines=1, placeholder="camera != 2 and time >= 100", submit_btn="Apply"
    )


class Choices:
    """Drop-downs of the values that a gallery has, hidden where it has none; others can be typed.

    What is built once serves many visits, meanwhile the gallery changes: `fresh` fills all of them anew.
    """

    def __init__(self, gallery: Gallery) -> None:
        self._gallery = gallery
        self._fields: list[str] = []
        self.boxes: list[gr.Dropdown] = []

    def box(
        self, field: str, *, label: str | None = None, multiselect: bool = False, always: bool = False, min_width: int = 160
    ) -> gr.Dropdown:
        """One more; with `always`, shown even if there are no values yet."""
        values = self._gallery.distinct(field)
        box = gr.Dropdown(
            values[:MAX_CHOICES], value=[] if multiselect else None, multiselect=multiselect, allow_custom_value=True,
            label=label or field.capitalize(), visible=always or bool(values), min_width=min_width,
        )  # fmt: skip
        self._fields.append(field)
        self.boxes.append(box)
        return box

    def fresh(self) -> list[dict[str, Any]]:
        """An update for each of `boxes`."""
        values = {field: self._gallery.distinct(field) for field in set(self._fields)}
        return [_refilled(values[field]) for field in self._fields]


def _refilled(values: Sequence[str]) -> dict[str, Any]:
    shown: dict[str, Any] = {"visible": True} if values else {}
    return gr.update(choices=[*values[:MAX_CHOICES]], **shown)
