"""The tab Identities: who is it, everybody who is enrolled, and what to look at."""

from __future__ import annotations

import gradio as gr

from serve.identity.calibration import Calibration
from serve.page.desk import Desk
from serve.page.identify import identify_tab
from serve.page.people import people_tab
from serve.page.review import review_tab
from serve.page.widgets import Choices


def identities_tab(desk: Desk, choices: Choices, calibration: Calibration | None) -> gr.State:
    """The widgets; returns the number of changes that were made here."""
    changes, chosen = gr.State(0), gr.State(None)
    with gr.Tabs() as tabs:
        with gr.Tab("Identify", id="identify"):
            identify_tab(desk, choices, calibration, changes)
        with gr.Tab("Everybody", id="everybody") as everybody:
            people_tab(desk, choices, changes, chosen, everybody)
        with gr.Tab("Review", id="review"):
            review_tab(desk, chosen, tabs, "everybody")
    return changes
