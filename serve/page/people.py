"""Everybody enrolled: find somebody, look at the pictures, rename, merge, split off, forget."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeAlias

import gradio as gr

from serve.errors import GalleryError, SimclrError
from serve.filters import Condition
from serve.identity.identities import forget, merge, rename, split
from serve.identity.people import LOOKED_AT, Person, names, person
from serve.page.cards import cards, grid, message, text, thumbnail
from serve.page.desk import Desk, complaint
from serve.page.widgets import Choices, act, listen

MAX_LISTED, MAX_PICTURES = 40, 60
NOBODY_CHOSEN = "Choose somebody on the left: the pictures appear here, and what can be done."
FOLDERLESS = "This gallery is in Milvus: identities are renamed, merged, split and forgotten in galleries that are in folders."
FORGET_RULE = (
    "Removes the identity and everything of it from all files of the gallery, for good; takes as long as building the index. "
    "Pictures outside the gallery's folder stay where they are."
)
_CHOOSE_JS = """element.addEventListener('click', event => {
  const row = event.target.closest('[data-name]');
  if (row) trigger('click', {name: row.dataset.name});
})"""
_MARK_JS = """element.addEventListener('click', event => {
  const card = event.target.closest('[data-id]');
  if (card) card.setAttribute('aria-pressed', card.classList.toggle('sc-marked'));
})"""
_MARKED_JS = """(chosen, marked, ...rest) =>
  [chosen, [...document.querySelectorAll('.sc-marked')].map(card => Number(card.dataset.id)), ...rest]"""
"""Read when it is asked for: told card by card, the last click might arrive after the order to split."""

Answer: TypeAlias = tuple[str, str | None, int]
"""What to say, who is chosen now, and the number of changes."""


def listing(desk: Desk, part: str | None, chosen: str | None) -> str:
    """Those whose names contain `part`, as rows to choose from."""
    try:
        found = names(desk.gallery, (part or "").strip())
        shown = [person(desk.gallery, name) for name in found[:MAX_LISTED]]
    except SimclrError as error:  # also if somebody was renamed in this very moment
        return complaint(error)
    if not found:
        return message("Nobody is called so." if part else "Nobody is enrolled yet: that is done under Identify.")
    rest = "" if len(found) == len(shown) else f" The first {len(shown)} are listed: type a part of the name."
    rows = "".join(_row(one, chosen) for one in shown)
    return f'<p class="sc-rule">{len(found):,} identities.{rest}</p><div class="sc-people">{rows}</div>'


def _row(one: Person, chosen: str | None) -> str:
    current = ' aria-current="true"' if one.identity == chosen else ""
    return (
        f'<button type="button" class="sc-person" data-name="{text(one.identity)}"{current}>'
        f"{thumbnail(one.example.source)}<span><b>{text(one.identity)}</b> {_facts(one)}</span></button>"
    )


def _facts(one: Person) -> str:
    more = " and more" if one.pictures > LOOKED_AT else ""
    cameras = f" · camera {text(', '.join(one.cameras))}{more}" if one.cameras else ""
    return f"<i>{one.pictures:,} picture{'s' if one.pictures > 1 else ''}{cameras}</i>"


def portrait(desk: Desk, chosen: str | None) -> tuple[str, str]:
    """Who is chosen, and the pictures."""
    if chosen is None:
        return message(NOBODY_CHOSEN), ""
    try:
        one = person(desk.gallery, chosen)
        items = desk.gallery.items(Condition("identity", "=", (chosen,)), limit=MAX_PICTURES)
    except SimclrError as error:
        return complaint(error), ""
    rest = "" if one.pictures <= MAX_PICTURES else f"; the first {MAX_PICTURES} are shown"
    title = f'<p class="sc-verdict"><b>{text(chosen)}</b> <span>{_facts(one)}{rest}</span></p>'
    return title, grid(cards(items, hint="Click to mark it"))


def _act(change: Callable[[], tuple[str, str | None]], chosen: str | None, changes: int) -> Answer:
    try:
        said, now = change()
    except (SimclrError, OSError) as error:
        return complaint(error), chosen, changes
    return message(said), now, changes + 1


def rename_chosen(desk: Desk, chosen: str, new: str, changes: int) -> Answer:
    """Another name."""

    def change() -> tuple[str, str]:
        count = rename(desk.gallery, chosen, new.strip())
        return f"{count} pictures of <b>{text(chosen)}</b> are <b>{text(new.strip())}</b> now.", new.strip()

    return _act(change, chosen, changes)


def merge_chosen(desk: Desk, chosen: str, into: str | None, changes: int) -> Answer:
    """One identity of two."""

    def change() -> tuple[str, str]:
        if not into:
            raise GalleryError("whom to merge into? choose the other identity")
        person(desk.gallery, into)  # raises if nobody is called so: another name is for Rename
        count = merge(desk.gallery, [chosen], into)
        return f"{count} pictures of <b>{text(chosen)}</b> are <b>{text(into)}</b> now.", into

    return _act(change, chosen, changes)


def split_chosen(desk: Desk, chosen: str, marked: Sequence[int], into: str, changes: int) -> Answer:
    """A new identity of the marked pictures."""

    def change() -> tuple[str, str]:
        if not marked:
            raise GalleryError("no picture is marked; click on those to split off")
        count = split(desk.gallery, chosen, marked, into.strip())
        return f"{count} pictures of <b>{text(chosen)}</b> are <b>{text(into.strip())}</b> now.", chosen

    return _act(change, chosen, changes)


def forget_chosen(desk: Desk, chosen: str, typed: str, changes: int) -> Answer:
    """Erase an identity whose name was typed."""

    def change() -> tuple[str, None]:
        if typed.strip() != chosen.strip():
            raise GalleryError(f"to forget {chosen}, type this name; nothing was changed")
        return f"{forget(desk.gallery, chosen)} pictures are forgotten.", None

    return _act(change, chosen, changes)


def people_tab(desk: Desk, choices: Choices, changes: gr.State, chosen: gr.State, tab: gr.Tab) -> None:
    """The widgets of a tab, whose list is made anew when it is selected."""
    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            part = gr.Textbox(label="Find", placeholder="part of a name", lines=1)
            rows = gr.HTML(js_on_load=_CHOOSE_JS, apply_default_css=False)
        with gr.Column(scale=3, min_width=300):
            said = gr.HTML()
            title = gr.HTML(message(NOBODY_CHOSEN))
            with gr.Column(visible=False) as actions:
                if desk.folder is None:
                    gr.HTML(message(FOLDERLESS, "notice"))
                else:
                    _action_widgets(desk, choices, chosen, changes, said)
            pictures = gr.HTML(js_on_load=_MARK_JS, apply_default_css=False)
    listen([part.change, tab.select, chosen.change, changes.change], partial(listing, desk), [part, chosen], rows)
    listen([tab.select, chosen.change, changes.change], partial(portrait, desk), chosen, [title, pictures])
    listen([chosen.change], lambda who: gr.Column(visible=who is not None), chosen, actions)
    listen([rows.click], _name_of, None, [chosen, said])


def _name_of(event: gr.EventData) -> tuple[str, str]:
    return str(event.name), ""


def _action_widgets(desk: Desk, choices: Choices, chosen: gr.State, changes: gr.State, said: gr.HTML) -> None:
    outputs = [said, chosen, changes]
    with gr.Accordion("Rename", open=False):
        new = gr.Textbox(label="New name, which nobody has", submit_btn="Rename")
    with gr.Accordion("Merge into another", open=False):
        into = choices.box("identity", label="The other identity, whose name stays", always=True)
        merge_it = gr.Button("Merge")
    with gr.Accordion("Split off some pictures", open=False):
        apart = gr.Textbox(
            label="New name for the marked pictures", info="click on pictures below to mark them", submit_btn="Split off"
        )
        marked = gr.JSON(visible=False)
    with gr.Accordion("Forget", open=False):
        gr.HTML(f'<p class="sc-rule">{FORGET_RULE}</p>')
        typed = gr.Textbox(label="Type the name to confirm")
        forget_it = gr.Button("Forget for good", variant="stop")
    act(new.submit, partial(rename_chosen, desk), [chosen, new, changes], outputs)
    act(merge_it.click, partial(merge_chosen, desk), [chosen, into, changes], outputs)
    act(apart.submit, partial(split_chosen, desk), [chosen, marked, apart, changes], outputs, js=_MARKED_JS)
    act(forget_it.click, partial(forget_chosen, desk), [chosen, typed, changes], outputs)
    listen([changes.change, chosen.change], lambda: ("", None, "", ""), None, [new, into, apart, typed])
