"""Who is it? The decision about a probe, and enrolling it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import gradio as gr

from serve.errors import SimclrError
from serve.filters import parse_where
from serve.identity.calibration import Calibration
from serve.identity.decision import Decision
from serve.identity.enrolment import enrol_item, enrol_upload
from serve.identity.identify import identify, outgrown
from serve.page.cards import cards, grid, message, text
from serve.page.desk import Desk, Query, complaint, itself
from serve.page.widgets import Choices, act, condition_box, listen, pickable, query_widgets
from serve.preprocess import ImageError
from serve.samples import stated_sample
from serve.sources import read_bytes

CANDIDATES = 6
IDENTIFY_HINT = "Give a probe on the left, or click an example: who it is appears here."
UNDECIDED = (
    "no threshold was given. Choose one, <code>simclr reid calibrate GALLERY --probes SRC --fpir 0.01 --out FILE</code>, "
    "and open the page with it: <code>simclr app --threshold-file FILE</code>"
)
NO_PLACE = (
    "This gallery is in Milvus, which keeps no pictures, and an upload does not last: enrol it from where it stays, "
    "<code>simclr reid enrol GALLERY --images SRC --identity NAME</code>"
)


def decide(
    desk: Desk, calibration: Calibration | None, query: Query, more: Sequence[str] | None, expression: str | None
) -> str:
    """The verdict on a probe, of one picture or a track, and the best picture of each candidate."""
    probe = _pictures(query, more)
    if not probe:
        return message(IDENTIFY_HINT)
    try:
        vectors_ND = desk.vectors(probe)
        own = [item_id for picture in probe for item_id in itself(picture)]
        where = parse_where(expression or "")
        decision = identify(desk.gallery, vectors_ND, calibration, where=where, exclude_ids=own, k=CANDIDATES)
        warning = None if calibration is None else outgrown(desk.gallery, calibration)
    except (SimclrError, ImageError) as error:
        return complaint(error, *probe)
    noticed = "" if warning is None else message(text(warning), "notice")
    ranked = '<p class="sc-rule">The best picture of each; score = cosine</p>' if decision.candidates else ""
    return f"{verdict(decision)}{noticed}{ranked}{grid(cards(decision.candidates))}"


def _pictures(query: Query, more: Sequence[str] | None) -> list[int | str]:
    return [picture for picture in (query, *(more or ())) if picture is not None]


def verdict(decision: Decision) -> str:
    """The decision in one line."""
    facts = [] if decision.probability is None else [f"probability of the best {decision.probability:.1%}"]
    facts += [] if decision.score is None else [f"score {decision.score:.3f}"]
    facts += [] if decision.threshold is None else [f"threshold {decision.threshold:.3f}"]
    if not decision.candidates:
        facts = ["nobody enrolled is left to compare with"]
    elif decision.verdict == "undecided":
        facts = [UNDECIDED]
    said = {"known": text(decision.identity), "unknown": "UNKNOWN", "undecided": "Undecided"}[decision.verdict]
    return f'<p class="sc-verdict sc-{decision.verdict}" role="status"><b>{said}</b> <span>{" · ".join(facts)}</span></p>'


def enrol_probe(
    desk: Desk,
    query: Query,
    more: Sequence[str] | None,
    name: str | None,
    camera: str | None,
    time: str | None,
    changes: int,
) -> tuple[str, int]:
    """Enrol all pictures of the probe; returns what to say, and the number of changes."""
    probe, who = _pictures(query, more), (name or "").strip()
    if not probe or not who:
        return message("Give a picture on the left and a name here.", "problem"), changes
    if desk.folder is None and any(isinstance(picture, str) for picture in probe):
        return message(NO_PLACE, "problem"), changes
    try:
        when = stated_sample("", {"time": time}).time if time else None
    except ValueError as error:
        return message(f"{text(error)}; nothing was changed", "problem"), changes
    try:
        for picture in probe:
            _enrol(desk, picture, who, (camera or "").strip() or None, when)
    except (SimclrError, ImageError) as error:
        return complaint(error, *probe), changes + 1  # those before it are enrolled
    count = f"{len(probe)} pictures are" if len(probe) > 1 else f"{desk.name(probe[0])} is"
    return message(f"{count} enrolled as <b>{text(who)}</b>."), changes + 1


def _enrol(desk: Desk, picture: int | str, who: str, camera: str | None, time: float | None) -> None:
    if isinstance(picture, int):
        enrol_item(desk.gallery, picture, who, camera, time)
    else:
        enrol_upload(desk.gallery, read_bytes(picture), who, camera, time)


def identify_tab(desk: Desk, choices: Choices, calibration: Calibration | None, changes: gr.State) -> None:
    """The widgets; `changes` counts what was changed on the page."""
    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            query = query_widgets(desk, "Probe: who is it?", desk.examples())
            with gr.Accordion("Options: more pictures, condition", open=False):
                more = gr.File(label="More pictures of the same one, such as a track", file_count="multiple", height=120)
                expression = condition_box()
        with gr.Column(scale=3, min_width=300):
            answer = pickable(message(IDENTIFY_HINT), query)
            with gr.Accordion("Enrol the probe", open=False):
                with gr.Row():
                    name = choices.box("identity", label="Name: somebody enrolled, or new", always=True)
                    camera = choices.box("camera", label="Camera, if known", always=True, min_width=120)
                    time = gr.Textbox(label="Time, if known", placeholder="seconds or ISO 8601", min_width=120)
                enrol_it = gr.Button("Enrol", variant="primary")
                said = gr.HTML()
    triggers = [query.change, more.change, expression.submit]
    listen(triggers, partial(decide, desk, calibration), [query, more, expression], answer)
    listen([query.change], lambda: "", None, said)
    inputs = [query, more, name, camera, time, changes]
    act(enrol_it.click, partial(enrol_probe, desk), inputs, [said, changes])
