"""What people have works through jano as it is: real client libraries, the real jano process.

Only the backends are fake (speaker.py). The libraries of requirements.txt and package.json go
together; litellm and llama-index need an environment of their own (requirements-litellm.txt) and
`-k "litellm or llama-index"`. docs/clients.md says what was tried with which version.
"""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from clients import CLIENTS, Client
from conftest import BROKEN, KEY, heartbeats
from speaker import VECTOR

from test_jano import Running, calls

pytestmark = pytest.mark.filterwarnings("ignore")  # libraries may warn about what they like


@pytest.fixture(scope="module", autouse=True)
def tidy() -> Iterator[None]:
    yield
    gc.collect()  # what libraries have left open, while their warnings are still ignored


def that(action: str) -> pytest.MarkDecorator:
    """For each client that does this."""
    names = [name for name, client in CLIENTS.items() if action in client.actions]
    return pytest.mark.parametrize("client", names, indirect=True)


@pytest.fixture
async def client(request: pytest.FixtureRequest, jano: Running) -> Client:
    return CLIENTS[request.param](jano.url, KEY)


async def do(client: Client, action: str, model: str) -> Any:
    """What the client says to its user."""
    return await asyncio.to_thread(client.do, action, model)


async def complaint(client: Client, action: str, model: str) -> str:
    """What the client tells its user when it fails, quotes left as they are."""
    with pytest.raises(Exception) as failed:  # noqa: PT011
        await do(client, action, model)
    return str(failed.value).replace("\\", "")


# -------------------------------------------------------------------------------- answers ----


@that("chat")
async def test_client_gets_an_answer(client: Client) -> None:
    assert await do(client, "chat", "chat") == "I am chat."


@that("stream")
async def test_client_gets_a_stream_from_a_model_that_it_knows_by_an_alias(client: Client) -> None:
    assert await do(client, "stream", "my-chat") == "I am my-chat."


@that("tools")
async def test_client_gets_a_call_of_its_tool(client: Client) -> None:
    assert await do(client, "tools", "chat") == ["weather", "Rome"]


@that("embeddings")
async def test_client_gets_an_embedding(client: Client) -> None:
    assert await do(client, "embeddings", "chat") == VECTOR


@that("models")
async def test_client_lists_the_models(client: Client) -> None:
    assert await do(client, "models", "") == ["chat", "code", "broken"]


@that("running")
async def test_client_lists_the_loaded_models(jano: Running, client: Client) -> None:
    await jano.logged("worker started", loaded="chat")
    assert await do(client, "running", "") == ["chat"]


@that("capabilities")
async def test_client_gets_a_models_description_without_a_swap(
    client: Client, tmp_path: Path
) -> None:
    assert "completion" in await do(client, "capabilities", "code")
    assert calls(tmp_path) == []


# ------------------------------------------------------------------------------- failures ----


@that("chat")
async def test_client_tells_its_user_that_a_model_is_unknown_and_which_there_are(
    client: Client,
) -> None:
    text = await complaint(client, "chat", "no")
    assert 'unknown model "no"' in text
    assert "my-chat" in text


@that("chat")
async def test_client_tells_its_user_that_the_key_is_wrong(jano: Running, client: Client) -> None:
    stranger = type(client)(jano.url, "the-wrong-key")
    text = await complaint(stranger, "chat", "chat")
    assert "the API key is missing or wrong" in text


@that("chat")
async def test_client_tells_its_user_soon_why_a_model_cannot_be_loaded(
    client: Client, tmp_path: Path
) -> None:
    (tmp_path / "go").touch()
    began = time.monotonic()
    assert BROKEN in await complaint(client, "chat", "broken")
    assert time.monotonic() - began < client.gives_up


@that("stream")
async def test_client_tells_its_user_soon_why_a_model_cannot_be_loaded_behind_heartbeats(
    jano: Running, client: Client, tmp_path: Path
) -> None:
    failing = asyncio.create_task(complaint(client, "stream", "broken"))
    await jano.logged("enqueued", model="broken")
    await heartbeats(jano, "broken")
    (tmp_path / "go").touch()
    began = time.monotonic()
    assert BROKEN in await failing
    assert time.monotonic() - began < client.gives_up


# ---------------------------------------------------------------------------------- swaps ----


@that("stream")
async def test_client_gets_a_stream_behind_a_swap_and_heartbeats(
    jano: Running, client: Client, tmp_path: Path
) -> None:
    streaming = asyncio.create_task(do(client, "stream", "code"))
    await jano.logged("enqueued", model="code")
    await heartbeats(jano, "code")
    (tmp_path / "go").touch()
    assert await streaming == "I am code."


@that("chat")
async def test_two_clients_on_two_models_get_each_its_own(client: Client, tmp_path: Path) -> None:
    (tmp_path / "go").touch()
    asks = [do(client, "chat", model) for model in ("chat", "code")]
    assert await asyncio.gather(*asks) == ["I am chat.", "I am code."]
