"""The tab Re-ID: the gallery ranked for a probe, right and wrong marked where that is known."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import gradio as gr

from serve.datasets.market import MARKET_NAME
from serve.errors import SimclrError
from serve.page.cards import message, result
from serve.page.desk import Desk, Query, complaint, itself
from serve.page.widgets import QUIET, Choices, count_slider, listen, pickable, query_widgets
from serve.preprocess import ImageError
from serve.reid import RankedHit, rank
from serve.samples import NOBODY

REID_HINT = "Give a probe on the left, or click an example: the gallery appears here, ranked."
REID_RULE = (
    "<b>✓ green</b> same identity, <b>✗ red</b> another one, <b>? grey</b> the identity of the probe or of the picture is "
    "unknown. As usual in re-ID, pictures of the probe's identity taken by the probe's own camera are left out, and so is junk."
)


def rank_list(desk: Desk, query: Query, k: int, identity: str | None, camera: str | None, others_only: bool) -> str:
    """Rank list of the gallery for a probe, each card marked right or wrong where that is known."""
    if query is None:
        return message(REID_HINT)
    try:
        hits = rank(
            desk.gallery,
            desk.asked(query),
            identity=(identity or "").strip() or None,
            camera=(camera or "").strip() or None,
            other_cameras_only=others_only,
            exclude_ids=itself(query),
            k=int(k),
        )
    except (SimclrError, ImageError) as error:
        return complaint(error, query)
    return result(f"The {len(hits)} nearest to {desk.name(query)}: {_tally(hits)}", hits)


def _tally(hits: Sequence[RankedHit]) -> str:
    counts = [sum(hit.match is verdict for hit in hits) for verdict in (True, False, None)]
    return ", ".join(f"{count} {mark}" for count, mark in zip(counts, "✓✗?", strict=True) if count)


def describe_probe(desk: Desk, query: Query) -> tuple[str | None, str | None]:
    """Identity and camera of a probe: as the gallery has them, or as a file name of the Market-1501 family says."""
    if isinstance(query, int):
        try:
            item = desk.gallery.item(query)
        except SimclrError:  # removed since it was shown; `rank_list` will say so
            return None, None
        identity, camera = item.identity, item.camera
    else:
        match = MARKET_NAME.match(Path(query or "").name)
        identity, camera = (match[1], str(int(match[2]))) if match else (None, None)
    return None if identity in NOBODY else identity, camera


def reid_tab(desk: Desk, choices: Choices) -> None:
    """The widgets."""
    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            query = query_widgets(desk, "Probe: whom to look for", desk.examples(with_identity=True))
            with gr.Row():
                identity = choices.box("identity", label="Probe's identity", min_width=120)
                camera = choices.box("camera", label="Probe's camera", min_width=120)
            with gr.Accordion("Options", open=False):
                k = count_slider()
                others = gr.Checkbox(label="Other cameras only", info="leave out everything the probe's camera saw")
        with gr.Column(scale=3, min_width=300):
            gr.HTML(f'<p class="sc-rule">{REID_RULE}</p>')
            results = pickable(message(REID_HINT), query)
    inputs = [query, k, identity, camera, others]
    ranked = partial(rank_list, desk)
    filled = listen([query.change], partial(describe_probe, desk), query, [identity, camera])
    # `input` fires for people only: what is filled in above must not rank a second time
    filled.then(ranked, inputs, results, **QUIET)
    listen([k.release, identity.input, camera.input, others.input], ranked, inputs, results)
