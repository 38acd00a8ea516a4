"""Takes the pictures of the documentation: python tests/browser/screenshots.py URL FOLDER [--dark]."""

import sys
from pathlib import Path

from playwright.sync_api import Browser, Page, sync_playwright

CHROMIUM = Path("/usr/bin/chromium")
CHROMIUM_OPTIONS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
LAPTOP, PHONE = (1280, 800), (390, 844)


def main(url: str, folder: Path, scheme: str = "light") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=CHROMIUM_OPTIONS)
        shots = {
            "search": ("Search", LAPTOP),
            "reid": ("Re-ID", LAPTOP),
            "identities": ("Identities", LAPTOP),
            "classify": ("Classify", LAPTOP),
            "phone": ("Re-ID", PHONE),
        }
        for name, (tab, size) in shots.items():
            page = open_tab(browser, url, tab, size, scheme)
            if page is not None:
                page.screenshot(path=folder / f"app-{name}.png", full_page=name == "phone")
                page.context.close()
        browser.close()


def open_tab(browser: Browser, url: str, tab: str, size: tuple[int, int], scheme: str) -> Page | None:
    """The tab with the answer for its second example; None if the app has no such tab."""
    width, height = size
    context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
    page = context.new_page()
    page.set_default_timeout(20_000)
    page.goto(url)
    page.get_by_role("tab", name="Search").wait_for()
    if page.get_by_role("tab", name=tab).count() == 0:
        context.close()
        return None
    page.get_by_role("tab", name=tab).click()
    page.locator(".sc-strip:visible .sc-card").nth(1).click()
    page.locator(".sc-grid:visible, [data-testid=label-output-value]:visible").first.wait_for()
    page.mouse.move(0, 0)
    page.wait_for_timeout(1500)  # the preview and the filled-in fields arrive beside the results
    return page


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), "dark" if "--dark" in sys.argv else "light")
