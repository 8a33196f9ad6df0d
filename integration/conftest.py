"""What the integration tests share. Backends, swap scripts and jano itself are test_jano.py's."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from speaker import Speaker

from test_jano import (
    JANO,
    Backend,
    Running,
    chat,
    code,
    entry,
    event,
    gate,
    running_jano,
    swap_script,
)

__all__ = ["chat", "code"]  # fixtures

CONTRIB = JANO.with_name("contrib")
KEY = "the-right-key"
BROKEN = 'swap to "broken" failed: the script exited with code 1'

# Where Debian has nginx, HAProxy and logrotate.
os.environ["PATH"] += ":/usr/sbin"


@contextlib.asynccontextmanager
async def serving(*backends: Backend) -> AsyncIterator[None]:
    """These backends serve, each on a port of its own."""
    for backend in backends:
        await backend.start()
    try:
        yield
    finally:
        for backend in backends:
            await backend.stop()


def run(*argv: str | Path, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run a program to its end, which is to come within a minute, with no input."""
    return subprocess.run(
        argv,
        env={**os.environ, **environ},
        input="",
        capture_output=True,
        text=True,
        timeout=60,
    )


async def run_beside(*argv: str | Path, **environ: str) -> subprocess.CompletedProcess[str]:
    """The same while the backends of this process serve."""
    return await asyncio.to_thread(run, *argv, **environ)


@contextlib.asynccontextmanager
async def running(
    *argv: str | Path, folder: Path, log: Path, **environ: str
) -> AsyncIterator[asyncio.subprocess.Process]:
    """A program that runs in this folder until the block ends, with its output in a file."""
    with log.open("wb") as output:
        process = await asyncio.create_subprocess_exec(
            *argv, cwd=folder, env={**os.environ, **environ}, stdout=output, stderr=output
        )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.terminate()
        await event(process.wait())


@pytest.fixture
async def jano(tmp_path: Path) -> AsyncIterator[Running]:
    """With chat, which is loaded, and code, and broken, which fails; swaps wait for a file go."""
    body = f'{gate(tmp_path)}\n[ "$1" != broken ]'
    script = swap_script(tmp_path, body, status='echo "chat: loaded"')
    speakers = [Speaker("chat"), Speaker("code"), Speaker("broken")]
    async with serving(*speakers):
        models = [entry(speaker, aliases=[f"my-{speaker.name}"]) for speaker in speakers]
        models[0]["aliases"].append("text-embedding-3-small")  # by which `llm` embeds
        running = running_jano(
            tmp_path, models, script, JANO_API_KEY=KEY, HEARTBEAT_MS=50, SWAP_FAILURE_LIMIT=100
        )
        async with running as jano:
            yield jano


async def heartbeats(jano: Running, model: str, count: int = 3) -> None:
    """Wait until a stream that was asked for after another one has had so many heartbeats."""
    url = f"{jano.url}/v1/chat/completions"
    body = {"model": model, "stream": True}
    headers = {"Authorization": f"Bearer {KEY}"}
    async with jano.session.post(url, json=body, headers=headers) as answer:
        for _ in range(count):
            assert await event(answer.content.readuntil(b"\n\n")) == b": waiting\n\n"
