"""The live page as a person meets it: in Chromium, on a service with a key, a Valkey and publishers."""

from __future__ import annotations

import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import yaml

from serve_app.access import hash_key
from serve_app.client import AsyncKVCacheClient
from tests.contract.score_server import PROMPT, Service
from tests.contract.serve_router import SIZE, TOKENS, Fleet

if TYPE_CHECKING:
    from playwright.async_api import Browser, Page

playwright = pytest.importorskip("playwright.async_api", reason="playwright is not installed (make setup)")

ROOT = Path(__file__).parents[2]
_FOUND = subprocess.run([ROOT / "scripts" / "chromium.sh", "--path"], check=False, capture_output=True, text=True)
CHROMIUM = _FOUND.stdout.strip()
WAIT_MS = 30_000  # the page asks every two seconds; a busy machine is slow

pytestmark = pytest.mark.skipif(not CHROMIUM, reason="Chromium is not installed (make chromium)")


class Seen:
    """A tab, and what went wrong in it."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.asked: set[str] = set()  # hosts
        self.errors: list[str] = []
        page.set_default_timeout(WAIT_MS)
        page.on("request", lambda request: self.asked.add(request.url.split("/")[2]))
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("console", lambda message: self.errors.append(message.text) if message.type == "error" else None)

    async def has(self, text: str) -> None:
        await self.page.get_by_text(text).first.wait_for()

    async def fits(self) -> bool:
        """Nothing has to be scrolled sideways."""
        root = "document.documentElement"
        return bool(await self.page.evaluate(f"{root}.scrollWidth <= {root}.clientWidth"))

    async def contrasts(self) -> list[float]:
        """Of each colour of text against the card that it is on (WCAG 2.2); AA is 4.5."""
        found: list[float] = await self.page.evaluate(
            """() => {
                const probe = document.body.appendChild(document.createElement("i"));
                const light = (name) => {
                    probe.style.color = `var(--${name})`;
                    const [r, g, b] = getComputedStyle(probe).color.match(/[\\d.]+/g).map((part) => part / 255)
                        .map((part) => (part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4));
                    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
                };
                const card = light("card");
                return ["text", "quiet", "accent", "good", "warn", "bad"].map(light)
                    .map((ink) => (Math.max(ink, card) + 0.05) / (Math.min(ink, card) + 0.05));
            }"""
        )
        return found


@pytest.fixture
async def browser() -> AsyncIterator[Browser]:
    async with playwright.async_playwright() as driver:
        browser = await driver.chromium.launch(executable_path=CHROMIUM, timeout=2 * WAIT_MS)
        yield browser
        await browser.close()


async def test_a_person_sees_where_the_last_request_went_and_why(
    browser: Browser, redis_url: str, fleet: Fleet, tmp_path: Path
) -> None:
    keys = tmp_path / "keys"
    keys.write_text(yaml.safe_dump({"keys": [{"name": "me", "sha256": hash_key("secret"), "admin": True}]}))
    service = Service(redis_url, auth={"keys_file": str(keys)})
    await service.started()
    seen = Seen(await browser.new_page())
    page = seen.page

    # The key is asked for, and a wrong one is refused.
    await page.goto(f"{service.url}/kvcache/")
    await page.get_by_label("Key with").fill("wrong")
    await page.get_by_role("button", name="Show the fleet").click()
    await seen.has("the key is not known here")
    seen.errors.clear()  # Chromium's own of the two answers with status 401
    await page.get_by_label("Key with").fill("secret")
    await page.get_by_role("button", name="Show the fleet").click()

    # Without data it says why, and what to do.
    await seen.has("No replica has registered in Redis yet")
    await seen.has("No decision yet")
    await seen.has("Nothing to compare yet")

    # Publishers join, and requests are routed.
    for pod, holds in (("a", 6), ("b", 2), ("c", 0)):
        fleet.join_plain(pod, holds=holds)
    longer = [*TOKENS, *range(300, 340)]
    async with AsyncKVCacheClient(service.url, key="secret") as kv:
        while len((await kv.score(PROMPT)).scores) < 3 or not (await kv.score(PROMPT)).scores["a"]:
            pass
        assert (await kv.choose(PROMPT, request_id="first")).chosen.pod == "a"
        assert await kv.done("first", prompt_tokens=len(TOKENS), cached_tokens=6 * SIZE)
        assert (await kv.choose({**PROMPT, "prompt": longer}, request_id="second")).chosen.pod == "a"
        assert await kv.done("second", prompt_tokens=len(longer), cached_tokens=6 * SIZE)
        await kv.choose({**PROMPT, "prompt": "a secret of the user's"}, request_id="third", pods=["c"])

    # The newest is explained without being asked for; one that is picked stays.
    await seen.has("No replica holds any of it; ")
    await page.get_by_role("listitem").filter(has_text="60%").get_by_role("button").click()
    why = page.get_by_role("article")
    await why.get_by_text("a holds 24 of the 40 prompt tokens").wait_for()
    rows = why.get_by_role("row")
    names = [await rows.nth(i).get_by_role("rowheader").text_content() for i in (1, 2, 3)]
    assert names == ["a (chosen)", "b", "c"]
    bars = why.get_by_role("img")
    assert "compute" in (await bars.first.get_attribute("aria-label") or "")
    widths = [await bars.nth(i).locator("span").evaluate_all(TOTAL_WIDTH) for i in range(3)]
    assert widths[0] < widths[1] < widths[2]
    assert await why.get_by_text("2 requests seen, all at one replica").count() == 1
    assert await why.get_by_text("exact", exact=True).count() == 1
    await page.get_by_role("button", name="Follow the newest").click()
    await seen.has("No replica holds any of it; ")

    # The fleet, what came of the predictions, and health.
    tile = page.locator(".tile").filter(has_text="from cache").first
    assert "6 gpu" in await tile.inner_text()
    assert await page.get_by_role("img", name="of 2 predictions exact").count() == 1
    await seen.has("answers in")
    assert "secret of" not in await page.content()

    # Light and dark, wide and narrow.
    grounds = set()
    for scheme in ("light", "dark"):
        await page.emulate_media(color_scheme=scheme)
        grounds.add(await page.evaluate("getComputedStyle(document.body).backgroundColor"))
        assert min(await seen.contrasts()) >= 4.5
    assert len(grounds) == 2
    for width in (360, 700, 1280):
        await page.set_viewport_size({"width": width, "height": 800})
        assert await seen.fits(), f"at {width} pixels"

    # The key is this tab's; the page is the same without the prefix; it asked nobody else, and nothing was refused.
    await page.goto(f"{service.url}/")
    await seen.has("No replica holds any of it; ")
    other = await (await browser.new_context()).new_page()
    await other.goto(f"{service.url}/kvcache/")
    await other.get_by_text("This service wants a key").wait_for()
    assert seen.asked == {service.url.removeprefix("http://")}
    assert seen.errors == []
    await page.close()
    await service.close()


TOTAL_WIDTH = "(parts) => parts.reduce((total, part) => total + part.getBoundingClientRect().width, 0)"
