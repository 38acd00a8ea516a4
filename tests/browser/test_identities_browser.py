"""The tab Identities. Each test has people of its own, so that none sees what another has changed."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, Locator, Page, expect

from serve.gallery import Gallery
from serve.samples import Sample
from tests.browser.page_parts import cards, said, upload, visited

pytestmark = pytest.mark.browser

HOSTILE = """<img src=x onerror="window.hacked=1">{{#each}}${window.hacked=1}'"""


@pytest.fixture
def page(browser: Browser, identities):
    with visited(browser, identities.url) as page:
        open_tab(page, "Identities")
        yield page


def open_tab(page: Page, *names: str) -> None:
    for name in names:
        page.get_by_role("tab", name=name, exact=True).click()


def verdict(page: Page) -> Locator:
    return page.locator(".sc-verdict:visible")


def noise(folder: Path, seed: int) -> Path:
    path = folder / f"noise {seed}.png"
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (64, 32, 3), np.uint8)).save(path)
    return path


def enrolled(gallery: Gallery, folder: Path, name: str, count: int = 3) -> list[int]:
    """Somebody new in as many pictures, each from a camera of its own."""
    samples = []
    for i in range(count):
        path = noise(folder, sum(map(ord, name)) * 100 + i)
        samples.append(Sample(str(path.rename(folder / f"{i}.png")), identity=name, camera=str(i)))
    return list(gallery.add(samples).ids)


def choose(page: Page, name: str) -> None:
    open_tab(page, "Everybody")
    page.locator(".sc-person:visible").first.wait_for()
    row = listed(page, name)
    expect(row).to_have_count(1)
    row.click()
    expect(verdict(page)).to_contain_text(name)


def section(page: Page, name: str) -> None:
    page.locator("button:visible", has_text=name).first.click()


def listed(page: Page, part: str) -> Locator:
    page.get_by_label("Find").fill(part)
    return page.locator(".sc-person:visible b")


def test_identify_known(page, identities):
    upload(page, identities.probe.source)
    expect(verdict(page).locator("b")).to_have_text(identities.probe.identity)
    expect(verdict(page)).to_contain_text("probability of the best")
    expect(page.locator(".sc-known:visible")).to_have_count(1)
    expect(cards(page)).to_have_count(6)
    expect(cards(page).first).to_contain_text(f"id {identities.probe.identity}")


def test_identify_unknown_and_a_click_on_a_candidate(page, identities, tmp_path):
    upload(page, noise(tmp_path, 1))
    expect(verdict(page).locator("b")).to_have_text("UNKNOWN")
    best = int(cards(page).first.get_attribute("data-id"))
    cards(page).first.click()
    expect(cards(page).first).not_to_have_attribute("data-id", str(best))  # it does not find itself
    section(page, "Options")
    page.get_by_label("Condition").fill("identity = nobody")
    page.get_by_label("Condition").press("Enter")
    expect(verdict(page)).to_contain_text("nobody enrolled is left")


def test_without_a_threshold_nothing_is_decided(page, served):
    page.goto(served.url)
    open_tab(page, "Identities")
    upload(page, served.probe.source)
    expect(verdict(page).locator("b")).to_have_text("Undecided")
    expect(verdict(page)).to_contain_text("simclr app --threshold-file FILE")
    assert page.evaluate("document.documentElement.scrollWidth") == 1280


def test_enrol_an_upload(page, identities, tmp_path):
    path = noise(tmp_path, 2)
    upload(page, path)
    expect(verdict(page).locator("b")).to_have_text("UNKNOWN")
    section(page, "Enrol the probe")
    page.get_by_role("button", name="Enrol", exact=True).click()
    expect(page.locator(".sc-problem:visible")).to_contain_text("a name here")
    name = page.get_by_label("Name: somebody enrolled, or new")
    name.fill("Eve Enrolled")
    name.press("Enter")
    page.get_by_label("Camera, if known").fill("door")
    page.get_by_label("Camera, if known").press("Enter")
    page.get_by_role("button", name="Enrol", exact=True).click()
    expect(said(page).filter(has_text="enrolled as Eve Enrolled")).to_have_count(1)
    (item,) = identities.gallery.items('identity = "Eve Enrolled"')
    assert (item.camera, Path(item.source).parent) == ("door", identities.gallery.folder / "pictures")
    upload(page, path)
    open_tab(page, "Re-ID")  # its choices are the new ones
    page.get_by_label("Probe's identity").click()
    page.get_by_label("Probe's identity").fill("Eve")
    expect(page.get_by_role("option", name="Eve Enrolled")).to_be_visible()


