"""Coding agents work through jano as their users start them: real programs, the real jano process.

They come from npm (package.json). Only the backends are fake (speaker.py). docs/clients.md says
which versions were tried.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from pathlib import Path

import pytest
from conftest import BROKEN, KEY, heartbeats, run

from test_jano import JANO, Running, until

QUESTION = "Who are you?"
STARTS = 60  # seconds that an agent may take until it asks
SOON = 5  # seconds within which a user knows that a model cannot be loaded
MODULES = Path(os.environ.get("JANO_NODE_MODULES", JANO.with_name("integration") / "node_modules"))


class Agent:
    """An agent with a home of its own, that has jano's address and key and nothing else."""

    def __init__(self, url: str, home: Path) -> None:
        self.url = url
        self.home = home
        home.mkdir()

    def start(self, program: str, *argv: str, **environ: str) -> str:
        """Run the program to its end; all that its user sees."""
        path = str(MODULES / ".bin" / program)
        places = {"HOME": str(self.home), "PWD": str(self.home)}
        begin = ["env", "-i", "-C", str(self.home), f"PATH={os.environ['PATH']}"]
        begin += [f"{name}={value}" for name, value in (places | environ).items()]
        done = run(*begin, path, *argv)
        return done.stdout + done.stderr

    def ask(self, model: str) -> str:
        raise NotImplementedError


class ClaudeCode(Agent):
    def ask(self, model: str) -> str:
        return self.start(
            *("claude", "-p", QUESTION, "--model", model),
            ANTHROPIC_BASE_URL=self.url,
            ANTHROPIC_AUTH_TOKEN=KEY,
            ANTHROPIC_DEFAULT_HAIKU_MODEL=model,  # its small requests
            CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC="1",
        )


class Codex(Agent):
    def ask(self, model: str) -> str:
        provider = {
            "name": "jano",
            "base_url": f"{self.url}/v1",
            "wire_api": "responses",
            "env_key": "JANO_API_KEY",
            "request_max_retries": 0,  # or it asks 30 times, for 24 s, until it says why
            "stream_max_retries": 0,
            "stream_idle_timeout_ms": 1000,
        }
        argv = ["exec", "--skip-git-repo-check", "-m", model, "-c", 'model_provider="jano"']
        for key, value in provider.items():
            argv += ["-c", f"model_providers.jano.{key}={json.dumps(value)}"]
        return self.start("codex", *argv, QUESTION, JANO_API_KEY=KEY)


class OpenCode(Agent):
    def ask(self, model: str) -> str:
        provider = {
            "npm": "@ai-sdk/openai-compatible",
            "name": "jano",
            "options": {"baseURL": f"{self.url}/v1", "apiKey": KEY},
            "models": {model: {}},
        }
        config = {
            "autoupdate": False,
            "share": "disabled",
            "agent": {"title": {"disable": True}},  # or it asks twice
            "provider": {"jano": provider},
        }
        (self.home / "opencode.json").write_text(json.dumps(config))
        argv = ["run", "-m", f"jano/{model}", QUESTION]
        return self.start("opencode", *argv, OPENCODE_DISABLE_MODELS_FETCH="1")


class Continue(Agent):
    def ask(self, model: str) -> str:
        described = {
            "name": "jano",
            "provider": "openai",
            "model": model,
            "apiBase": f"{self.url}/v1",
            "apiKey": KEY,
            "roles": ["chat"],
        }
        config = {"name": "jano", "version": "1.0.0", "schema": "v1", "models": [described]}
        (self.home / "config.yaml").write_text(json.dumps(config))  # JSON is YAML
        argv = ["-p", QUESTION, "--config", "config.yaml"]
        return self.start("cn", *argv, CONTINUE_TELEMETRY_ENABLED="0")


AGENTS = {"claude-code": ClaudeCode, "codex": Codex, "opencode": OpenCode, "continue": Continue}
each_agent = pytest.mark.parametrize("agent", AGENTS)


async def ask(jano: Running, agent: str, model: str, tmp_path: Path) -> str:
    """All that the agent's user sees when this model is asked."""
    opened = AGENTS[agent](jano.url, tmp_path / f"home of {model}")
    return await asyncio.to_thread(opened.ask, model)


async def asked_behind_heartbeats(
    jano: Running, agent: str, model: str, folder: Path, count: int = 3
) -> asyncio.Task[str]:
    """Let an agent ask, which may take long to start, and the model be loaded once it has had so
    many heartbeats. What it says in the end."""
    asking = asyncio.create_task(ask(jano, agent, model, folder))
    asked = until(lambda: bool(jano.log("enqueued", model=model)))
    await asyncio.wait_for(asked, STARTS)
    await heartbeats(jano, model, count)
    (folder / "go").touch()
    return asking


@each_agent
async def test_agent_gets_an_answer(jano: Running, agent: str, tmp_path: Path) -> None:
    assert "I am chat." in await ask(jano, agent, "chat", tmp_path)


@each_agent
async def test_agent_gets_a_stream_behind_a_swap_and_heartbeats(
    jano: Running, agent: str, tmp_path: Path
) -> None:
    asking = await asked_behind_heartbeats(jano, agent, "code", tmp_path)
    assert "I am code." in await asking


@each_agent
async def test_agent_tells_its_user_that_a_model_is_unknown_and_which_there_are(
    jano: Running, agent: str, tmp_path: Path
) -> None:
    text = (await ask(jano, agent, "no", tmp_path)).replace("\\", "")
    assert 'unknown model "no"; accepted: chat, my-chat' in text


# opencode and Continue ask again for a minute and longer, whatever they are told.
@pytest.mark.parametrize("agent", ["claude-code", "codex"])
async def test_agent_tells_its_user_soon_why_a_model_cannot_be_loaded(
    jano: Running, agent: str, tmp_path: Path
) -> None:
    (tmp_path / "go").touch()
    began = time.monotonic()
    assert BROKEN in await ask(jano, agent, "broken", tmp_path)
    assert time.monotonic() - began < SOON


@each_agent
async def test_agent_tells_its_user_soon_why_a_model_cannot_be_loaded_behind_heartbeats(
    jano: Running, agent: str, tmp_path: Path
) -> None:
    asking = await asked_behind_heartbeats(jano, agent, "broken", tmp_path)
    began = time.monotonic()
    assert BROKEN in (await asking).replace("\\", "")
    assert time.monotonic() - began < SOON


async def test_codex_takes_heartbeats_for_life_in_a_wait_longer_than_its_patience(
    jano: Running, tmp_path: Path
) -> None:
    asking = await asked_behind_heartbeats(jano, "codex", "code", tmp_path, count=50)  # 2.5 s
    assert "I am code." in await asking


@each_agent
async def test_two_agents_on_two_models_get_each_its_own(
    jano: Running, agent: str, tmp_path: Path
) -> None:
    (tmp_path / "go").touch()
    asks = [ask(jano, agent, model, tmp_path) for model in ("chat", "code")]
    chat, code = await asyncio.gather(*asks)
    assert "I am chat." in chat
    assert "I am code." in code
