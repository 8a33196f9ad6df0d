"""What keeps jano alive, rotates its log and swaps its models: the files in contrib, tried.

Run with `pytest -m contrib`; .ci/run installs systemd and logrotate first. Docker and vLLM are
imitated: a `docker` on the PATH, an HTTP server with vLLM's endpoints for its sleep mode.
"""

from __future__ import annotations

import asyncio
import gzip
import json
import os
import plistlib
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from aiohttp import web

from test_jano import JANO, Backend, entry, event, running_jano, swap_script, until

pytestmark = pytest.mark.contrib

CONTRIB = JANO.with_name("contrib")


def run(*argv: str | Path, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(argv, env={**os.environ, **environ}, capture_output=True, text=True,
                          timeout=60)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def at_home(folder: Path) -> Path:
    """~/jano with a venv in ~/jano/.venv, which is what the files assume."""
    home = folder / "jano"
    (home / ".venv/bin").mkdir(parents=True)
    python = home / ".venv/bin/python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    (home / "jano.py").write_bytes(JANO.read_bytes())
    return home


# ------------------------------------------------------------------------------ kept alive ----


def test_systemd_finds_no_fault_in_the_unit_that_spares_the_servers(tmp_path: Path) -> None:
    at_home(tmp_path)
    found = run("systemd-analyze", "verify", "--user", CONTRIB / "jano.service",
                HOME=str(tmp_path), XDG_RUNTIME_DIR=str(tmp_path))
    assert (found.returncode, found.stdout + found.stderr) == (0, "")
    unit = (CONTRIB / "jano.service").read_text().splitlines()
    wanted = {"KillMode=process", "Restart=on-failure", "RestartPreventExitStatus=2"}
    assert wanted <= set(unit)
    # These break servers: JIT compilers, GPU devices, models in /home or /tmp, shared memory.
    for harmful in ("MemoryDenyWriteExecute", "PrivateDevices", "ProtectHome", "PrivateTmp",
                    "ProtectSystem", "PrivateIPC", "RestrictAddressFamilies", "MemoryMax"):
        assert not any(line.startswith(harmful) for line in unit)


def test_launchd_agent_is_a_plist_whose_restart_spares_the_servers() -> None:
    agent = plistlib.loads((CONTRIB / "com.example.jano.plist").read_bytes())
    assert agent["Label"] == "com.example.jano"
    assert agent["AbandonProcessGroup"] is agent["RunAtLoad"] is True
    assert agent["KeepAlive"] == {"SuccessfulExit": False}
    assert agent["ExitTimeOut"] > 30  # SHUTDOWN_TIMEOUT_MS
    python, script = map(Path, agent["ProgramArguments"])
    assert Path(agent["WorkingDirectory"]) == script.parent == python.parents[2]


async def test_cron_line_starts_jano_and_again_does_nothing_while_it_runs(tmp_path: Path) -> None:
    line = (CONTRIB / "jano.cron").read_text().splitlines()[-1]
    assert line.startswith("* * * * * ")
    command = line.removeprefix("* * * * * ")
    assert "%" not in command  # which means a new line to cron
    home, chat = at_home(tmp_path), Backend("chat")
    await chat.start()
    (home / "models.json").write_text(json.dumps({"models": [entry(chat)]}))
    (home / ".env").write_text(f"SWAP_COMMAND={swap_script(tmp_path)}\nJANO_PORT={free_port()}\n")

    def log() -> list[str]:
        file = home / "jano.log"
        return [json.loads(text)["msg"] for text in file.read_text().splitlines()] if (
            file.exists()) else []

    async def minute() -> asyncio.subprocess.Process:
        """As cron does it: /bin/sh, hardly any environment."""
        return await asyncio.create_subprocess_exec(
            "/bin/sh", "-c", command, env={"HOME": str(tmp_path), "PATH": "/usr/bin:/bin"})

    first = await minute()
    try:
        await event(until(lambda: "worker started" in log()))
        assert await event((await minute()).wait()) == 0
        assert log() == ["jano listening", "worker started", "another jano answers already"]
        assert first.returncode is None
    finally:
        first.terminate()
        assert await event(first.wait()) == 0
        await chat.stop()


async def test_rotated_log_goes_on_in_the_same_file_without_a_line_lost(tmp_path: Path) -> None:
    home, chat = at_home(tmp_path), Backend("chat")
    await chat.start()
    text = (CONTRIB / "jano.logrotate").read_text()
    assert text.count("/home/you/") == 2
    rules = home / "jano.logrotate"
    rules.write_text(text.replace("/home/you", str(tmp_path)))
    rules.chmod(0o644)
    log = home / "jano.log"
    script = swap_script(tmp_path)
    (home / "models.json").write_text(json.dumps({"models": [entry(chat)]}))
    jano = await asyncio.create_subprocess_exec(
        "/bin/sh", "-c", "exec .venv/bin/python jano.py >>jano.log", cwd=home,
        env={**os.environ, "SWAP_COMMAND": str(script), "JANO_PORT": "0"})

    def messages(text: str) -> list[str]:
        return [json.loads(line)["msg"] for line in text.splitlines()]

    try:
        await event(until(lambda: log.exists() and "worker started" in log.read_text()))
        before = log.read_text()
        for force in ([], ["--force"]):  # not yet large enough; as if it were
            found = run("logrotate", "--state", tmp_path / "state", *force, rules,
                        PATH=f"{os.environ['PATH']}:/usr/sbin")
            assert (found.returncode, found.stderr) == (0, "")
            assert log.read_text() == ("" if force else before)
        assert gzip.decompress((home / "jano.log.1.gz").read_bytes()).decode() == before
        jano.send_signal(signal.SIGHUP)
        await event(until(lambda: "models reloaded" in log.read_text()))
        # And no hole before them.
        assert messages(log.read_text()) == ["received signal", "models reloaded"]
    finally:
        jano.terminate()
        assert await event(jano.wait()) == 0
        await chat.stop()


# ---------------------------------------------------------------------------- swap scripts ----


class SleepingServer(Backend):
    """vLLM's endpoints of its sleep mode; a model that sleeps must not be asked."""

    def __init__(self, name: str, awake: set[str]) -> None:
        super().__init__(name)
        self.awake = awake  # of all such servers; they share the GPU
        self.most = 0

    async def handle(self, request: web.Request) -> web.StreamResponse:
        if request.path == "/is_sleeping":
            return web.json_response({"is_sleeping": self.name not in self.awake})
        if request.path == "/sleep" and request.method == "POST":
            assert request.query == {"level": "1"}
            self.awake.discard(self.name)
        elif request.path == "/wake_up" and request.method == "POST":
            self.awake.add(self.name)
            self.most = max(self.most, len(self.awake))
        elif request.method == "POST" and self.name not in self.awake:
            return web.Response(status=500)
        else:
            return await super().handle(request)
        return web.Response()


async def test_vllm_servers_take_turns_in_sleeping(tmp_path: Path) -> None:
    awake = {"chat", "code"}  # as nobody has put one to sleep yet
    servers = [SleepingServer("chat", awake), SleepingServer("code", awake)]
    text = (CONTRIB / "swap.vllm-sleep.sh").read_text()
    for server, place in zip(servers, ("127.0.0.1:8081", "127.0.0.1:8080"), strict=True):
        await server.start()
        assert f"  model {server.name} http://{place}\n" in text
        text = text.replace(place, f"127.0.0.1:{server.port}")
    script = tmp_path / "swap.sh"
    script.write_text(text)
    script.chmod(0o755)
    assert (await output(script, "unload"), awake) == ((0, ""), set())
    models = [entry(server) for server in servers]
    async with running_jano(tmp_path, models, script, LINGER_MS=0) as jano:
        for model in ("chat", "code", "chat", "chat", "code"):  # all were asleep
            assert await jano.ask(model) == (200, {"answered_by": model})
            assert awake == {model}
        assert max(server.most for server in servers) == 1
        assert await output(script, "status") == (0, "chat: asleep\ncode: loaded\n")
        await servers[0].stop()  # one that is down holds no memory
        assert (await output(script, "code"))[0] == 0
        assert (await output(script, "chat"))[0] == 1
        assert awake == set()  # it fails after the other one has gone to sleep
        assert (await output(script, "no"))[0] == 1
    await servers[1].stop()


async def output(script: Path, word: str, **environ: str) -> tuple[int, str]:
    """Exit code and stdout, while our own servers answer it."""
    found = await asyncio.to_thread(run, script, word, **environ)
    return found.returncode, found.stdout


DOCKER = """#!/bin/sh
# Docker Compose, as far as the swap script calls it: services that run are files in `running`.
cd "$(dirname "$0")"
shift
echo "$*" >>docker.calls
case "$*" in
    "ps --services --status running") ls running ;;
    "stop -t 10 "*) rm -f "running/$4" ;;
    "up -d --no-deps "*) [ -e broken ] || touch "running/$4" ;;
    "logs --no-log-prefix -n 1 "*) echo "out of memory" ;;
    *) exit 1 ;;
esac
"""


async def test_docker_services_take_turns_in_running(tmp_path: Path) -> None:
    docker, script = tmp_path / "docker", tmp_path / "swap.sh"
    shutil.copy(CONTRIB / "swap.docker-compose.sh", script)
    docker.write_text(DOCKER)
    docker.chmod(0o755)
    (tmp_path / "running").mkdir()
    (tmp_path / "running/db").touch()  # a service that is no model
    path = f"{tmp_path}:{os.environ['PATH']}"
    backends = [Backend("chat"), Backend("code")]
    for backend in backends:
        await backend.start()
    models = [entry(backend) for backend in backends]
    async with running_jano(tmp_path, models, script, PATH=path, LINGER_MS=0) as jano:
        for model in ("code", "chat", "chat", "code"):
            assert (await jano.ask(model))[0] == 200
            assert {file.name for file in (tmp_path / "running").iterdir()} == {"db", model}
        assert await output(script, "status", PATH=path) == (0, "code: loaded\n")
        (tmp_path / "broken").touch()
        status, answer = await jano.ask("chat")
        assert (status, "exited with code 1" in answer["error"]["message"]) == (503, True)
        assert "out of memory" in str(await jano.logged("swap failed"))
        assert (await output(script, "no", PATH=path))[0] == 1
        (tmp_path / "broken").unlink()
        assert (await jano.ask("chat"))[0] == 200
        assert (await output(script, "unload", PATH=path))[0] == 0
        assert [file.name for file in (tmp_path / "running").iterdir()] == ["db"]
    for backend in backends:
        await backend.stop()
