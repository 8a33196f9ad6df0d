"""The page in a real browser, in front of the real process: what it shows, to whom, how it looks.

It needs Debian's chromium and requirements.txt. SHOTS=folder keeps a picture of every scene at
either width and in either colour scheme; PICTURE=contrib/page.png and `-k demo` make the README's.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import CONTRIB, KEY, running
from playwright.async_api import Error, FloatRect, Locator, Page, async_playwright, expect

from test_jano import Backend, calls, entry, event, gate, running_jano, says, swap_script, until

expect.set_options(timeout=10_000)  # milliseconds

CONTRAST = Path(__file__).with_name("contrast.js").read_text()
CHAT_IS_LOADED = 'echo "chat: loaded"'
# Before the page's own script: it shall open no dialog, and be five times as fast.
NO_DIALOG = 'alert = (text) => console.error("alert", text);'
IMPATIENT = """const every = setInterval;
setInterval = (work, ms) => every(work, ms / 5);"""

CREDENTIALS = {"username": "anybody", "password": KEY}

Browse = Callable[..., Awaitable[Page]]


@pytest.fixture
async def browse(tmp_path: Path) -> AsyncIterator[Browse]:
    """Opens the page of a jano; whatever goes wrong in it must be expected.

    A fault is an error of its script, a line on its console, such as a violation of its Content
    Security Policy, or a request to somebody else; the arguments behind the URL are patterns of
    those that are expected. It refreshes every 0.2 s, unless `patient`. `options` are Playwright's.
    """
    faults: list[str] = []
    expected = ["asked data:,$"]

    async def open_page(url: str, *patterns: str, patient: bool = False, **options: Any) -> Page:
        expected.extend([f"asked {url}/", *patterns])
        context = await browser.new_context(**options)
        page = await context.new_page()
        page.on("pageerror", lambda error: faults.append(f"error {error}"))
        page.on("console", lambda said: faults.append(f"console {said.text}"))
        page.on("request", lambda request: faults.append(f"asked {request.url}"))
        await page.add_init_script(NO_DIALOG)
        if patient:
            await page.clock.install()
        else:
            await page.add_init_script(IMPATIENT)
        await page.goto(f"{url}/")
        return page

    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(
            executable_path="/usr/bin/chromium", args=["--no-sandbox"]
        )
        yield open_page
        await browser.close()
    assert [fault for fault in faults if not re.search("|".join(expected), fault)] == []


def isolated(name: str) -> str:
    """A name as the page shows it, in a writing direction of its own."""
    return f"\u2068{name}\u2069"


def requests(page: Page) -> Locator:
    """What stands for the requests in the timeline."""
    return page.locator("body > svg > svg:not(.swap)")


def swaps(page: Page) -> Locator:
    """What stands for the swaps."""
    return page.locator("body > svg > svg.swap")


async def box(place: Locator) -> FloatRect:
    """Where the first of these is drawn, in pixels."""
    found = await place.first.bounding_box()
    assert found
    return found


@contextlib.asynccontextmanager
async def asked_for_both(
    browse: Browse, folder: Path, chat: Backend, code: Backend
) -> AsyncIterator[Page]:
    """The page once chat, which was loaded, has answered, then code, after a swap."""
    swap = swap_script(folder, "sleep 0.5", status=CHAT_IS_LOADED)
    async with running_jano(folder, [entry(chat), entry(code)], swap) as jano:
        assert (await jano.ask("chat"))[0] == 200
        assert (await jano.ask("code"))[0] == 200
        async with await browse(jano.url) as page:
            yield page


async def refreshed(page: Page) -> None:
    """Wait until the page has been made anew since now."""
    await page.evaluate("document.body.setAttribute('data-old', '')")
    await expect(page.locator("body[data-old]")).to_have_count(0)


async def inspect(page: Page, scene: str) -> None:
    """It fits and can be read, at both widths and in both schemes."""
    for width in (1280, 320):
        await page.set_viewport_size({"width": width, "height": 3000})
        for scheme in ("light", "dark"):
            await page.emulate_media(color_scheme=scheme)
            assert await page.evaluate("document.documentElement.scrollWidth") <= width, scene
            weakest = await page.evaluate(CONTRAST)
            assert weakest[0] >= 4.5, (scene, width, scheme, weakest)
            folder = os.environ.get("SHOTS")
            if folder:
                await page.screenshot(path=f"{folder}/{scene}-{width}-{scheme}.png")


# ---------------------------------------------------------------- what is loaded, who waits ----


async def test_title_and_heading_say_what_is_loaded(
    browse: Browse, tmp_path: Path, chat: Backend
) -> None:
    async with running_jano(tmp_path, [entry(chat)]) as jano, await browse(jano.url) as page:
        await expect(page).to_have_title(f"{isolated('chat')} is loaded, 0 waiting · jano")
        await expect(page.locator("h1")).to_have_text(f"{isolated('chat')} is loaded")


async def test_title_and_heading_say_what_is_loading(
    browse: Browse, tmp_path: Path, chat: Backend, code: Backend
) -> None:
    swap = swap_script(tmp_path, gate(tmp_path), status=CHAT_IS_LOADED)
    async with (
        running_jano(tmp_path, [entry(chat), entry(code)], swap) as jano,
        await browse(jano.url) as page,
    ):
        await jano.queued("code", "code")
        await expect(page).to_have_title(f"{isolated('code')} is loading, 2 waiting · jano")
        await expect(page.locator("h1")).to_have_text(f"{isolated('code')} is loading")
        await inspect(page, "loading")
        (tmp_path / "go").touch()
        await expect(page.locator("h1")).to_have_text(f"{isolated('code')} is loaded")


async def test_heading_says_what_is_loaded_in_each_group(
    browse: Browse, tmp_path: Path, chat: Backend, code: Backend
) -> None:
    models = [entry(chat, group="big"), entry(code, group="small")]
    async with running_jano(tmp_path, models) as jano, await browse(jano.url) as page:
        big = f"{isolated('big')}: {isolated('chat')} is loaded"
        small = f"{isolated('small')}: {isolated('code')} is loaded"
        await expect(page.locator("h1")).to_have_text(f"{big}; {small}")


async def test_card_says_who_waits_for_its_model_and_how_many_it_answered(
    browse: Browse, tmp_path: Path, chat: Backend, code: Backend
) -> None:
    async with asked_for_both(browse, tmp_path, chat, code) as page:
        cards = page.locator("li")
        await expect(cards.nth(0)).to_contain_text("unloaded, 0 waiting, 1 answered")
        await expect(cards.nth(1)).to_contain_text("loaded, 0 waiting, 1 answered")


async def test_burst_is_followed_from_the_first_request_to_the_swap_that_it_avoided(
    browse: Browse, tmp_path: Path, chat: Backend, code: Backend
) -> None:
    chat.answer = chat.held
    swap = swap_script(tmp_path, status=CHAT_IS_LOADED)
    async with (
        running_jano(tmp_path, [entry(chat), entry(code)], swap) as jano,
        await browse(jano.url) as page,
    ):
        asks = await jano.queued("chat", "code", "chat", "chat", "code", "code")
        await expect(page).to_have_title(re.compile("chat.* is loaded, 5 waiting"))
        chat.release.set()
        await asyncio.gather(*asks)
        saved = re.compile(r"Swaps avoided: 2, about\s\d+\.\d s saved")
        await expect(page.locator("h2")).to_have_text(saved)
        counts = "Swaps made: 1, waiting: 0, running: 0, answered: 6"
        await expect(page.locator("body")).to_contain_text(counts)


async def test_page_of_a_jano_that_nobody_has_asked_says_how_to(
    browse: Browse, tmp_path: Path, chat: Backend
) -> None:
    async with running_jano(tmp_path, [entry(chat)]) as jano, await browse(jano.url) as page:
        await expect(page.locator("code")).to_contain_text(f"curl {jano.url}/v1/chat/completions")
        await expect(page.locator("code")).to_contain_text('"model": "chat"')
        await inspect(page, "idle")


async def test_page_needs_no_script(browse: Browse, tmp_path: Path, chat: Backend) -> None:
    async with running_jano(tmp_path, [entry(chat)]) as jano:
        assert (await jano.ask("chat"))[0] == 200
        async with await browse(jano.url, java_script_enabled=False) as page:
            await expect(page.locator("h1")).to_have_text(f"{isolated('chat')} is loaded")
            await expect(requests(page)).to_have_count(1)


async def test_page_is_light_or_dark_as_its_reader_likes(
    browse: Browse, tmp_path: Path, chat: Backend
) -> None:
    white = "rgb(255, 255, 255)"
    async with running_jano(tmp_path, [entry(chat)]) as jano, await browse(jano.url) as page:
        await page.emulate_media(color_scheme="light")
        await expect(page.locator("html")).to_have_css("background-color", white)
        await page.emulate_media(color_scheme="dark")
        await expect(page.locator("html")).not_to_have_css("background-color", white)


# ----------------------------------------------------------------------------- the timeline ----


async def test_each_model_has_a_lane_of_its_own_below_its_name(
    browse: Browse, tmp_path: Path, chat: Backend, code: Backend
) -> None:
    async with asked_for_both(browse, tmp_path, chat, code) as page:
        names = page.locator("body > svg > text")
        await expect(names).to_have_text(["swaps", isolated("chat"), isolated("code")])
        lanes = [names.nth(1), page.locator(".c0 rect"), names.nth(2), page.locator(".c1 rect")]
        tops = [(await box(part))["y"] for part in lanes]
        assert tops == sorted(tops)


async def test_request_is_hollow_while_it_waits_and_solid_while_it_runs(
    browse: Browse, tmp_path: Path, chat: Backend
) -> None:
    chat.answer = chat.held
    async with running_jano(tmp_path, [entry(chat)]) as jano, await browse(jano.url) as page:
        await jano.queued("chat", "chat")
        for place, began in ((0, "0.0%"), (1, "100.0%")):  # in percent of its bar: when it ran
            frame = requests(page).nth(place).locator("rect").nth(0)
            solid = requests(page).nth(place).locator("rect").nth(1)
            await expect(frame).to_have_css("fill", "none")
            await expect(solid).not_to_have_css("fill", "none")
            await expect(solid).to_have_attribute("x", began)
        chat.release.set()


async def test_request_that_failed_is_marked(browse: Browse, tmp_path: Path, chat: Backend) -> None:
    async with running_jano(tmp_path, [entry(chat)]) as jano, await browse(jano.url) as page:
        assert (await jano.ask("chat"))[0] == 200
        chat.answer = says(b"{}", status=500)
        assert (await jano.ask("chat"))[0] == 500
        await expect(requests(page)).to_have_text(["1", "✕2"])
        await expect(page.locator(".bad")).to_have_count(1)
        await inspect(page, "failed")


async def test_swap_is_a_stripe_across_all_lanes_between_what_it_parts(
    browse: Browse, tmp_path: Path, chat: Backend, code: Backend
) -> None:
    async with asked_for_both(browse, tmp_path, chat, code) as page:
        label = f"{isolated('chat')} → {isolated('code')} 0."  # seconds
        await expect(swaps(page)).to_contain_text(label)
        stripe = await box(swaps(page).locator("rect"))
        before = await box(page.locator(".c0 rect"))
        after = await box(page.locator(".c1 rect + rect"))
        edge = 10  # pixels, for times that are rounded and the lines around the bars
        assert before["x"] + before["width"] - edge <= stripe["x"]
        assert stripe["x"] + stripe["width"] <= after["x"] + edge
        assert stripe["y"] < before["y"]
        assert stripe["y"] + stripe["height"] > after["y"] + after["height"]


async def test_swap_that_goes_on_is_a_stripe_already(
    browse: Browse, tmp_path: Path, chat: Backend, code: Backend
) -> None:
    swap = swap_script(tmp_path, gate(tmp_path), status=CHAT_IS_LOADED)
    async with (
        running_jano(tmp_path, [entry(chat), entry(code)], swap) as jano,
        await browse(jano.url) as page,
    ):
        await jano.queued("code")
        await expect(swaps(page)).to_contain_text(f"→ {isolated('code')}")
        (tmp_path / "go").touch()


async def test_swap_that_failed_is_marked(
    browse: Browse, tmp_path: Path, chat: Backend, code: Backend
) -> None:
    swap = swap_script(tmp_path, "exit 1", status=CHAT_IS_LOADED)
    async with (
        running_jano(tmp_path, [entry(chat), entry(code)], swap) as jano,
        await browse(jano.url) as page,
    ):
        assert (await jano.ask("code"))[0] == 503
        await expect(page.locator(".swap.bad")).to_contain_text(f"✕{isolated('chat')} →")


async def test_long_queue_fits(browse: Browse, tmp_path: Path, chat: Backend) -> None:
    chat.answer = chat.held
    async with running_jano(tmp_path, [entry(chat)]) as jano, await browse(jano.url) as page:
        asks = [jano.background(jano.ask("chat")) for _ in range(81)]
        await expect(page).to_have_title(re.compile("80 waiting"))
        await inspect(page, "crowd")
        chat.release.set()
        await asyncio.gather(*asks)


# ------------------------------------------------------------------------------- its buttons ----


async def test_button_loads_a_model_and_comes_back_to_the_page(
    browse: Browse, tmp_path: Path, chat: Backend, code: Backend
) -> None:
    swap = swap_script(tmp_path, status=CHAT_IS_LOADED)
    async with (
        running_jano(tmp_path, [entry(chat), entry(code)], swap) as jano,
        await browse(jano.url) as page,
    ):
        await page.get_by_role("button", name=f"load {isolated('code')}", exact=True).click()
        await expect(page.locator("h1")).to_have_text(f"{isolated('code')} is loaded")
        assert page.url == f"{jano.url}/"
        assert calls(tmp_path) == ["code"]


async def test_button_unloads_a_model_and_comes_back_to_the_page(
    browse: Browse, tmp_path: Path, chat: Backend
) -> None:
    async with running_jano(tmp_path, [entry(chat)]) as jano, await browse(jano.url) as page:
        await page.get_by_role("button", name=f"unload {isolated('chat')}").click()
        await expect(page.locator("h1")).to_have_text("nothing is loaded")
        assert page.url == f"{jano.url}/"
        assert calls(tmp_path) == ["unload"]


async def test_model_that_is_always_there_has_no_button(
    browse: Browse, tmp_path: Path, chat: Backend, code: Backend
) -> None:
    models = [entry(chat), entry(code, passthrough=True)]
    async with running_jano(tmp_path, models) as jano, await browse(jano.url) as page:
        await expect(page.locator("li").nth(0).get_by_role("button")).to_have_count(1)
        await expect(page.locator("li").nth(1).get_by_role("button")).to_have_count(0)


# ------------------------------------------------------------------------ it refreshes itself ----


async def test_page_is_fetched_again_each_second(
    browse: Browse, tmp_path: Path, chat: Backend
) -> None:
    async with running_jano(tmp_path, [entry(chat)]) as jano:
        async with await browse(jano.url, patient=True) as page:
            fetched: list[str] = []
            page.on("response", lambda answer: fetched.append(answer.url))
            for _ in range(3):
                async with page.expect_response(f"{jano.url}/"):
                    await page.clock.run_for(1000)
            assert len(fetched) == 3


async def test_scroll_position_outlives_a_refresh(
    browse: Browse, tmp_path: Path, chat: Backend
) -> None:
    models = [entry(chat, name=f"model-{number}") for number in range(20)]
    async with running_jano(tmp_path, models) as jano:
        async with await browse(jano.url, viewport={"width": 320, "height": 300}) as page:
            await page.evaluate("scrollTo(0, 500)")
            await refreshed(page)
            assert await page.evaluate("scrollY") == 500


async def test_focus_outlives_a_refresh(browse: Browse, tmp_path: Path, chat: Backend) -> None:
    async with running_jano(tmp_path, [entry(chat)]) as jano, await browse(jano.url) as page:
        await page.locator("#b0").focus()
        await refreshed(page)
        await expect(page.locator("#b0")).to_be_focused()


async def test_button_that_is_held_down_outlives_a_refresh(
    browse: Browse, tmp_path: Path, chat: Backend, code: Backend
) -> None:
    models = [entry(chat), entry(code)]
    swap = swap_script(tmp_path, status=CHAT_IS_LOADED)
    async with running_jano(tmp_path, models, swap) as jano, await browse(jano.url) as page:
        await page.locator("#b1").hover()
        await page.mouse.down()
        assert (await jano.ask("chat"))[0] == 200
        for _ in range(2):  # the second is asked for once the first has been dealt with
            await page.wait_for_event("response")
        await page.mouse.up()
        await expect(page.locator("h1")).to_have_text(f"{isolated('code')} is loaded")


async def test_page_says_that_jano_does_not_answer_until_it_does(
    browse: Browse, tmp_path: Path, chat: Backend
) -> None:
    async with running_jano(tmp_path, [entry(chat)]) as jano:
        page = await browse(jano.url, "console Failed to load resource")
        await expect(page.locator("#down")).to_be_hidden()
    await expect(page.get_by_role("alert")).to_have_text("jano does not answer")
    await inspect(page, "down")
    async with running_jano(tmp_path, [entry(chat)], JANO_PORT=jano.port):
        await expect(page.locator("#down")).to_be_hidden()


# --------------------------------------------------------------------------------- safety ----

HOSTILE = [
    "chat",
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "</text></svg><i>",
    "__proto__",
    "constructor",
    "\u202eevil\u202e",
    "a\"b'c`${1}\\",
    "&lt;i&#62;",
    "x" * 200,
    "שלום־עולם",
    "🦙👩‍👩‍👧",
]


async def test_names_of_models_are_text_whatever_they_are(
    browse: Browse, tmp_path: Path, chat: Backend
) -> None:
    chat.answer = says(b"", status=500)
    models = [entry(chat, name=name) for name in HOSTILE]
    script = swap_script(tmp_path, '[ "$1" != __proto__ ]', status=CHAT_IS_LOADED)
    async with running_jano(tmp_path, models, script) as jano, await browse(jano.url) as page:
        await asyncio.gather(*[jano.ask(name) for name in HOSTILE])
        await refreshed(page)
        for name in HOSTILE:
            await expect(page.locator("body")).to_contain_text(name[:29])
        await expect(page.locator("img, i")).to_have_count(0)
        await expect(page.locator("script")).to_have_count(1)
        await inspect(page, "hostile")


async def test_names_of_groups_are_text(browse: Browse, tmp_path: Path, chat: Backend) -> None:
    group = "<i>a group</i>"
    models = [entry(chat, name="here", group=group), entry(chat, name="there")]
    async with running_jano(tmp_path, models) as jano, await browse(jano.url) as page:
        await expect(page.locator("h1")).to_contain_text(f"{isolated(group)}: ")
        await expect(page.locator("li").nth(0)).to_contain_text(f"{isolated(group)}: ")


async def test_button_of_a_hostile_name_loads_that_model(
    browse: Browse, tmp_path: Path, chat: Backend
) -> None:
    name = """a&model=b "'><i>%2F?#ü"""
    models = [entry(chat), entry(chat, name=name)]
    swap = swap_script(tmp_path, status=CHAT_IS_LOADED)
    async with running_jano(tmp_path, models, swap) as jano, await browse(jano.url) as page:
        await page.locator("#b1").click()
        await expect(page.locator("h1")).to_have_text(f"{isolated(name)} is loaded")