def test_the_first_identity_makes_the_tab_re_id_appear(page, empty, tmp_path):
    page.goto(empty)
    open_tab(page, "Identities", "Everybody")
    expect(said(page).first).to_contain_text("Nobody is enrolled yet")
    open_tab(page, "Identify")
    upload(page, noise(tmp_path, 3))
    expect(verdict(page)).to_contain_text("nobody enrolled is left")
    section(page, "Enrol the probe")
    name = page.get_by_label("Name: somebody enrolled, or new")
    name.fill("Ada")
    name.press("Enter")
    page.get_by_role("button", name="Enrol", exact=True).click()
    open_tab(page, "Re-ID")
    upload(page, noise(tmp_path, 4))
    expect(cards(page)).to_have_count(1)


def test_rename(page, identities, tmp_path):
    enrolled(identities.gallery, tmp_path, "Rita")
    choose(page, "Rita")
    expect(cards(page)).to_have_count(3)
    section(page, "Rename")
    field = page.get_by_label("New name, which nobody has")
    field.fill(identities.probe.identity)
    field.press("Enter")
    expect(page.locator(".sc-problem:visible")).to_contain_text("is taken; nothing was changed")
    field.fill("Rosa")
    field.press("Enter")
    expect(said(page)).to_contain_text("3 pictures of Rita are Rosa now")
    expect(verdict(page)).to_contain_text("Rosa")
    expect(page.locator(".sc-grid:visible .sc-facts", has_text="id Rosa")).to_have_count(3)
    expect(listed(page, "Rosa")).to_have_count(1)
    expect(listed(page, "Rita")).to_have_count(0)


def test_merge(page, identities, tmp_path):
    for name in ("Mia", "Max"):
        (tmp_path / name).mkdir()
        enrolled(identities.gallery, tmp_path / name, name)
    page.reload()  # for the choices
    open_tab(page, "Identities")
    choose(page, "Mia")
    section(page, "Merge into another")
    page.get_by_role("button", name="Merge", exact=True).click()
    expect(page.locator(".sc-problem:visible")).to_contain_text("choose the other identity")
    page.get_by_label("The other identity").click()
    page.get_by_label("The other identity").fill("Max")
    page.get_by_role("option", name="Max").click()
    page.get_by_role("button", name="Merge", exact=True).click()
    expect(said(page)).to_contain_text("3 pictures of Mia are Max now")
    expect(cards(page)).to_have_count(6)
    assert identities.gallery.count("identity = Max") == 6


def test_split(page, identities, tmp_path):
    ids = enrolled(identities.gallery, tmp_path, "Sam")
    choose(page, "Sam")
    section(page, "Split off some pictures")
    field = page.get_by_label("New name for the marked pictures")
    field.fill("Sue")
    field.press("Enter")
    expect(page.locator(".sc-problem:visible")).to_contain_text("no picture is marked")
    for place in (0, 1, 0):  # the first is marked and unmarked
        cards(page).nth(place).click()
    expect(page.locator(".sc-marked")).to_have_count(1)
    field.press("Enter")
    expect(said(page)).to_contain_text("1 pictures of Sam are Sue now")
    expect(cards(page)).to_have_count(2)
    assert identities.gallery.ids("identity = Sue").tolist() == [ids[1]]


