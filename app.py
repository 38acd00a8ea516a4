"""The web app: search by picture, re-ID and classification over one gallery. Widgets and callbacks only, no maths.

What a callback shows is HTML made here, so everything that comes from users (file names, labels) goes through `_text`.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeAlias

import gradio as gr
import numpy as np
from fastapi import FastAPI
from gradio.components import Component
from gradio.data_classes import ImageData
from gradio.events import Dependency
from numpy.typing import NDArray
from PIL import Image
from starlette.middleware import Middleware

from serve.classify import Head
from serve.datasets.market import MARKET_NAME
from serve.encoder import Encoder
from serve.errors import SimclrError, SourceError
from serve.filters import FIELDS, And, Condition, Where, parse_where
from serve.gallery import Gallery
from serve.gateway.beside import ApiFirst
from serve.item import Item
from serve.ports import busy_reason
from serve.preprocess import ImageError, decode
from serve.reid import RankedHit, rank
from serve.samples import JUNK_IDENTITY
from serve.search import Hit
from serve.sources import read_bytes

THUMBNAIL_PX, EXAMPLES, MAX_HITS, MAX_CHOICES, TOP_CLASSES = 256, 8, 60, 1000, 5
NOBODY = (JUNK_IDENTITY, "0000")
"""Market-1501's codes for boxes that show nobody in particular: two that carry one are not the same person."""
FILTER_FIELDS = ("label", "identity", "camera")
SEARCH_HINT = "Drop a picture on the left, paste one, or click an example: the most similar pictures appear here."
CONDITION_HINT = (
    f"fields: {', '.join(FIELDS)}; compare with = != < <= > >=, in (a, b), between 1 and 2, is known, is unknown; "
    "join with and, or, not, ( )"
)
REID_HINT = "Give a probe on the left, or click an example: the gallery appears here, ranked."
REID_RULE = (
    "<b>✓ green</b> same identity, <b>✗ red</b> another one, <b>? grey</b> the identity of the probe or of the picture is "
    "unknown. As usual in re-ID, pictures of the probe's identity taken by the probe's own camera are left out, and so is junk."
)
PICK_JS = """element.addEventListener('click', event => {
  const card = event.target.closest('[data-id]');
  if (card) trigger('click', {id: Number(card.dataset.id)});
})"""
QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}

Query: TypeAlias = int | str | None
"""What is searched with: an item of the gallery, an uploaded file, or nothing yet."""
Widgets: TypeAlias = Component | Sequence[Component] | None


