import socket
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from gradio.data_classes import ImageData
from PIL import Image

import app
from app import Desk, build_app, serve_app
from serve.classify import Head
from serve.errors import EncoderMismatch, EncoderUnavailable, SimclrError
from serve.gallery import Gallery
from serve.samples import Sample

HOSTILE = "</span><script>alert(1)</script>{{#each}}${1}`\"'"


@pytest.fixture
def toasts(monkeypatch) -> list[str]:
    shown: list[str] = []
    monkeypatch.setattr(app.gr, "Warning", lambda message, **_: shown.append(message))
    return shown


@pytest.fixture
def desk(tmp_path, toy_encoder, pictures, toasts) -> Iterator[Desk]:
    head = Head(
        weight=np.eye(3, toy_encoder.manifest.embedding_dim, dtype=np.float32),
        bias=np.zeros(3, np.float32),
        classes=("a", "b", "c"),
        encoder_id=toy_encoder.encoder_id,
    )
    with Gallery.open(tmp_path / "gallery", toy_encoder, create=True) as gallery:
        gallery.add(pictures(20))
        yield Desk(gallery, toy_encoder, {"toy": head})


def test_no_query_gives_a_hint(desk):
    assert app.SEARCH_HINT in desk.search(None, 5)
    assert app.REID_HINT in desk.rank(None, 5, None, None, False)
    assert desk.classify(None, "toy")[0] is None
    assert desk.preview(None) is None


def test_search_by_file_and_by_item(desk):
    item = desk.gallery.items()[4]
    by_file, by_item = desk.search(item.source, 5), desk.search(item.id, 5)
    assert by_file.count("sc-card") == by_item.count("sc-card") == 5
    assert f'data-id="{item.id}"' in by_file
    assert "1.000" in by_file
    assert f'data-id="{item.id}"' not in by_item  # it would always find itself


def test_filters_are_joined(desk):
    page = desk.search(desk.gallery.items()[0].source, 20, "time >= 10", ["class 1"], [], ["0"])
    wanted = [item for item in desk.gallery.items() if item.time >= 10 and item.label == "class 1" and item.camera == "0"]
    assert page.count("sc-card") == len(wanted) > 0
    assert "Nothing found" in desk.search(wanted[0].source, 20, None, ["no such label"])


def test_rank_marks_and_same_camera_rule(desk):
    probe = desk.gallery.items()[0]
    page = desk.rank(probe.source, 20, probe.identity, probe.camera, False)
    assert page.count('aria-label="same identity"') == 0  # identity i % 4 fixes camera i % 2: all right ones share the camera
    assert page.count('aria-label="another identity"') == 15
    free = desk.rank(probe.source, 20, probe.identity, " ", False)
    assert (free.count("✓</span>"), free.count("✗</span>")) == (5, 15)
    assert "5 ✓, 15 ✗" in free
    assert desk.rank(probe.source, 20, None, None, False).count('aria-label="identity unknown"') == 20
    assert "other_cameras_only" in desk.rank(probe.source, 20, None, None, True)


def test_classify(desk):
    item = desk.gallery.items()[0]
    chances, message = desk.classify(item.source, "toy")
    assert set(chances) == {"a", "b", "c"}
    assert sum(chances.values()) == pytest.approx(1)
    assert desk.classify(item.id, "toy")[0] == pytest.approx(chances, abs=1e-5)
    assert Path(item.source).name in message


def test_classify_by_several_heads_one_of_which_is_uncertain(desk):
    sure = desk.heads["toy"]
    heads = {"toy": sure, "shy <i>": replace(sure, classes=("x", "y", "z"), abstain_below=0.999)}
    item = desk.gallery.items()[0]
    both = Desk(desk.gallery, desk.encoder, heads)
    assert "uncertain" not in both.classify(item.source, "toy")[1]
    chances, message = both.classify(item.source, "shy <i>")
    assert set(chances) == {"x", "y", "z"}
    assert "uncertain, no class reaches 0.999" in message
    for shown, several in (({"toy": sure}, False), (heads, True)):
        blocks = build_app(desk.gallery, desk.encoder, heads=shown, encoder_spec="model_repository").blocks.values()
        (box,) = [block for block in blocks if isinstance(block, app.gr.Dropdown) and block.label == "Head"]
        assert (box.visible, box.value) == (several, "toy")


def test_bad_picture_is_explained_by_its_name(desk, tmp_path, toasts):
    bad = tmp_path / "bad<i>.png"
    bad.write_bytes(b"not a picture")
    for answer in (desk.search(str(bad), 5), desk.rank(str(bad), 5, None, None, False), desk.classify(str(bad), "toy")[1]):
        assert "bad&lt;i&gt;.png: not a readable picture" in answer
        assert str(tmp_path) not in answer
        assert "sc-problem" in answer
    assert len(toasts) == 3
    assert all("bad&lt;i&gt;.png" in toast for toast in toasts)
    assert desk.preview(str(bad)) is None


