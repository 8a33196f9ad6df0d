"""The page in a real browser, in front of the real process: what it shows, to whom, how it looks.

Run with `pytest -m browser .ci/test_browser.py`, where Debian's chromium is and what
requirements-browser.txt lists. SHOTS=folder keeps a picture of every scene at either width and in
either colour scheme; with PICTURE=contrib/page.png and `-k demo` the README's is made.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from playwright.async_api import Page, async_playwright, expect

import test_jano
from test_jano import JANO, Backend, Running, entry, event, running_jano, swap_script

pytestmark = pytest.mark.browser
chat, code = test_jano.chat, test_jano.code  # fixtures
expect.set_options(timeout=10_000)  # milliseconds; the demo is to be understood within them

STATUS = 'if [ "$1" = status ]; then echo "chat: loaded"; exit; fi\n'
SCRIPT = """const later = setTimeout; setTimeout = (wake, ms) => later(wake, ms / 5);  // impatient,
const right = Date.now; Date.now = () => right() + 36e5;    // an hour fast, and with no dialog
alert = text => console.error("alert", text);"""
HOSTILE = ["chat", "<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "</text></svg><i>",
           "__proto__", "constructor", "\u202eevil\u202e", "a\"b'c`${1}\\", "&lt;i&#62;", "x" * 200,
           "שלום־עולם", "🦙👩‍👩‍👧"]

# The text that stands out least from what is painted behind its middle (WCAG 2.2, 1.4.3).
CONTRAST = """() => {
  const pen = new OffscreenCanvas(1, 1).getContext("2d", {willReadFrequently: true}), seen = [];
  const paint = (colour, alpha = 1) => {              // the relative luminance then, plus 0.05
    pen.fillStyle = "transparent", pen.fillStyle = colour, pen.globalAlpha = alpha;
    pen.fillRect(0, 0, 1, 1);
    const [r, g, b] = [...pen.getImageData(0, 0, 1, 1).data].map(v => v / 255).map(
      v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
    return .2126 * r + .7152 * g + .0722 * b + .05; };
  const walk = document.createTreeWalker(document.body, 4), range = document.createRange();
  for (let text; text = walk.nextNode(); ) {
    range.selectNode(text);
    const [box] = range.getClientRects(), style = getComputedStyle(text.parentElement);
    if (!box?.width || !text.data.trim()) continue;
    const under = document.elementsFromPoint(box.x + box.width / 2, box.y + box.height / 2);
    let back = paint("white");
    for (const node of under.reverse()) {
      const {fill, opacity, backgroundColor} = getComputedStyle(node);
      back = paint(node.tagName === "rect" ? fill : backgroundColor, opacity); }
    const ink = paint(text.parentElement.closest("svg") ? style.fill : style.color);
    seen.push([under[0] && Math.max(ink, back) / Math.min(ink, back), text.data]); }
  return seen.sort((one, other) => one[0] - other[0])[0]; }"""

Browse = Callable[..., Awaitable[Page]]


@pytest.fixture
async def browse(tmp_path: Path) -> AsyncIterator[Browse]:
    """Opens a page; nothing but what is expected may go wrong in it, or be said on its console."""
    faults: list[str] = []
    expected = ["^asked data:,$"]

    async def open_page(url: str, *more: str) -> Page:
        expected.extend((f"^asked {url}/", *more))
        page = await context.new_page()
        page.on("pageerror", lambda error: faults.append(f"error {error}"))
        page.on("console", lambda said: faults.append(f"console {said.text}"))
        page.on("request", lambda request: faults.append(f"asked {request.url}"))
        await page.add_init_script(SCRIPT)
        await page.goto(f"{url}/")
        return page

    async with async_playwright() as playwright:
        context = await playwright.chromium.launch_persistent_context(
            tmp_path / "profile", executable_path="/usr/bin/chromium", args=["--no-sandbox"])
        yield open_page
        await context.close()
    assert [fault for fault in faults if not re.search("|".join(expected), fault)] == []


async def queue(jano: Running, *models: str) -> list[asyncio.Task[Any]]:
    """Ask each, as soon as the one before is in the queue."""
    asks = []
    for number, model in enumerate(models, 1):
        asks.append(asyncio.create_task(jano.ask(model)))
        await jano.logged("enqueued", number)
    return asks


def chips(order: str) -> list[str]:
    """What stands for the requests of the burst. A name's writing direction is isolated."""
    return [f"{id} \u2068{'chat' if id in '134' else 'code'}\u2069" for id in order]


async def redrawn(page: Page) -> None:
    await page.evaluate("document.querySelector('#chart text')?.setAttribute('id', 'old')")
    await expect(page.locator("#old")).to_have_count(0)


async def inspect(page: Page, scene: str) -> None:
    """It fits and can be read, at both widths and in both schemes."""
    for width in (1280, 375):
        await page.set_viewport_size({"width": width, "height": 3000})
        await redrawn(page)
        for scheme in ("light", "dark"):
            await page.emulate_media(color_scheme=scheme)
            assert await page.evaluate("document.documentElement.scrollWidth") <= width, scene
            weakest = await page.evaluate(CONTRAST)
            assert weakest[0] >= 4.5, (scene, width, scheme, weakest)
            if folder := os.environ.get("SHOTS"):
                await page.locator("body").screenshot(path=f"{folder}/{scene}-{width}-{scheme}.png")


# ---------------------------------------------------------------------------------- tests ----


async def test_burst_is_followed_live_from_the_first_request_to_the_last_answer(
    browse: Browse, tmp_path: Path, chat: Backend, code: Backend
) -> None:
    swap = swap_script(tmp_path, STATUS + "until [ -e go ]; do sleep 0.05; done")
    models, chat.answer, code.answer = [entry(chat), entry(code)], chat.held, code.held
    title = "\u2068{}\u2069 is {} · {} waiting — jano"
    async with running_jano(tmp_path, models, swap) as jano, await browse(jano.url) as page:
        await expect(page).to_have_title(title.format("chat", "loaded", 0))
        await expect(page.locator("#hint")).to_contain_text('--json \'{"model": "chat"')
        await inspect(page, "idle")

        asks = await queue(jano, "chat", "code", "chat", "chat", "code", "code")
        await expect(page).to_have_title(title.format("chat", "loaded", 5))
        chat.release.set()
        await expect(page).to_have_title(title.format("code", "being swapped in", 3))
        await expect(page.locator("#chart")).to_contain_text("\u2068chat\u2069 → \u2068code")
        await expect(page.locator("#answered li")).to_have_text(chips("134"))
        await inspect(page, "swap")

        (tmp_path / "go").touch()
        await expect(page).to_have_title(title.format("code", "loaded", 2))
        code.release.set()
        await asyncio.gather(*asks)
        await expect(page.locator("#asked li")).to_have_text(chips("123456"))
        await expect(page.locator("#answered li")).to_have_text(chips("134256"))
        for mark, count in (("#asked .turn", 3), ("#answered .turn", 1), (".run", 6), (".swap", 1)):
            await expect(page.locator(mark)).to_have_count(count)
        await expect(page.locator("html[lang=en] body")).to_match_aria_snapshot("""
            - banner:
              - heading "jano" [level=1]
              - paragraph: /code.* is loaded/
              - paragraph: /Swaps avoided. 2, about \\d.\\d s saved/
            - main:
              - alert
              - list:
                - listitem: 1 swaps made
              - heading /as asked. 3/ [level=2]
              - heading /as answered. 1/ [level=2]
              - heading "Timeline" [level=2]
              - img /code.* is loaded · 0 waiting/""")
        await page.evaluate("window.kept = document.querySelector('#answered li')")
        await inspect(page, "burst")
        assert await page.evaluate("window.kept.isConnected")  # nobody's selection is lost
        end = page.locator("#chart .dim.end").first
        await expect(end).to_have_text(re.compile(r"^\d\.\d s ago"))


async def test_names_are_inert(browse: Browse, tmp_path: Path, chat: Backend) -> None:
    async def fail(request: web.Request) -> web.StreamResponse:
        return web.Response(status=500)

    swap = swap_script(tmp_path, STATUS + '[ "$1" != __proto__ ]')
    models, chat.answer = [{"name": name, "url": chat.url} for name in HOSTILE], fail
    async with running_jano(tmp_path, models, swap) as jano:
        async with await browse(jano.url, "Content Security Policy", f"^asked {chat.url}") as page:
            await expect(page.locator("#quiet")).to_contain_text("__proto__")
            await asyncio.gather(*await queue(jano, *HOSTILE))
            for name in HOSTILE:
                await expect(page.locator("#chart")).to_contain_text(name[:29])
            await expect(page.locator("#quiet")).to_contain_text("\u2069, \u2068the backend")
            for mark, count in (("script", 1), ("img, i", 0), (".bad", 12), (".lost", 1)):
                await expect(page.locator(mark)).to_have_count(count)
            await inspect(page, "hostile")
            await page.evaluate("""home => {                    // what if one got in all the same
              document.body.insertAdjacentHTML("beforeend", "<img src='data:,' onerror=alert(1)>");
              const script = document.createElement("script");
              document.body.append(Object.assign(script, {text: "alert(2)"}));
              return fetch(home, {method: "POST"}).catch(() => {}); }""", chat.url)
            await redrawn(page)
            assert len(chat.requests) == len(HOSTILE) - 1


async def test_long_queue_fits(browse: Browse, tmp_path: Path, chat: Backend) -> None:
    chat.answer = chat.held
    async with running_jano(tmp_path, [entry(chat)]) as jano, await browse(jano.url) as page:
        asks = await queue(jano, *["chat"] * 81)
        await expect(page.locator("#chart")).to_contain_text("80 waiting")
        await expect(page.locator("#chart rect.wait")).to_have_count(81)
        await inspect(page, "crowd")
        assert await page.evaluate("document.querySelector('#chart').clientHeight") < 500
        chat.release.set()
        await asyncio.gather(*asks)


async def test_key_is_asked_for(browse: Browse, tmp_path: Path, chat: Backend) -> None:
    async with running_jano(tmp_path, [entry(chat)], JANO_API_KEY="sesame") as jano:
        async with await browse(jano.url, "401") as page:
            key, alert = page.get_by_label("API key"), page.get_by_role("alert")
            await expect(key).to_be_focused()
            await inspect(page, "door")
            await page.keyboard.type("wrong\n")
            await expect(alert).to_have_text("That is not the key.")
            await expect(key).to_be_focused()
            await page.keyboard.type("sesame")
            await page.keyboard.press("Tab")
            await page.keyboard.press("Enter")
            await expect(page.locator("#tiles")).to_be_visible()
            await expect(alert).to_be_empty()
            await page.reload()  # it is kept, for the session only
            await expect(page.locator("#tiles")).to_be_visible()
            assert await page.evaluate("localStorage.length + document.cookie.length") == 0


async def test_page_outlives_jano(browse: Browse, tmp_path: Path, chat: Backend) -> None:
    async with running_jano(tmp_path, [entry(chat)]) as jano:
        page = await browse(jano.url, "ERR_", "503")
        await expect(page.locator("#tiles")).to_be_visible()
    await expect(page.get_by_role("alert")).to_have_text("Jano unreachable, retrying")
    async with running_jano(tmp_path, [entry(chat)], JANO_PORT=jano.port):
        await expect(page.get_by_role("alert")).to_be_empty()
        await expect(page).to_have_title(re.compile("0 waiting — jano"))


async def test_demo_is_followed(browse: Browse, tmp_path: Path) -> None:
    demo = await asyncio.create_subprocess_exec(
        sys.executable, str(JANO), "--demo", cwd=tmp_path, stdout=asyncio.subprocess.PIPE)
    assert demo.stdout
    try:
        while not (found := re.search(rb"http://[\d.]+:\d+", await event(demo.stdout.readline()))):
            pass
        async with await browse(found[0].decode()) as page:
            await expect(page.locator("#answered li")).to_have_text(chips("134256"))
            await expect(page.locator("#saved")).to_contain_text("avoided: 2, about")
            if picture := os.environ.get("PICTURE"):
                await expect(page.locator("#chart .dim.end").first).to_contain_text("ago")
                await page.locator("body").screenshot(path=picture)
    finally:
        demo.send_signal(signal.SIGINT)
        assert await event(demo.wait()) == 0
