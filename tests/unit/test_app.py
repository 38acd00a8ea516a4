import socket
import warnings
from dataclasses import replace
from pathlib import Path

import gradio as gr
import numpy as np
import pytest
from gradio.data_classes import ImageData
from PIL import Image

from app import build_app, serve_app
from serve.classify import Head
from serve.errors import EncoderMismatch, EncoderUnavailable, SimclrError
from serve.gallery import Gallery
from serve.page import cards
from serve.page.classify import classify
from serve.page.desk import EXAMPLES
from serve.page.reid import REID_HINT, describe_probe, rank_list
from serve.page.search import SEARCH_HINT, search
from serve.samples import Sample
from tests.thresholds import calibration

IDENTITIES = ("Identities", "Identify", "Everybody", "Review")
HOSTILE = "</span><script>alert(1)</script>{{#each}}${1}`\"'"


@pytest.fixture
def heads(toy_encoder) -> dict[str, Head]:
    head = Head(
        weight=np.eye(3, toy_encoder.manifest.embedding_dim, dtype=np.float32),
        bias=np.zeros(3, np.float32),
        classes=("a", "b", "c"),
        encoder_id=toy_encoder.encoder_id,
    )
    return {"toy": head}


def test_no_query_gives_a_hint(desk, heads):
    assert SEARCH_HINT in search(desk, None, 5)
    assert REID_HINT in rank_list(desk, None, 5, None, None, False)
    assert classify(desk, heads, None, "toy")[0] is None
    assert desk.preview(None) is None


def test_search_by_file_and_by_item(desk):
    item = desk.gallery.items()[4]
    by_file, by_item = search(desk, item.source, 5), search(desk, item.id, 5)
    assert by_file.count("sc-card") == by_item.count("sc-card") == 5
    assert f'data-id="{item.id}"' in by_file
    assert "1.000" in by_file
    assert f'data-id="{item.id}"' not in by_item  # it would always find itself


def test_filters_are_joined(desk):
    page = search(desk, desk.gallery.items()[0].source, 20, "time >= 10", ["class 1"], [], ["0"])
    wanted = [item for item in desk.gallery.items() if item.time >= 10 and item.label == "class 1" and item.camera == "0"]
    assert page.count("sc-card") == len(wanted) > 0
    assert "Nothing found" in search(desk, wanted[0].source, 20, None, ["no such label"])


def test_rank_marks_and_same_camera_rule(desk):
    probe = desk.gallery.items()[0]
    page = rank_list(desk, probe.source, 20, probe.identity, probe.camera, False)
    assert page.count('aria-label="same identity"') == 0  # identity i % 4 fixes camera i % 2: all right ones share the camera
    assert page.count('aria-label="another identity"') == 15
    free = rank_list(desk, probe.source, 20, probe.identity, " ", False)
    assert (free.count("✓</span>"), free.count("✗</span>")) == (5, 15)
    assert "5 ✓, 15 ✗" in free
    assert rank_list(desk, probe.source, 20, None, None, False).count('aria-label="identity unknown"') == 20
    assert "other_cameras_only" in rank_list(desk, probe.source, 20, None, None, True)


def test_classify(desk, heads):
    item = desk.gallery.items()[0]
    chances, message = classify(desk, heads, item.source, "toy")
    assert set(chances) == {"a", "b", "c"}
    assert sum(chances.values()) == pytest.approx(1)
    assert classify(desk, heads, item.id, "toy")[0] == pytest.approx(chances, abs=1e-5)
    assert Path(item.source).name in message


def test_classify_by_several_heads_one_of_which_is_uncertain(desk, heads):
    sure = heads["toy"]
    both = {"toy": sure, "shy <i>": replace(sure, classes=("x", "y", "z"), abstain_below=0.999)}
    item = desk.gallery.items()[0]
    assert "uncertain" not in classify(desk, both, item.source, "toy")[1]
    chances, message = classify(desk, both, item.source, "shy <i>")
    assert set(chances) == {"x", "y", "z"}
    assert "uncertain, no class reaches 0.999" in message
    for shown, several in (({"toy": sure}, False), (both, True)):
        blocks = build_app(desk.gallery, desk.encoder, heads=shown, encoder_spec="model_repository").blocks.values()
        (box,) = [block for block in blocks if isinstance(block, gr.Dropdown) and block.label == "Head"]
        assert (box.visible, box.value) == (several, "toy")


def test_bad_picture_is_explained_by_its_name(desk, heads, tmp_path, toasts):
    bad = tmp_path / "bad<i>.png"
    bad.write_bytes(b"not a picture")
    for answer in (
        search(desk, str(bad), 5),
        rank_list(desk, str(bad), 5, None, None, False),
        classify(desk, heads, str(bad), "toy")[1],
    ):
        assert "bad&lt;i&gt;.png: not a readable picture" in answer
        assert str(tmp_path) not in answer
        assert "sc-problem" in answer
    assert len(toasts) == 3
    assert all("bad&lt;i&gt;.png" in toast for toast in toasts)
    assert desk.preview(str(bad)) is None


def test_bad_filter_and_dead_server_are_explained(desk, heads, monkeypatch):
    item = desk.gallery.items()[0]
    assert "sc-problem" in search(desk, item.source, 5, "colour = red")

    def unavailable(images):
        raise EncoderUnavailable("grpc://127.0.0.1:8001: does not answer")

    monkeypatch.setattr(desk.encoder, "embed", unavailable)
    assert "does not answer" in search(desk, item.source, 5)
    assert "does not answer" in classify(desk, heads, item.source, "toy")[1]