def test_forget_wants_the_name(page, identities, tmp_path):
    enrolled(identities.gallery, tmp_path, "Fred")
    choose(page, "Fred")
    section(page, "Forget")
    button = page.get_by_role("button", name="Forget for good")
    button.click()
    expect(page.locator(".sc-problem:visible")).to_contain_text("to forget Fred, type this name; nothing was changed")
    assert identities.gallery.count("identity = Fred") == 3
    page.get_by_label("Type the name to confirm").fill("Fred")
    button.click()
    expect(said(page).filter(has_text="3 pictures are forgotten")).to_have_count(1)
    expect(button).to_be_hidden()
    expect(listed(page, "Fred")).to_have_count(0)
    assert identities.gallery.count("identity = Fred") == 0


def test_worst_queries_first(page):
    open_tab(page, "Review")
    page.get_by_role("button", name="Find the worst queries").click()
    queries = page.locator(".sc-narrow:visible .sc-card")
    expect(queries).to_have_count(12)
    precision = [float(text.rstrip("%")) for text in queries.locator(".sc-score").all_inner_texts()]
    assert precision == sorted(precision)
    ranked = page.locator(".sc-grid:not(.sc-narrow):visible")
    expect(ranked.locator(".sc-mark")).to_have_count(24)  # of the worst
    before = ranked.inner_text()
    queries.nth(5).click()
    expect(ranked).not_to_have_text(before)
    expect(ranked.locator(".sc-wrong").first).to_be_visible()


def test_confusable_pairs_open_an_identity(page, identities, tmp_path):
    (tmp_path / "twin").mkdir()
    enrolled(identities.gallery, tmp_path, "Tom One", count=1)
    shutil.copy(tmp_path / "0.png", tmp_path / "twin" / "0.png")
    identities.gallery.add([Sample(str(tmp_path / "twin" / "0.png"), identity="Tom Two")])
    open_tab(page, "Review")
    page.get_by_role("button", name="Find confusable pairs").click()
    pair = page.locator(".sc-pair").first
    expect(pair).to_contain_text("Tom One and Tom Two")
    expect(pair.locator("figcaption")).to_contain_text("1.000")
    pair.locator(".sc-card").nth(1).click()
    expect(verdict(page)).to_contain_text("Tom Two")
    expect(page.get_by_role("tab", name="Everybody")).to_have_attribute("aria-selected", "true")


def test_hostile_names_stay_text(page, identities, tmp_path):
    ids = enrolled(identities.gallery, tmp_path, HOSTILE)
    open_tab(page, "Everybody")
    row = listed(page, "onerror")
    expect(row).to_have_count(1)
    expect(row).to_have_text(HOSTILE)
    row.click()
    expect(verdict(page).locator("b")).to_have_text(HOSTILE)
    expect(cards(page).first).to_contain_text(HOSTILE)
    section(page, "Rename")
    field = page.get_by_label("New name, which nobody has")
    field.fill(HOSTILE + " 2")
    field.press("Enter")
    expect(said(page)).to_contain_text(f"are {HOSTILE} 2 now")
    open_tab(page, "Review")
    page.get_by_role("button", name="Find confusable pairs").click()
    page.locator(".sc-pair").first.wait_for()
    open_tab(page, "Identify")
    upload(page, identities.gallery.item(ids[0]).source)
    expect(verdict(page).locator("b")).to_have_text(HOSTILE + " 2")
    assert page.evaluate("window.hacked") is None


@pytest.mark.parametrize("tab", ["Identify", "Everybody", "Review"])
def test_nothing_is_wider_than_a_phone(browser: Browser, identities, tab):
    context = browser.new_context(viewport={"width": 360, "height": 800}, color_scheme="dark")
    page = context.new_page()
    page.goto(identities.url)
    open_tab(page, "Identities", tab)
    if tab == "Identify":
        page.locator(".sc-strip:visible .sc-card").first.click()
        verdict(page).wait_for()
        section(page, "Enrol the probe")
    elif tab == "Everybody":
        page.locator(".sc-person:visible").first.click()
        cards(page).first.wait_for()
        section(page, "Forget")
    else:
        for button in ("Find confusable pairs", "Find the worst queries"):
            page.get_by_role("button", name=button).click()
        page.locator(".sc-pair:visible").first.wait_for()
        page.locator(".sc-narrow:visible .sc-card").first.wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    context.close()