async def test_markup_that_gets_in_all_the_same_does_nothing(
    browse: Browse, tmp_path: Path, chat: Backend
) -> None:
    async with (
        running_jano(tmp_path, [entry(chat)]) as jano,
        await browse(jano.url, "Content Security Policy", f"asked {chat.url}") as page,
    ):
        await page.evaluate(
            """(elsewhere) => {
              document.body.insertAdjacentHTML("beforeend", "<img src='data:,' onerror=alert(1)>");
              const script = document.createElement("script");
              document.body.append(Object.assign(script, { text: "alert(2)" }));
              return fetch(elsewhere, { method: "POST" }).catch(() => {});
            }""",
            chat.url,
        )
        assert chat.requests == []


async def test_browser_without_the_key_is_asked_for_it(
    browse: Browse, tmp_path: Path, chat: Backend
) -> None:
    async with running_jano(tmp_path, [entry(chat)], JANO_API_KEY=KEY) as jano:
        with pytest.raises(Error, match="ERR_INVALID_AUTH_CREDENTIALS"):
            await browse(jano.url, "401")


async def test_key_that_the_browser_knows_goes_with_page_and_refresh(
    browse: Browse, tmp_path: Path, chat: Backend
) -> None:
    async with running_jano(tmp_path, [entry(chat)], JANO_API_KEY=KEY) as jano:
        async with await browse(jano.url, http_credentials=CREDENTIALS) as page:
            await expect(page.locator("h1")).to_have_text(f"{isolated('chat')} is loaded")
            await refreshed(page)