@dataclass(frozen=True)
class Desk:
    """The callbacks: plain functions of what the user chose."""

    gallery: Gallery
    encoder: Encoder
    heads: Mapping[str, Head] = field(default_factory=dict)

    def search(self, query: Query, k: int, expression: str | None = None, *chosen: Sequence[str]) -> str:
        """Result cards for a query; `chosen` holds the values ticked per field of FILTER_FIELDS."""
        if query is None:
            return _message(SEARCH_HINT)
        try:
            where = _where(expression, chosen)
            hits = self.gallery.search(self._asked(query), int(k), where, _itself(query))
        except (SimclrError, ImageError) as error:
            return _complaint(error, query)
        return _result(f"The {len(hits)} pictures most similar to {self._name(query)}; score = cosine", hits)

    def rank(self, query: Query, k: int, identity: str | None, camera: str | None, others_only: bool) -> str:
        """Rank list of the gallery for a probe, each card marked right or wrong where that is known."""
        if query is None:
            return _message(REID_HINT)
        try:
            hits = rank(
                self.gallery,
                self._asked(query),
                identity=(identity or "").strip() or None,
                camera=(camera or "").strip() or None,
                other_cameras_only=others_only,
                exclude_ids=_itself(query),
                k=int(k),
            )
        except (SimclrError, ImageError) as error:
            return _complaint(error, query)
        return _result(f"The {len(hits)} nearest to {self._name(query)}: {_tally(hits)}", hits)

    def classify(self, query: Query, name: str) -> tuple[dict[str, float] | None, str]:
        """Class -> probability by the head of that name, and a message."""
        if query is None:
            return None, _message("Give a picture, or click an example.")
        try:
            asked = self._asked(query)
            vector_D = asked if isinstance(asked, np.ndarray) else self.encoder.embed([asked])[0]
        except (SimclrError, ImageError) as error:
            return None, _complaint(error, query)
        head = self.heads[name]
        (chances_C,) = head.probabilities(vector_D[None])
        unsure = f": uncertain, no class reaches {head.abstain_below:.3g}" if head.decide(chances_C) is None else ""
        return dict(zip(head.classes, chances_C.tolist(), strict=True)), _message(f"Classes of {self._name(query)}{unsure}")

    def preview(self, query: Query) -> Image.Image | None:
        """The query as a small picture that every browser can show (it could not show TIFF); None if it cannot be read."""
        try:
            return None if query is None else _shrunk(read_bytes(self._source(query)))
        except (SimclrError, ImageError):
            return None

    def describe_probe(self, query: Query) -> tuple[str | None, str | None]:
        """Identity and camera of a probe: as the gallery has them, or as a file name of the Market-1501 family says."""
        if isinstance(query, int):
            try:
                item = self.gallery.item(query)
            except SimclrError:  # removed since it was shown; `rank` will say so
                return None, None
            identity, camera = item.identity, item.camera
        else:
            match = MARKET_NAME.match(Path(query or "").name)
            identity, camera = (match[1], str(int(match[2]))) if match else (None, None)
        return None if identity in NOBODY else identity, camera

    def examples(self, *, with_identity: bool = False) -> list[Item]:
        """A few items from all over the gallery."""
        ids = self.gallery.ids()
        items = [self.gallery.item(i) for i in ids[:: max(1, len(ids) // (8 * EXAMPLES))]]
        unfit = (*NOBODY, None) if with_identity else NOBODY
        fit = [item for item in items if item.identity not in unfit]
        return fit[:: max(1, len(fit) // EXAMPLES)][:EXAMPLES]

    def _asked(self, query: int | str) -> Path | NDArray[np.float32]:
        return self.gallery.vector(query) if isinstance(query, int) else Path(query)

    def _source(self, query: int | str) -> str:
        return self.gallery.item(query).source if isinstance(query, int) else query

    def _name(self, query: int | str) -> str:
        return f"<b>{_text(Path(self._source(query)).name)}</b>"


def _itself(query: int | str) -> list[int]:
    return [query] if isinstance(query, int) else []


def _where(expression: str | None, chosen: Iterable[Sequence[str]]) -> Where:
    ticked = [Condition(field, "in", tuple(values)) for field, values in zip(FILTER_FIELDS, chosen, strict=False) if values]
    return And((*ticked, parse_where(expression or "")))


def _text(value: object) -> str:
    """User data as HTML text."""
    return html.escape(str(value))


def _message(text: str, kind: str = "hint") -> str:
    return f'<p class="sc-{kind}" role="status">{text}</p>'


def _complaint(error: Exception, query: Query) -> str:
    """The error's line, where the user looks and as a toast; an upload goes by its name, not by its place on the server."""
    line = str(error)
    if isinstance(query, str):
        line = line.replace(query, Path(query).name)
    gr.Warning(_text(line), title="That did not work")
    return _message(_text(line), "problem")


def _result(title: str, hits: Sequence[Hit]) -> str:
    if not hits:
        return _message("Nothing found: no picture of the gallery passes the filter. Loosen it, or clear it.")
    return f'{_message(title)}<div class="sc-grid">{"".join(_cards(hits))}</div>'


def _tally(hits: Sequence[RankedHit]) -> str:
    counts = [sum(hit.match is verdict for hit in hits) for verdict in (True, False, None)]
    return ", ".join(f"{count} {mark}" for count, mark in zip(counts, "✓✗?", strict=True) if count)


def _cards(items: Sequence[Item]) -> list[str]:
    with ThreadPoolExecutor() as pool:
        pictures = list(pool.map(_picture, [item.source for item in items]))
    return [_card(place, item, picture) for place, (item, picture) in enumerate(zip(items, pictures, strict=True), start=1)]


def _card(place: int, item: Item, picture: str) -> str:
    mark = ""
    if isinstance(item, RankedHit):
        kind, sign, words = {
            True: ("right", "✓", "same identity"),
            False: ("wrong", "✗", "another identity"),
            None: ("open", "?", "identity unknown"),
        }[item.match]
        mark = f'<span class="sc-mark sc-{kind}" title="{words}" role="img" aria-label="{words}">{sign}</span>'
    score = (
        f'<span class="sc-rank">{place}</span><span class="sc-score">{item.score:.3f}</span>' if isinstance(item, Hit) else ""
    )
    facts = {"": item.label, "id ": item.identity, "camera ": item.camera}
    lines = "".join(f"<span>{_text(word + value)}</span>" for word, value in facts.items() if value is not None)
    return (
        f'<button type="button" class="sc-card" data-id="{item.id}" title="{_text(_tooltip(item))}">'
        f'<span class="sc-picture">{picture}{mark}</span><span class="sc-head">{score}</span>'
        f'<span class="sc-facts">{lines}</span></button>'
    )


def _tooltip(item: Item) -> str:
    time = [] if item.time is None else [f"time {item.time:g}"]
    extra = [f"{key}: {value}" for key, value in item.extra.items()]
    return "\n".join([Path(item.source).name, *time, *extra, "Click to search with it"])


def _picture(source: str) -> str:
    try:
        return f'<img alt="" src="{_thumbnail(source)}">'
    except (SourceError, ImageError):  # moved away since it was added: the hit still counts
        return '<span class="sc-gone">picture not found</span>'


@lru_cache(maxsize=2048)
def _thumbnail(source: str) -> str:
    file = io.BytesIO()
    _shrunk(read_bytes(source)).save(file, "WEBP", quality=85)
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"


def _shrunk(encoded: bytes) -> Image.Image:
    image = decode(encoded)
    image.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
    return image


def build_app(
    gallery: Gallery, encoder: Encoder, *, heads: Mapping[str, Head], encoder_spec: str, notice: str | None = None
) -> gr.Blocks:
    """The app over one gallery; `notice` is a sentence for its top. Raises: EncoderMismatch if a head does not fit."""
    for head in heads.values():
        head.require(encoder.encoder_id)
    desk = Desk(gallery, encoder, heads)
    blocks = gr.Blocks(title="simclr-serve", analytics_enabled=False, delete_cache=(3600, 86400))
    with blocks:
        gr.HTML(lambda: _header(gallery, encoder, encoder_spec))  # a function: counted anew at each visit
        if notice:
            gr.HTML(_message(_text(notice), "notice"))
        with gr.Tab("Search"):
            _search_tab(desk)
        if gallery.distinct("identity"):
            with gr.Tab("Re-ID"):
                _reid_tab(desk)
        if heads:
            with gr.Tab("Classify"):
                _classify_tab(desk)
    blocks.queue(default_concurrency_limit=4)
    return blocks


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
    chips = "".join(f"<span><i>{name}</i> {_text(value)}</span>" for name, value in facts.items())
    return f'<h1 class="sc-title">simclr-serve</h1><div class="sc-chips">{chips}</div>'


def _search_tab(desk: Desk) -> None:
    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            query = _query_widgets(desk, "Picture to search with", desk.examples())
            with gr.Accordion("Options: how many, which ones", open=False):
                k = _count_slider()
                ticked = [_choices(desk, field, multiselect=True) for field in FILTER_FIELDS]
                expression = gr.Textbox(
                    label="Condition", info=CONDITION_HINT, lines=1,
                    placeholder="camera != 2 and time >= 100", submit_btn="Apply",
                )  # fmt: skip
        with gr.Column(scale=3, min_width=300):
            results = _pickable(_message(SEARCH_HINT), query)
    triggers = [query.change, k.release, expression.submit, *(box.change for box in ticked)]
    _listen(triggers, desk.search, [query, k, expression, *ticked], results)


def _reid_tab(desk: Desk) -> None:
    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            query = _query_widgets(desk, "Probe: whom to look for", desk.examples(with_identity=True))
            with gr.Row():
                identity = _choices(desk, "identity", label="Probe's identity", min_width=120)
                camera = _choices(desk, "camera", label="Probe's camera", min_width=120)
            with gr.Accordion("Options", open=False):
                k = _count_slider()
                others = gr.Checkbox(label="Other cameras only", info="leave out everything the probe's camera saw")
        with gr.Column(scale=3, min_width=300):
            gr.HTML(f'<p class="sc-rule">{REID_RULE}</p>')
            results = _pickable(_message(REID_HINT), query)
    inputs = [query, k, identity, camera, others]
    filled = _listen([query.change], desk.describe_probe, query, [identity, camera])
    # `input` fires for people only: what is filled in above must not rank a second time
    filled.then(desk.rank, inputs, results, **QUIET)
    _listen([k.release, identity.input, camera.input, others.input], desk.rank, inputs, results)


def _classify_tab(desk: Desk) -> None:
    names = list(desk.heads)
    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            query = _query_widgets(desk, "Picture to classify", desk.examples())
            chosen = gr.Dropdown(names, value=names[0], label="Head", visible=len(names) > 1)
        with gr.Column(scale=3, min_width=300):
            message = gr.HTML(_message("Give a picture, or click an example."))
            answer = gr.Label(label="Most likely classes", num_top_classes=TOP_CLASSES)
            rule = gr.HTML(_accuracy(desk.heads[names[0]]))
    _listen([query.change, chosen.input], desk.classify, [query, chosen], [answer, message])
    chosen.input(lambda name: _accuracy(desk.heads[name]), chosen, rule, **QUIET)


def _accuracy(head: Head) -> str:
    """How good the head was where that was measured: on a test set, else on what was held back from the fit."""
    for name, pictures in (("test_accuracy", "of its test set"), ("held_back_accuracy", "held back while it was fitted")):
        if (accuracy := head.report.get(name)) is not None:
            return f'<p class="sc-rule">Of the labelled pictures {pictures}, this head named {accuracy:.1%} correctly.</p>'
    return ""


def _query_widgets(desk: Desk, label: str, examples: Sequence[Item]) -> gr.State:
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
        strip = "".join(_cards(examples))
        _pickable(f'<p class="sc-rule">or start with one of these</p><div class="sc-strip">{strip}</div>', query)
    _listen([picture.upload], lambda path: path, picture, query)
    _listen([picture.clear], lambda: None, None, query)
    _listen([query.change], desk.preview, query, picture)
    return query


def _upload_path(payload: ImageData | None) -> str | None:
    return None if payload is None else payload.path


def _pickable(value: str, query: gr.State) -> gr.HTML:
    """HTML whose cards become the query when they are clicked."""
    cards = gr.HTML(value, js_on_load=PICK_JS, apply_default_css=False)
    _listen([cards.click], _picked, None, query)
    return cards


def _picked(event: gr.EventData) -> int:
    return int(event.id)


def _listen(triggers: Sequence[Any], callback: Callable[..., Any], inputs: Widgets, outputs: Widgets) -> Dependency:
    listener: Dependency = gr.on(triggers, callback, inputs, outputs, **QUIET)
    return listener


def _count_slider() -> gr.Slider:
    return gr.Slider(1, MAX_HITS, value=12, step=1, label="How many results")


def _choices(
    desk: Desk, field: str, *, label: str | None = None, multiselect: bool = False, min_width: int = 160
) -> gr.Dropdown:
    """A drop-down of the values that the gallery has; hidden where it has none. Others can be typed."""
    values = desk.gallery.distinct(field)
    return gr.Dropdown(
        values[:MAX_CHOICES], value=[] if multiselect else None, multiselect=multiselect, allow_custom_value=True,
        label=label or field.capitalize(), visible=bool(values), min_width=min_width,
    )  # fmt: skip


def serve_app(
    blocks: gr.Blocks, *, api: FastAPI | None = None, host: str = "127.0.0.1", port: int = 7860, wait: bool = True
) -> str:
    """Serve the app, and the API of `serve.api` beside it, at the URL returned; with `wait`, until Ctrl-C.

    Raises: SimclrError if the port is busy.
    """
    url = f"http://{host}:{port}/"
    beside = {} if api is None else {"middleware": [Middleware(ApiFirst, api=api)], "lifespan": api.router.lifespan_context}
    require_free_port(host, port)
    try:
        blocks.launch(
            server_name=host, server_port=port, prevent_thread_lock=True, quiet=True, inline=False, share=False,
            ssr_mode=False, pwa=False, mcp_server=False, enable_monitoring=False, run_history=False, footer_links=[],
            max_file_size="100mb", theme=_theme(), css=_page("style.css"), js=_page("upload.js"), app_kwargs=beside,
        )  # fmt: skip
    except Exception as error:  # Gradio asks its own page at the start, which proxy settings break in a dozen ways
        raise SimclrError(f"{url}: the app cannot reach itself ({error}); behind a proxy, set NO_PROXY={host}") from error
    if wait:
        print(f"simclr-serve is at {url} (Ctrl-C ends it)", flush=True)
        blocks.block_thread()
    return url


def _page(name: str) -> str:
    return files("serve").joinpath("page", name).read_text(encoding="utf-8")


def require_free_port(host: str, port: int) -> None:
    """Say at once what would fail later. Raises: SimclrError if the port is busy."""
    if reason := busy_reason(host, port):
        raise SimclrError(f"port {port} is busy or not allowed on {host} ({reason}); use --port")


def _theme() -> gr.themes.Base:
    """Calm colours and the reader's own fonts: nothing is fetched from elsewhere."""
    system = [gr.themes.Font(name) for name in ("system-ui", "Segoe UI", "Roboto", "Helvetica Neue", "sans-serif")]
    mono = [gr.themes.Font(name) for name in ("ui-monospace", "Menlo", "Consolas", "monospace")]
    theme = gr.themes.Base(primary_hue="teal", neutral_hue="slate", font=system, font_mono=mono, radius_size="lg")
    return theme.set(body_text_color_subdued="*neutral_600", body_text_color_subdued_dark="*neutral_400")