def test_removed_item_is_explained(desk):
    (first, *_) = desk.gallery.ids()
    desk.gallery.remove([first])
    assert "no item with id" in search(desk, int(first), 5)
    assert describe_probe(desk, int(first)) == (None, None)
    assert desk.preview(int(first)) is None


def test_user_data_is_escaped_everywhere(desk, tmp_path):
    name = "<b>{{x}} ${y}.png"
    Image.new("RGB", (8, 8), "red").save(tmp_path / name)
    sample = Sample(str(tmp_path / name), label=HOSTILE, identity=HOSTILE, camera=HOSTILE)
    desk.gallery.add([sample], extra={sample.source: {HOSTILE: HOSTILE}})
    for page in (search(desk, sample.source, 3), rank_list(desk, sample.source, 3, HOSTILE, None, False)):
        assert "<script" not in page
        assert "<b>{{" not in page
        assert "&lt;script&gt;alert(1)" in page


def test_missing_picture_still_counts(desk):
    gone, query = desk.gallery.items()[:2]
    Path(gone.source).unlink()
    page = search(desk, query.source, 20)
    assert page.count("sc-card") == 20
    assert page.count("picture not found") == 1
    assert search(desk, gone.id, 20).count("sc-card") == 19  # its vector is still there


def test_thumbnails_are_small(tmp_path):
    Image.new("RGB", (900, 300), "red").save(tmp_path / "big.png")
    assert cards.shrunk((tmp_path / "big.png").read_bytes()).size == (256, 85)
    assert len(cards._data_url(str(tmp_path / "big.png"))) < 5000


def test_describe_probe(desk):
    item = desk.gallery.items()[5]
    assert describe_probe(desk, item.id) == (item.identity, item.camera)
    assert describe_probe(desk, "/up/0002_c3s1_000451_03.jpg") == ("0002", "3")
    assert describe_probe(desk, "/up/-1_c3s1_000451_03.jpg") == (None, "3")
    assert describe_probe(desk, "/up/0000_c3s1_000451_03.jpg") == (None, "3")  # everybody's code: not one person
    assert describe_probe(desk, "/up/holiday.jpg") == describe_probe(desk, None) == (None, None)


def test_examples_show_somebody(desk, tmp_path, pictures):
    for identity in ("-1", "0000"):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{identity}.png")
        desk.gallery.add([Sample(str(tmp_path / f"{identity}.png"), identity=identity)])
    examples = desk.examples(with_identity=True)
    assert len({item.id for item in examples}) == len(examples) == EXAMPLES
    assert not {item.identity for item in examples} & {"-1", "0000", None}


def test_empty_gallery_still_builds(tmp_path, toy_encoder):
    with Gallery.open(tmp_path / "empty", toy_encoder, create=True) as gallery:
        labels = tab_labels(build_app(gallery, toy_encoder, heads={}, encoder_spec="model_repository"))
    assert labels == ["Search", *IDENTITIES]


def test_tabs_follow_what_there_is(desk, heads):
    everything = build_app(desk.gallery, desk.encoder, heads=heads, encoder_spec="http://127.0.0.1:8000/simclr", notice="a < b")
    assert tab_labels(everything) == ["Search", "Re-ID", *IDENTITIES, "Classify"]
    texts = [str(block.value) for block in everything.blocks.values() if isinstance(block, gr.HTML)]
    assert any("a &lt; b" in text for text in texts)
    assert any("http://127.0.0.1:8000/simclr" in text for text in texts)


def tab_labels(blocks) -> list[str]:
    return [block.label for block in blocks.blocks.values() if isinstance(block, gr.Tab) and block.visible]


def test_head_of_another_encoder_is_refused(heads, other_encoder, tmp_path):
    with (
        Gallery.open(tmp_path / "others", other_encoder, create=True) as gallery,
        pytest.raises(EncoderMismatch, match="fit-head"),
    ):
        build_app(gallery, other_encoder, heads=heads, encoder_spec="model_repository")


def test_threshold_of_another_encoder_is_refused(desk, other_encoder):
    others = calibration(encoder_id=other_encoder.encoder_id)
    with pytest.raises(EncoderMismatch, match="simclr reid calibrate"):
        build_app(desk.gallery, desk.encoder, heads={}, encoder_spec="model_repository", calibration=others)


def test_the_first_identity_makes_its_tab_and_choices_appear(tmp_path, toy_encoder, pictures):
    with Gallery.open(tmp_path / "new", toy_encoder, create=True) as gallery:
        blocks = build_app(gallery, toy_encoder, heads={}, encoder_spec="model_repository")
        (news,) = [event.fn for event in blocks.fns.values() if isinstance(event.outputs[0], gr.Tab)]
        assert news()[0].visible is False
        gallery.add(pictures(4))
        tab, *boxes = news()
        assert tab.visible
        assert [box["choices"] for box in boxes].count(["0", "1", "2", "3"]) >= 3
        assert all(box["visible"] for box in boxes)


def test_uploads_arrive_untouched(desk, heads, tmp_path):
    path = tmp_path / "anything.jpg"
    path.write_bytes(b"not a picture")
    blocks = build_app(desk.gallery, desk.encoder, heads=heads, encoder_spec="model_repository").blocks.values()
    pictures = [block for block in blocks if isinstance(block, gr.Image)]
    assert len(pictures) == 4
    for picture in pictures:
        assert picture.preprocess(None) is None
        assert picture.preprocess(ImageData(path=str(path))) == str(path)


def test_busy_port_is_one_line():
    with socket.socket() as taken, warnings.catch_warnings():
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(SimclrError, match=f"port {port} is busy") as caught:
            serve_app(gr.Blocks(analytics_enabled=False), port=port)
    assert "--port" in str(caught.value)
    assert "\n" not in str(caught.value)
