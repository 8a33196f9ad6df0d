"""What keeps jano alive, rotates its log and swaps its models: the files in contrib, tried.

They need Debian's systemd and logrotate. Docker and vLLM are imitated: a `docker` on the PATH, and
HTTP servers with vLLM's endpoints for its sleep mode.
"""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import os
import plistlib
import re
import shutil
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from conftest import CONTRIB, run, run_beside, running, serving

from test_jano import JANO, Backend, entry, event, free_port, running_jano, swap_script, until

# ------------------------------------------------------------------------------ kept alive ----


@pytest.fixture
async def home(tmp_path: Path, chat: Backend) -> Path:
    """~/jano as contrib's files assume it: jano.py, its settings, a venv in ~/jano/.venv."""
    folder = tmp_path / "jano"
    (folder / ".venv/bin").mkdir(parents=True)
    python = folder / ".venv/bin/python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    shutil.copy(JANO, folder)
    (folder / "models.json").write_text(json.dumps({"models": [entry(chat)]}))
    script = swap_script(tmp_path)
    (folder / ".env").write_text(f"SWAP_COMMAND={script}\nJANO_PORT={free_port()}\n")
    return folder


def logged(home: Path) -> list[str]:
    """The messages in jano.log so far."""
    log = home / "jano.log"
    if not log.exists():
        return []
    return [json.loads(line)["msg"] for line in log.read_text().splitlines()]


