import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, Page, expect

from tests.browser.page_parts import cards, said, upload

pytestmark = pytest.mark.browser


def hand_over(page: Page, event: str, name: str, content: bytes, mime: str) -> None:
    """Drops or pastes a file, as a browser would."""
    page.evaluate(
        """([event, name, content, type]) => {
          const dataTransfer = new DataTransfer();
          dataTransfer.items.add(new File([new Uint8Array(content)], name, {type}));
          if (event === 'paste') return document.dispatchEvent(new ClipboardEvent('paste', {clipboardData: dataTransfer}));
          const zone = [...document.querySelectorAll('.sc-query .upload-container')].find(element => element.offsetParent);
          zone.dispatchEvent(new DragEvent('drop', {dataTransfer, bubbles: true, cancelable: true}));
        }""",
        [event, name, list(content), mime],
    )


def open_options(page: Page) -> None:
    page.locator("button:visible", has_text="Options").click()


def test_header_says_what_is_open(page, served):
    expect(page).to_have_title("simclr-serve")
    chips = page.locator(".sc-chips")
    for words in ("grid", served.gallery.info().encoder_id, "in-process (model_repository)", "16 x 32 px", "48-d"):
        expect(chips).to_contain_text(words)
    expect(chips).to_contain_text(f"people · {len(served.gallery)} pictures")


def test_upload_gives_ranked_results(page, served):
    upload(page, served.probe.source)
    expect(cards(page)).to_have_count(12)
    expect(said(page)).to_contain_text(Path(served.probe.source).name)
    expected = served.gallery.search(served.probe.source, 12)
    assert [int(card.get_attribute("data-id")) for card in cards(page).all()] == [hit.id for hit in expected]
    expect(cards(page).first).to_contain_text(f"{expected[0].score:.3f}")
    expect(cards(page).first).to_contain_text(f"camera {expected[0].camera}")
    expect(page.locator(".sc-query:visible img")).to_have_count(1)


def test_drop_and_paste_work_also_over_a_picture(page, served):
    picture = Path(served.probe.source).read_bytes()
    hand_over(page, "drop", "dropped.jpg", picture, "image/jpeg")
    expect(said(page)).to_contain_text("dropped.jpg")
    hand_over(page, "paste", "pasted.png", picture, "image/png")
    expect(said(page)).to_contain_text("pasted.png")
    hand_over(page, "drop", "no type.ppm", b"P6 1 1 255 abc", "")
    expect(said(page)).to_contain_text("no type.ppm")
    expect(cards(page)).to_have_count(12)


def test_click_on_a_result_searches_with_it(page, served):
    page.locator(".sc-strip:visible .sc-card").first.click()
    expect(cards(page)).to_have_count(12)
    clicked = int(cards(page).nth(3).get_attribute("data-id"))
    cards(page).nth(3).click()
    expect(said(page)).to_contain_text(Path(served.gallery.item(clicked).source).name)
    shown = [int(card.get_attribute("data-id")) for card in cards(page).all()]
    assert shown == [hit.id for hit in served.gallery.search(served.gallery.vector(clicked), 12, exclude_ids=[clicked])]


def test_filters(page, served):
    upload(page, served.probe.source)
    expect(cards(page)).to_have_count(12)
    open_options(page)
    page.get_by_label("Camera", exact=True).click()
    page.get_by_role("option", name="3", exact=True).click()
    expect(page.locator(".sc-grid:visible .sc-facts", has_text="camera 3")).to_have_count(12)
    page.keyboard.press("Escape")
    condition = page.get_by_label("Condition")
    condition.fill("identity = nobody")
    condition.press("Enter")
    expect(said(page)).to_contain_text("Nothing found")
    condition.fill("colour = red")
    condition.press("Enter")
    expect(page.locator(".sc-problem:visible")).to_contain_text("fields: label, identity, camera")