async def test_key_that_the_browser_knows_goes_with_a_button(
    browse: Browse, tmp_path: Path, chat: Backend
) -> None:
    async with running_jano(tmp_path, [entry(chat)], JANO_API_KEY=KEY) as jano:
        async with await browse(jano.url, http_credentials=CREDENTIALS) as page:
            await page.locator("#b0").click()
            await expect(page.locator("h1")).to_have_text("nothing is loaded")


# ----------------------------------------------------------------------------------- demo ----


async def test_demo_is_followed(browse: Browse, tmp_path: Path) -> None:
    log = tmp_path / "demo.log"
    demo = [sys.executable, str(CONTRIB / "demo.py")]
    async with running(*demo, folder=tmp_path, log=log):
        await event(until(lambda: "Six requests" in log.read_text()))
        url = re.findall(r"http://[\d.]+:\d+", log.read_text())[0]
        window = {"width": 1000, "height": 480}
        async with await browse(url, viewport=window, device_scale_factor=2) as page:
            await expect(page).to_have_title(re.compile("code.* is loaded, 0 waiting"))
            await expect(page.locator("body")).to_contain_text("running: 0, answered: 6")
            await expect(page.get_by_role("heading", level=2)).to_contain_text("Swaps avoided: 2")
            picture = os.environ.get("PICTURE")
            if picture:
                await page.locator("body").screenshot(path=picture)