def test_bad_filter_and_dead_server_are_explained(desk, monkeypatch):
    item = desk.gallery.items()[0]
    assert "sc-problem" in desk.search(item.source, 5, "colour = red")

    def unavailable(images):
        raise EncoderUnavailable("grpc://127.0.0.1:8001: does not answer")

    monkeypatch.setattr(desk.encoder, "embed", unavailable)
    assert "does not answer" in desk.search(item.source, 5)
    assert "does not answer" in desk.classify(item.source, "toy")[1]


def test_removed_item_is_explained(desk):
    (first, *_) = desk.gallery.ids()
    desk.gallery.remove([first])
    assert "no item with id" in desk.search(int(first), 5)
    assert desk.describe_probe(int(first)) == (None, None)
    assert desk.preview(int(first)) is None


def test_user_data_is_escaped_everywhere(desk, tmp_path):
    name = "<b>{{x}} ${y}.png"
    Image.new("RGB", (8, 8), "red").save(tmp_path / name)
    sample = Sample(str(tmp_path / name), label=HOSTILE, identity=HOSTILE, camera=HOSTILE)
    desk.gallery.add([sample], extra={sample.source: {HOSTILE: HOSTILE}})
    for page in (desk.search(sample.source, 3), desk.rank(sample.source, 3, HOSTILE, None, False)):
        assert "<script" not in page
        assert "<b>{{" not in page
        assert "&lt;script&gt;alert(1)" in page


def test_missing_picture_still_counts(desk):
    gone, query = desk.gallery.items()[:2]
    Path(gone.source).unlink()
    page = desk.search(query.source, 20)
    assert page.count("sc-card") == 20
    assert page.count("picture not found") == 1
    assert desk.search(gone.id, 20).count("sc-card") == 19  # its vector is still there


def test_thumbnails_are_small(tmp_path):
    Image.new("RGB", (900, 300), "red").save(tmp_path / "big.png")
    assert app._shrunk((tmp_path / "big.png").read_bytes()).size == (256, 85)
    assert len(app._thumbnail(str(tmp_path / "big.png"))) < 5000


def test_describe_probe(desk):
    item = desk.gallery.items()[5]
    assert desk.describe_probe(item.id) == (item.identity, item.camera)
    assert desk.describe_probe("/up/0002_c3s1_000451_03.jpg") == ("0002", "3")
    assert desk.describe_probe("/up/-1_c3s1_000451_03.jpg") == (None, "3")
    assert desk.describe_probe("/up/0000_c3s1_000451_03.jpg") == (None, "3")  # everybody's code: not one person
    assert desk.describe_probe("/up/holiday.jpg") == desk.describe_probe(None) == (None, None)


def test_examples_show_somebody(desk, tmp_path, pictures):
    for identity in ("-1", "0000"):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{identity}.png")
        desk.gallery.add([Sample(str(tmp_path / f"{identity}.png"), identity=identity)])
    examples = desk.examples(with_identity=True)
    assert len({item.id for item in examples}) == len(examples) == app.EXAMPLES
    assert not {item.identity for item in examples} & {"-1", "0000", None}


def test_empty_gallery_still_builds(tmp_path, toy_encoder):
    with Gallery.open(tmp_path / "empty", toy_encoder, create=True) as gallery:
        labels = tab_labels(build_app(gallery, toy_encoder, heads={}, encoder_spec="model_repository"))
    assert labels == ["Search"]


def test_tabs_follow_what_there_is(desk):
    everything = build_app(
        desk.gallery, desk.encoder, heads=desk.heads, encoder_spec="http://127.0.0.1:8000/simclr", notice="a < b"
    )
    assert tab_labels(everything) == ["Search", "Re-ID", "Classify"]
    texts = [str(block.value) for block in everything.blocks.values() if isinstance(block, app.gr.HTML)]
    assert any("a &lt; b" in text for text in texts)
    assert any("http://127.0.0.1:8000/simclr" in text for text in texts)


def tab_labels(blocks) -> list[str]:
    return [block.label for block in blocks.blocks.values() if isinstance(block, app.gr.Tab)]


def test_head_of_another_encoder_is_refused(desk, other_encoder, tmp_path):
    with (
        Gallery.open(tmp_path / "others", other_encoder, create=True) as gallery,
        pytest.raises(EncoderMismatch, match="fit-head"),
    ):
        build_app(gallery, other_encoder, heads=desk.heads, encoder_spec="model_repository")


def test_uploads_arrive_untouched(desk, tmp_path):
    path = tmp_path / "anything.jpg"
    path.write_bytes(b"not a picture")
    blocks = build_app(desk.gallery, desk.encoder, heads=desk.heads, encoder_spec="model_repository").blocks.values()
    pictures = [block for block in blocks if isinstance(block, app.gr.Image)]
    assert len(pictures) == 3
    for picture in pictures:
        assert picture.preprocess(None) is None
        assert picture.preprocess(ImageData(path=str(path))) == str(path)


def test_busy_port_is_one_line():
    with socket.socket() as taken, warnings.catch_warnings():
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(SimclrError, match=f"port {port} is busy") as caught:
            serve_app(app.gr.Blocks(analytics_enabled=False), port=port)
    assert "--port" in str(caught.value)
    assert "\n" not in str(caught.value)
