"""What the browser tests find on the page."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Browser, Locator, Page


@contextmanager
def visited(browser: Browser, url: str) -> Iterator[Page]:
    """The page at a laptop's size, patient as on a busy machine."""
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    page = context.new_page()
    page.set_default_timeout(20_000)
    page.goto(url)
    yield page
    context.close()


def cards(page: Page) -> Locator:
    return page.locator(".sc-grid:visible .sc-card")


def said(page: Page) -> Locator:
    return page.locator(":is(.sc-hint, .sc-problem):visible")


def upload(page: Page, file: Path | str) -> None:
    page.locator(".sc-query:visible input[type=file]").set_input_files(file)
