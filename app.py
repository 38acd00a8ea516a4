"""The web app over one gallery, served: its tabs are in serve/page/."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

import gradio as gr
from fastapi import FastAPI
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware

from serve.classify import Head
from serve.encoder import Encoder
from serve.errors import SimclrError
from serve.gallery import Gallery
from serve.gateway.beside import ApiFirst
from serve.identity.calibration import Calibration
from serve.page.cards import message, text
from serve.page.classify import classify_tab
from serve.page.desk import Desk
from serve.page.identities import identities_tab
from serve.page.reid import reid_tab
from serve.page.search import search_tab
from serve.page.widgets import Choices, listen
from serve.ports import busy_reason, is_loopback


def build_app(
    gallery: Gallery,
    encoder: Encoder,
    *,
    heads: Mapping[str, Head],
    encoder_spec: str,
    calibration: Calibration | None = None,
    notice: str | None = None,
) -> gr.Blocks:
    """The app over one gallery; `notice` is a sentence for its top.

    Raises: EncoderMismatch if a head or the threshold is of another encoder.
    """
    for head in heads.values():
        head.require(encoder.encoder_id)
    if calibration is not None:
        calibration.require(encoder.encoder_id)
    desk, choices = Desk(gallery, encoder), Choices(gallery)
    blocks = gr.Blocks(title="simclr-serve", analytics_enabled=False, delete_cache=(3600, 86400))
    with blocks:
        gr.HTML(lambda: _header(gallery, encoder, encoder_spec))  # a function: counted anew at each visit
        if notice:
            gr.HTML(message(text(notice), "notice"))
        identified, changed = bool(gallery.distinct("identity")), []
        with gr.Tabs(overflow_behavior="wrap"):
            with gr.Tab("Search"):
                search_tab(desk, choices)
            with gr.Tab("Re-ID", visible=identified) as reid:
                reid_tab(desk, choices)
            if identified or desk.folder is not None:
                with gr.Tab("Identities"):
                    changed = [identities_tab(desk, choices, calibration).change]
            if heads:
                with gr.Tab("Classify"):
                    classify_tab(desk, heads)
        listen([blocks.load, *changed], partial(_news, gallery, choices), None, [reid, *choices.boxes])
    blocks.queue(default_concurrency_limit=4)
    return blocks


def _news(gallery: Gallery, choices: Choices) -> list[Any]:
    return [gr.Tab(visible=bool(gallery.distinct("identity"))), *choices.fresh()]


def _header(gallery: Gallery, encoder: Encoder, spec: str) -> str:
    manifest = encoder.manifest
    where = spec if "://" in spec else f"in-process ({spec})"
    facts = {
        "encoder": f"{manifest.name} · {encoder.encoder_id}",
        "runs": where,
        "input": f"{manifest.preprocess.width_px} x {manifest.preprocess.height_px} px",
        "vectors": f"{manifest.embedding_dim}-d",
        "gallery": f"{Path(gallery.address).name} · {len(gallery):,} pictures",
    }
    chips = "".join(f"<span><i>{name}</i> {text(value)}</span>" for name, value in facts.items())
    return f'<h1 class="sc-title">simclr-serve</h1><div class="sc-chips">{chips}</div>'


def serve_app(
    blocks: gr.Blocks, *, api: FastAPI | None = None, host: str = "127.0.0.1", port: int = 7860, wait: bool = True
) -> str:
    """Serve the app, and the API of `serve.api` beside it, at the URL returned; with `wait`, until Ctrl-C.

    Raises: SimclrError if the port is busy.
    """
    url = f"http://{host}:{port}/"
    beside = {} if api is None else {"lifespan": api.router.lifespan_context}
    middleware = [] if api is None else [Middleware(ApiFirst, api=api)]
    if is_loopback(host):  # else another site's page could ask, once that site's name leads to this machine
        middleware.insert(0, Middleware(TrustedHostMiddleware, allowed_hosts=["localhost", host]))
    require_free_port(host, port)
    try:
        blocks.launch(
            server_name=host, server_port=port, prevent_thread_lock=True, quiet=True, inline=False, share=False,
            ssr_mode=False, pwa=False, mcp_server=False, enable_monitoring=False, run_history=False, footer_links=[],
            max_file_size="100mb", theme=_theme(), css=_page("style.css"), js=_page("upload.js"),
            app_kwargs={"middleware": middleware, **beside},
        )  # fmt: skip
    except Exception as error:  # Gradio asks its own page at the start, which proxy settings break in a dozen ways
        raise SimclrError(f"{url}: the app cannot reach itself ({error}); behind a proxy, set NO_PROXY={host}") from error
    if wait:
        print(f"simclr-serve is at {url} (Ctrl-C ends it)", flush=True)
        blocks.block_thread()
    return url


def _page(name: str) -> str:
    return files("serve.page").joinpath(name).read_text(encoding="utf-8")


def require_free_port(host: str, port: int) -> None:
    """Say at once what would fail later. Raises: SimclrError if the port is busy."""
    if reason := busy_reason(host, port):
        raise SimclrError(f"port {port} is busy or not allowed on {host} ({reason}); use --port")


def _theme() -> gr.themes.Base:
    """Calm colours and the reader's own fonts: nothing is fetched from elsewhere."""
    system = [gr.themes.Font(name) for name in ("system-ui", "Segoe UI", "Roboto", "Helvetica Neue", "sans-serif")]
    mono = [gr.themes.Font(name) for name in ("ui-monospace", "Menlo", "Consolas", "monospace")]
    theme = gr.themes.Base(primary_hue="teal", neutral_hue="slate", font=system, font_mono=mono, radius_size="lg")
    filled = {"primary": ("*primary_700", "*primary_800"), "cancel": ("#b91c1c", "#991b1b")}  # white on them can be read
    buttons = {
        f"button_{kind}_{part}{scheme}": colour
        for kind, (fill, hover) in filled.items()
        for part, colour in {"background_fill": fill, "background_fill_hover": hover, "text_color": "white"}.items()
        for scheme in ("", "_dark")
    }
    return theme.set(**buttons, body_text_color_subdued="*neutral_600", body_text_color_subdued_dark="*neutral_400")