@contextlib.asynccontextmanager
async def shell(command: str, home: Path) -> AsyncIterator[asyncio.subprocess.Process]:
    """What cron starts: /bin/sh with hardly any environment, in the user's home."""
    process = await asyncio.create_subprocess_exec(
        *("/bin/sh", "-c", command),
        cwd=home.parent,
        env={"HOME": str(home.parent), "PATH": "/usr/bin:/bin"},
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.terminate()
        assert await event(process.wait()) == 0


def cron_command() -> str:
    """The last line of jano.cron, without its five fields of time."""
    line = (CONTRIB / "jano.cron").read_text().splitlines()[-1]
    every_minute = "* * * * * "
    assert line.startswith(every_minute)
    return line.removeprefix(every_minute)


def test_cron_reads_no_line_break_in_its_line() -> None:
    assert "%" not in cron_command()


async def test_cron_line_starts_jano_and_again_does_nothing_while_it_runs(home: Path) -> None:
    async with shell(cron_command(), home) as first:
        await event(until(lambda: "worker started" in logged(home)))
        async with shell(cron_command(), home) as second:
            await event(second.wait())
        assert logged(home).count("jano listening") == 1
        assert logged(home)[-1] == "another jano answers already"
        assert first.returncode is None


async def test_rotated_log_goes_on_in_the_same_file_without_a_line_lost(home: Path) -> None:
    text = (CONTRIB / "jano.logrotate").read_text()
    assert text.count("/home/you/") == 2
    rules = home / "jano.logrotate"
    rules.write_text(text.replace("/home/you", str(home.parent)))
    rules.chmod(0o644)
    state = home / "logrotate.state"
    log = home / "jano.log"
    async with shell(cron_command(), home) as jano:
        await event(until(lambda: "worker started" in logged(home)))
        before = log.read_text()
        run("logrotate", "--state", state, rules).check_returncode()
        assert log.read_text() == before  # it is not large enough
        run("logrotate", "--state", state, "--force", rules).check_returncode()
        assert gzip.decompress((home / "jano.log.2.gz").read_bytes()).decode() == before
        jano.send_signal(signal.SIGHUP)
        await event(until(lambda: "models reloaded" in logged(home)))
        assert logged(home) == ["received signal", "models reloaded"]  # and no hole before them


# These options of a unit break model servers, which a restart of jano leaves running: JIT
# compilers, GPU devices, models in /home or /tmp, shared memory.
HARMFUL = (
    "MemoryDenyWriteExecute",
    "PrivateDevices",
    "ProtectHome",
    "PrivateTmp",
    "ProtectSystem",
    "PrivateIPC",
    "RestrictAddressFamilies",
    "MemoryMax",
)


def test_systemd_finds_no_fault_in_the_unit(home: Path) -> None:
    places = {"HOME": str(home.parent), "XDG_RUNTIME_DIR": str(home.parent)}
    unit = CONTRIB / "jano.service"
    found = run("systemd-analyze", "verify", "--user", unit, **places)
    assert (found.returncode, found.stdout + found.stderr) == (0, "")


def test_systemd_spares_the_servers_and_restarts_jano_unless_its_configuration_is_wrong() -> None:
    unit = (CONTRIB / "jano.service").read_text().splitlines()
    wanted = {"KillMode=process", "Restart=on-failure", "RestartPreventExitStatus=2"}
    assert wanted <= set(unit)
    assert [line for line in unit if line.startswith(HARMFUL)] == []


def test_launchd_spares_the_servers_and_restarts_jano_if_it_fails() -> None:
    agent = plistlib.loads((CONTRIB / "com.example.jano.plist").read_bytes())
    assert agent["Label"] == "com.example.jano"
    assert agent["AbandonProcessGroup"] is True
    assert agent["RunAtLoad"] is True
    assert agent["KeepAlive"] == {"SuccessfulExit": False}
    assert agent["ExitTimeOut"] > 30  # SHUTDOWN_TIMEOUT_MS


def test_launchd_starts_jano_in_its_folder() -> None:
    agent = plistlib.loads((CONTRIB / "com.example.jano.plist").read_bytes())
    python, script = [Path(argument) for argument in agent["ProgramArguments"]]
    assert Path(agent["WorkingDirectory"]) == script.parent == python.parents[2]


# ---------------------------------------------------------------------------------- demo ----


async def test_demo_shows_one_swap_where_a_naive_proxy_makes_three_and_ends_without_a_trace(
    tmp_path: Path,
) -> None:
    log = tmp_path / "demo.log"
    demo = [sys.executable, str(CONTRIB / "demo.py")]
    async with running(*demo, folder=tmp_path, log=log, TMPDIR=str(tmp_path)) as process:
        await asyncio.wait_for(until(lambda: "Ctrl-C" in log.read_text()), timeout=60)
        text = log.read_text()
        assert "3 swaps\n  1.chat  ▶ swap ▶  2.code  ▶ swap ▶  3.chat  4.chat  ▶ swap" in text
        assert "1 swap\n  1.chat  3.chat  4.chat  ▶ swap ▶  2.code  5.code  6.code\n" in text
        url = re.findall(r"http://\S+", text)[-1]
        async with aiohttp.request("GET", url) as page:
            assert page.status == 200
        process.send_signal(signal.SIGINT)
        assert await event(process.wait()) == 0
    assert [file.name for file in tmp_path.iterdir()] == ["demo.log"]
    assert run("pgrep", "-f", f"toy .*{tmp_path}").stdout == ""


# ---------------------------------------------------------------------------- swap scripts ----


async def output(script: Path, word: str, **environ: str) -> tuple[int, str]:
    """The exit code and stdout of a swap script."""
    done = await run_beside(script, word, **environ)
    return done.returncode, done.stdout


class SleepingServer(Backend):
    """vLLM's endpoints of its sleep mode; a model that sleeps must not be asked."""

    def __init__(self, name: str, awake: set[str]) -> None:
        super().__init__(name)
        self.awake = awake  # the models of all such servers that are; they share the GPU
        self.most = 0  # how many were awake at once
        self.look = self.is_sleeping
        self.answer = self.sleep_or_wake

    async def is_sleeping(self, request: web.Request) -> web.StreamResponse:
        if request.path == "/is_sleeping":
            return web.json_response({"is_sleeping": self.name not in self.awake})
        return await self.health(request)

    async def sleep_or_wake(self, request: web.Request) -> web.StreamResponse:
        if request.path == "/sleep":
            assert request.query == {"level": "1"}
            self.awake.discard(self.name)
            return web.Response()
        if request.path == "/wake_up":
            self.awake.add(self.name)
            self.most = max(self.most, len(self.awake))
            return web.Response()
        if self.name not in self.awake:
            return web.Response(status=500)
        return await self.plain(request)


class SleepingServers:
    """Two such servers, chat and code, and the script of contrib with their addresses."""

    def __init__(self, folder: Path) -> None:
        self.awake = {"chat", "code"}  # as nobody has put one to sleep yet
        self.chat = SleepingServer("chat", self.awake)
        self.code = SleepingServer("code", self.awake)
        self.models: list[dict[str, Any]] = []
        self.script = folder / "swap.sh"

    def write_script(self) -> None:
        text = (CONTRIB / "swap.vllm-sleep.sh").read_text()
        for server, address in ((self.chat, "127.0.0.1:8081"), (self.code, "127.0.0.1:8080")):
            assert f"  model {server.name} http://{address}\n" in text
            text = text.replace(address, f"127.0.0.1:{server.port}")
        self.script.write_text(text)
        self.script.chmod(0o755)
        self.models = [entry(self.chat), entry(self.code)]


@pytest.fixture
async def vllm(tmp_path: Path) -> AsyncIterator[SleepingServers]:
    servers = SleepingServers(tmp_path)
    async with serving(servers.chat, servers.code):
        servers.write_script()
        yield servers


async def test_vllm_servers_take_turns_in_sleeping(tmp_path: Path, vllm: SleepingServers) -> None:
    assert await output(vllm.script, "unload") == (0, "")
    assert vllm.awake == set()
    async with running_jano(tmp_path, vllm.models, vllm.script, LINGER_MS=0) as jano:
        for model in ("chat", "code", "chat", "chat", "code"):
            assert await jano.ask(model) == (200, {"answered_by": model})
            assert vllm.awake == {model}
    assert (vllm.chat.most, vllm.code.most) == (1, 1)


async def test_vllm_script_says_who_is_awake(vllm: SleepingServers) -> None:
    vllm.awake.discard("chat")
    assert await output(vllm.script, "status") == (0, "chat: asleep\ncode: loaded\n")


async def test_vllm_script_knows_that_a_server_that_is_down_holds_no_memory(
    vllm: SleepingServers,
) -> None:
    await vllm.chat.stop()
    assert (await output(vllm.script, "code"))[0] == 0
    await vllm.chat.start(vllm.chat.port)


async def test_vllm_script_fails_on_a_server_that_is_down_after_the_other_has_gone_to_sleep(
    vllm: SleepingServers,
) -> None:
    await vllm.chat.stop()
    vllm.awake.discard("chat")
    assert (await output(vllm.script, "chat"))[0] == 1
    assert vllm.awake == set()
    await vllm.chat.start(vllm.chat.port)


async def test_vllm_script_fails_on_a_model_that_it_does_not_know(vllm: SleepingServers) -> None:
    assert (await output(vllm.script, "no"))[0] == 1


DOCKER = """#!/bin/sh
# Docker Compose, as far as the swap script calls it: services that run are files in `running`.
cd "$(dirname "$0")"
shift
case "$*" in
    "ps --services --status running") ls running ;;
    "stop -t 10 "*) rm -f "running/$4" ;;
    "up -d --no-deps "*) [ -e broken ] || touch "running/$4" ;;
    "logs --no-log-prefix -n 1 "*) echo "out of memory" ;;
    *) exit 1 ;;
esac
"""


class Compose:
    """The imitation of Docker, with a service that is no model, and the script of contrib."""

    def __init__(self, folder: Path) -> None:
        self.services = folder / "running"
        self.services.mkdir()
        (self.services / "db").touch()
        docker = folder / "docker"
        docker.write_text(DOCKER)
        docker.chmod(0o755)
        self.broken = folder / "broken"
        self.script = folder / "swap.sh"
        shutil.copy(CONTRIB / "swap.docker-compose.sh", self.script)
        self.path = f"{folder}:{os.environ['PATH']}"

    def running(self) -> set[str]:
        return {file.name for file in self.services.iterdir()}

    async def output(self, word: str) -> tuple[int, str]:
        return await output(self.script, word, PATH=self.path)


@pytest.fixture
async def compose(tmp_path: Path) -> Compose:
    return Compose(tmp_path)


async def test_docker_services_take_turns_in_running(
    tmp_path: Path, compose: Compose, chat: Backend, code: Backend
) -> None:
    models = [entry(chat), entry(code)]
    place = (tmp_path, models, compose.script)
    async with running_jano(*place, PATH=compose.path, LINGER_MS=0) as jano:
        for model in ("code", "chat", "chat", "code"):
            assert (await jano.ask(model))[0] == 200
            assert compose.running() == {"db", model}


async def test_last_line_of_a_docker_service_that_does_not_start_is_in_janos_log(
    tmp_path: Path, compose: Compose, chat: Backend
) -> None:
    compose.broken.touch()
    chat.ready = False
    async with running_jano(tmp_path, [entry(chat)], compose.script, PATH=compose.path) as jano:
        status, answer = await jano.ask("chat")
        assert status == 503
        assert "exited with code 1" in answer["error"]["message"]
        assert "out of memory" in str(await jano.logged("swap failed"))


async def test_docker_script_says_what_runs_and_stops_it(compose: Compose) -> None:
    assert (await compose.output("code"))[0] == 0
    assert await compose.output("status") == (0, "code: loaded\n")
    assert (await compose.output("unload"))[0] == 0
    assert compose.running() == {"db"}


async def test_docker_script_fails_on_a_model_that_it_does_not_know(compose: Compose) -> None:
    assert (await compose.output("no"))[0] == 1