def test_broken_file_is_explained_and_the_app_goes_on(page, served, tmp_path):
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(Path(served.probe.source).read_bytes()[:700])
    upload(page, broken)
    problem = page.locator(".sc-problem:visible")
    expect(problem).to_contain_text("broken.jpg: not a readable picture")
    expect(problem).not_to_contain_text("/")
    expect(page.get_by_test_id("toast-body")).to_contain_text("broken.jpg")
    upload(page, served.probe.source)
    expect(cards(page)).to_have_count(12)
    expect(problem).to_have_count(0)
    hand_over(page, "drop", "notes.txt", b"hello", "text/plain")
    expect(problem).to_contain_text("notes.txt: not a readable picture")
    deep = tmp_path / "deep.tif"  # no browser shows 16-bit TIFF; the preview must
    Image.fromarray(np.linspace(0, 65535, 2048).astype(np.uint16).reshape(64, 32)).save(deep)
    upload(page, deep)
    expect(cards(page)).to_have_count(12)
    expect(page.locator(".sc-query:visible img")).to_have_attribute("src", re.compile("webp"))


def test_hostile_labels_stay_text(page, served):
    hostile = served.gallery.items('source = "' + served.gallery.items("camera != 9")[-1].source + '"')[0]
    upload(page, hostile.source)
    card = page.locator(f'.sc-grid:visible [data-id="{hostile.id}"]')
    expect(card).to_contain_text(hostile.label)
    assert "{{#each}} ${1+1} <i>.jpg" in card.get_attribute("title")
    open_options(page)
    page.get_by_label("Label", exact=True).click()
    expect(page.get_by_role("option")).to_contain_text(hostile.label)
    assert page.evaluate("window.hacked") is None


def test_reid_marks_right_and_wrong(page, served):
    page.get_by_role("tab", name="Re-ID").click()
    upload(page, served.probe.source)
    expect(page.get_by_label("Probe's identity")).to_have_value(served.probe.identity)
    expect(page.get_by_label("Probe's camera")).to_have_value(served.probe.camera)
    expect(cards(page)).to_have_count(12)
    for card in cards(page).all():
        item = served.gallery.item(int(card.get_attribute("data-id")))
        assert (item.identity, item.camera) != (served.probe.identity, served.probe.camera)
        kind = "open" if item.identity is None else "right" if item.identity == served.probe.identity else "wrong"
        sign = {"right": "✓", "wrong": "✗", "open": "?"}[kind]
        expect(card.locator(f".sc-{kind}")).to_have_text(sign)
    for kind in ("right", "wrong"):
        assert page.locator(f".sc-grid:visible .sc-{kind}").count() > 0
    page.get_by_label("Probe's identity").fill("0000 nobody")
    page.get_by_label("Probe's identity").press("Enter")
    expect(page.locator(".sc-grid:visible .sc-right")).to_have_count(0)


def test_reid_probe_from_the_gallery(page, served):
    page.get_by_role("tab", name="Re-ID").click()
    example = page.locator(".sc-strip:visible .sc-card").first
    item = served.gallery.item(int(example.get_attribute("data-id")))
    example.click()
    expect(page.get_by_label("Probe's identity")).to_have_value(item.identity)
    expect(page.locator(f'.sc-grid:visible [data-id="{item.id}"]')).to_have_count(0)
    expect(page.locator(".sc-grid:visible .sc-mark")).to_have_count(12)
    open_options(page)
    page.get_by_label("Other cameras only").check()
    expect(page.locator(".sc-grid:visible .sc-facts", has_text=f"camera {item.camera}")).to_have_count(0)


def test_classify_shows_bars(page, served):
    page.get_by_role("tab", name="Classify").click()
    expect(page.get_by_text("87.3%")).to_be_visible()
    page.locator(".sc-strip:visible .sc-card").first.click()
    expect(page.get_by_test_id("label-output-value")).to_be_visible()
    expect(page.locator(".confidence-set:visible")).to_have_count(5)


@pytest.mark.parametrize("tab", ["Search", "Re-ID", "Classify"])
def test_nothing_is_wider_than_a_phone(browser: Browser, served, tab):
    context = browser.new_context(viewport={"width": 390, "height": 844}, color_scheme="dark")
    page = context.new_page()
    page.goto(served.url)
    page.get_by_role("tab", name=tab).click()
    page.locator(".sc-strip:visible .sc-card").first.click()
    page.locator(".sc-grid:visible, [data-testid=label-output-value]:visible").first.wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    context.close()


def test_nothing_is_fetched_from_elsewhere(browser: Browser, served):
    page = browser.new_page()
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(served.url)
    page.locator(".sc-strip:visible .sc-card").first.click()
    expect(cards(page)).to_have_count(12)
    assert [url for url in asked if not url.startswith((served.url, "data:", "blob:"))] == []
    page.close()
