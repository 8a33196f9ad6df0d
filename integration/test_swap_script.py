"""swap.example.sh as a user runs it: real processes, real signals, real ports."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from test_jano import JANO

PATIENCE = 10  # seconds that an event may take on a slow machine

# A server for the table. Its options say what is wrong with it.
SERVER = """
import argparse, signal, socket, sys, time
parser = argparse.ArgumentParser()
parser.add_argument("--port", type=int)
parser.add_argument("--say", default="loading")
parser.add_argument("--dies-after", type=float)
parser.add_argument("--deaf", action="store_true")
args = parser.parse_args()
if args.deaf:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
print(args.say.encode().decode("unicode_escape"), flush=True)
if args.port:
    listener = socket.create_server(("127.0.0.1", args.port))
if args.dies_after is not None:
    time.sleep(args.dies_after)
    sys.exit(1)
time.sleep(600)
"""


class Outcome(NamedTuple):
    code: int
    stdout: str
    stderr: str

    @property
    def reason(self) -> str:
        """The last line on stderr, which is what jano puts into its log."""
        return self.stderr.splitlines()[-1] if self.stderr else ""


class Swap:
    """swap.example.sh with another table, and the folder in which it keeps its files."""

    def __init__(self, folder: Path, **models: str) -> None:
        self.state = folder / "default"
        self.environ = {**os.environ, "SWAP_STATE_DIR": str(folder), "HOME": str(folder)}
        (folder / "server.py").write_text(SERVER)
        server = f"{sys.executable} -IS {folder}/server.py"
        rows = [f"  model {name} {row}\n" for name, row in models.items()]
        table = "".join(rows).replace("SERVER", server)
        example = JANO.with_name("swap.example.sh").read_text()
        text = re.sub(r"(?m)^(  model .*\n)+", lambda _: table, example, count=1)
        self.script = folder / "swap.sh"
        self.script.write_text(text.replace("grace=10", "grace=2"))
        self.script.chmod(0o755)

    def start(self, word: str, **environ: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [self.script, word],
            env={**self.environ, **environ},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def __call__(self, word: str, **environ: str) -> Outcome:
        process = self.start(word, **environ)
        stdout, stderr = process.communicate(timeout=60)
        return Outcome(process.returncode, stdout, stderr)

    def pid(self, name: str) -> int:
        return int((self.state / f"{name}.pid").read_text().split()[0])


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., Swap]]:
    """Makes the script of a test; at the end all its servers are stopped."""
    scripts = []

    def made(**models: str) -> Swap:
        scripts.append(Swap(tmp_path, **models))
        return scripts[-1]

    yield made
    for script in scripts:
        script("unload")


@contextlib.contextmanager
def forgotten_server() -> Iterator[int]:
    """Somebody else listens; on which port."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


def free_port() -> int:
    with forgotten_server() as port:
        return port


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{pid}/stat").read_text()
    return stat.rpartition(")")[2].split()[0] not in "ZX"


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


# ------------------------------------------------------------------------------- swapping ----


def test_server_is_gone_before_the_next_one_starts(make: Callable[..., Swap]) -> None:
    port = free_port()  # of both, so that the second could not listen beside the first
    swap = make(chat=f"SERVER --port {port}", code=f"SERVER --port {port}")
    assert swap("chat") == (0, "", "")
    chat = swap.pid("chat")
    wait_until(lambda: socket.socket().connect_ex(("127.0.0.1", port)) == 0)
    assert swap("status").stdout == "chat: loaded\n"
    assert swap("code") == (0, "", "")
    assert not alive(chat)
    assert swap("status") == (0, "code: loaded\n", "")
    assert swap("unload") == (0, "", "")
    assert swap("status") == (0, "", "")


def test_loaded_server_is_left_alone(make: Callable[..., Swap]) -> None:
    swap = make(chat="SERVER")
    swap("chat")
    before = swap.pid("chat")
    assert swap("chat") == (0, "", "")
    assert swap.pid("chat") == before


def test_server_whose_row_has_left_the_table_is_stopped(make: Callable[..., Swap]) -> None:
    make(chat="SERVER")("chat")
    swap = make(talk="SERVER", code="SERVER")
    chat = swap.pid("chat")
    assert swap("talk") == (0, "", "")
    assert not alive(chat)
    swap = make(code="SERVER")
    talk = swap.pid("talk")
    assert swap("unload") == (0, "", "")
    assert not alive(talk)


def test_restart_replaces_the_loaded_server(make: Callable[..., Swap]) -> None:
    swap = make(chat="SERVER")
    swap("chat")
    before = swap.pid("chat")
    assert swap("chat", JANO_RESTART="1") == (0, "", "")
    assert not alive(before)
    assert alive(swap.pid("chat"))


def test_suspended_server_is_replaced_without_waiting_for_the_grace(
    make: Callable[..., Swap],
) -> None:
    swap = make(chat="SERVER")
    swap("chat")
    before = swap.pid("chat")
    os.kill(before, signal.SIGSTOP)
    begin = time.monotonic()
    assert swap("chat", JANO_RESTART="1") == (0, "", "")
    assert time.monotonic() - begin < 2
    assert not alive(before)


def test_server_that_ignores_sigterm_is_killed_after_the_grace(make: Callable[..., Swap]) -> None:
    swap = make(chat="SERVER --deaf", code="SERVER")
    swap("chat")
    chat = swap.pid("chat")
    wait_until(lambda: "loading" in (swap.state / "chat.log").read_text())
    assert swap("code") == (0, "", "")
    assert not alive(chat)


def test_models_of_a_set_run_together_and_one_of_two_sets_keeps_running(
    make: Callable[..., Swap],
) -> None:
    swap = make(
        chat="SERVER",
        embed="SERVER",
        code="SERVER",
        small="together chat embed",
        large="together code embed",
    )
    assert swap("small") == (0, "", "")
    assert swap("status").stdout == "chat: loaded\nembed: loaded\n"
    embed = swap.pid("embed")
    assert swap("large") == (0, "", "")
    assert swap("status").stdout == "embed: loaded\ncode: loaded\n"
    assert swap.pid("embed") == embed
    assert swap("large", JANO_RESTART="1").code == 0
    assert not alive(embed)
    assert swap("code").code == 0
    assert swap("status").stdout == "code: loaded\n"


def test_overlapping_calls_leave_the_server_of_one_of_them(make: Callable[..., Swap]) -> None:
    swap = make(chat="SERVER", code="SERVER")
    runs = [swap.start(name) for name in ["chat", "code"] * 4]
    for run in runs:
        assert run.communicate(timeout=60) == ("", "")
        assert run.returncode == 0
    servers = subprocess.run(
        ["pgrep", "-f", str(swap.state.with_name("server.py"))], capture_output=True, text=True
    ).stdout.split()
    name = swap("status").stdout.removesuffix(": loaded\n")
    assert servers == [str(swap.pid(name))]


@pytest.mark.parametrize("delay", [0, 0.05, 0.2, 0.8])
def test_call_after_one_that_was_killed_puts_things_right(
    make: Callable[..., Swap], delay: float
) -> None:
    swap = make(chat="SERVER --deaf", code="SERVER --deaf")
    swap("chat")
    chat = swap.pid("chat")
    killed = swap.start("code")
    time.sleep(delay)
    killed.kill()
    killed.communicate()
    assert swap("code") == (0, "", "")
    assert not alive(chat)
    assert swap("status").stdout == "code: loaded\n"


# ------------------------------------------------------------------- servers that misbehave ----


def test_server_that_exits_at_once_fails_the_swap_with_its_last_words(
    make: Callable[..., Swap],
) -> None:
    swap = make(chat="SERVER --dies-after 0 --say one\\\\ntwo", code="SERVER")
    swap("code")
    outcome = swap("chat")
    assert (outcome.code, outcome.stdout) == (1, "")
    log = swap.state / "chat.log"
    assert outcome.stderr == f'one\ntwo\nswap.sh: "chat" exited at once: two (log: {log})\n'
    assert swap("status") == (0, "", "")


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ("CUDA error: out of memory", "CUDA error: out of memory"),
        ("torch.OutOfMemoryError: no\\n  exiting \\n\\n", "torch.OutOfMemoryError: no"),
        ("std::bad_alloc\\nexiting", "std::bad_alloc"),
        ("loading\\n  exiting \\n \\n", "  exiting "),
        ("10 %\\r20 %\\0", "20 % "),
        ("", "no output"),
        ("x" * 999, "x" * 200),
    ],
)
def test_status_says_why_a_server_died(make: Callable[..., Swap], said: str, reason: str) -> None:
    swap = make(chat=f"SERVER --dies-after 1 --say '{said}'")
    assert swap("chat") == (0, "", "")
    assert swap("status") == (0, "chat: loaded\n", "")
    wait_until(lambda: not alive(swap.pid("chat")))
    log = swap.state / "chat.log"
    assert swap("status") == (0, "chat: dead\n", f"chat: dead: {reason} (log: {log})\n")
    assert swap("unload") == (0, "", "")
    assert swap("status") == (0, "", "")


def test_server_killed_while_it_loads_is_dead_and_started_anew(make: Callable[..., Swap]) -> None:
    swap = make(chat="SERVER")
    swap("chat")
    os.kill(swap.pid("chat"), signal.SIGKILL)
    wait_until(lambda: swap("status").stdout == "chat: dead\n")
    assert swap("chat") == (0, "", "")
    assert swap("status") == (0, "chat: loaded\n", "")


@pytest.mark.parametrize("spelling", ["--port {}", "--port={}"])
def test_port_that_somebody_else_listens_on_is_refused_by_name(
    make: Callable[..., Swap], spelling: str
) -> None:
    with forgotten_server() as port:
        swap = make(chat=f"SERVER {spelling.format(port)}")
        outcome = swap("chat")
    assert outcome.code == 1
    assert outcome.reason.startswith(f'swap.sh: port {port} of "chat" is taken by ')
    if shutil.which("lsof") or shutil.which("ss"):
        assert f"process {os.getpid()}: " in outcome.reason
    assert swap("status") == (0, "", "")
    assert swap("chat").code == 0


def test_workers_of_a_server_whose_leader_died_are_stopped_too(make: Callable[..., Swap]) -> None:
    swap = make(chat="sh -c 'SERVER & echo $!; exec SERVER'", code="SERVER")
    swap("chat")
    log = swap.state / "chat.log"
    wait_until(lambda: log.read_text().count("loading") == 2)
    worker = int(log.read_text().split()[0])
    os.kill(swap.pid("chat"), signal.SIGKILL)
    wait_until(lambda: swap("status").stdout == "chat: dead\n")
    assert alive(worker)
    assert swap("code") == (0, "", "")
    assert not alive(worker)


# ------------------------------------------------------------------ machines that misbehave ----


@pytest.mark.parametrize("line", [0, 1, 2], ids=["another process", "another boot", "a later one"])
def test_process_that_only_has_the_number_of_a_server_is_not_touched(
    make: Callable[..., Swap], line: int
) -> None:
    swap = make(chat="SERVER", code="SERVER")
    swap("chat")
    record = swap.state / "chat.pid"
    lines = record.read_text().splitlines()
    chat = int(lines[0])
    lines[line] = "1" if line == 0 else f"{lines[line]}0"
    record.write_text("\n".join(lines) + "\n")
    assert swap("code").code == 0
    assert alive(chat)
    os.kill(chat, signal.SIGKILL)


def test_full_disk_fails_before_anything_is_stopped(make: Callable[..., Swap]) -> None:
    swap = make(chat="SERVER", code="SERVER")
    swap("chat")
    (swap.state / "room").symlink_to("/dev/full")
    outcome = swap("code")
    assert (outcome.code, outcome.reason) == (1, f"swap.sh: cannot write in {swap.state}")
    assert swap("chat").code == 0  # nothing is to be written
    assert swap("status") == (0, "chat: loaded\n", "")


def test_machine_without_ps_is_told_what_is_missing(
    make: Callable[..., Swap], tmp_path: Path
) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    for tool in ("env", "bash", "mkdir"):
        (tools / tool).symlink_to(shutil.which(tool) or tool)
    swap = make(chat="SERVER")
    outcome = swap("chat", PATH=str(tools))
    assert outcome.code == 1
    assert outcome.reason == "swap.sh: needs a ps that knows -A and -o (procps)"


@pytest.mark.parametrize(
    ("word", "reason"),
    [
        ("nobody", 'swap.sh: unknown model "nobody"; the table has: chat absent small all'),
        ("absent", 'swap.sh: "absent": command not found: no-such-server'),
        ("small", 'swap.sh: unknown model "embed"; the table has: chat absent small all'),
        ("all", 'swap.sh: "all": "small" is itself a set'),
    ],
)
def test_name_that_cannot_be_started_costs_nothing(
    make: Callable[..., Swap], word: str, reason: str
) -> None:
    sets = {"small": "together chat embed", "all": "together chat small"}
    swap = make(chat="SERVER", absent="no-such-server --port 1", **sets)
    swap("chat")
    assert swap(word) == (1, "", f"{reason}\n")
    assert swap("status").stdout == "chat: loaded\n"


def test_row_without_a_command_is_a_fault_that_says_so(make: Callable[..., Swap]) -> None:
    assert make(chat="")("chat").reason == 'swap.sh: "chat" has no command in the table'


# --------------------------------------------------------------- swap.cuda-suspend.sh ----

# A module in place of Python's own, as there is no GPU here: libcuda.so.1 whose processes are files
# named by their ids that hold their states. It notes the calls that change one.
CTYPES = """
import os
from pathlib import Path

STATES = Path(os.environ["CUDA_STATES"])
STEPS = {"Lock": "01", "Checkpoint": "12", "Restore": "21", "Unlock": "10"}


class Unsigned:
    def __mul__(self, length):
        return lambda *values: values


class c_int:
    value = -1


c_uint = Unsigned()


def byref(place):
    return place


class CDLL:
    def __init__(self, name):
        assert name == "libcuda.so.1"

    def cuInit(self, flags):
        return 0

    def cuCheckpointProcessGetState(self, pid, place):
        if not (STATES / str(pid)).exists():
            return 1
        place.value = int((STATES / str(pid)).read_text())
        return 0

    def __getattr__(self, name):
        step = name.removeprefix("cuCheckpointProcess")
        before, after = STEPS[step]

        def call(pid, arguments):
            file = STATES / str(pid)
            if (STATES / "refuse").exists() or file.read_text().strip() != before:
                return 401
            file.write_text(after)
            with (STATES / "calls").open("a") as calls:
                print(step, pid, file=calls)
            return 0

        return call
"""


class CudaSwap(Swap):
    """swap.cuda-suspend.sh, servers that count as CUDA processes, and what the driver was asked."""

    def __init__(self, folder: Path, **models: str) -> None:
        super().__init__(folder)
        self.states = folder / "states"
        self.states.mkdir()
        (folder / "fakes").mkdir()
        (folder / "fakes/ctypes.py").write_text(CTYPES)
        self.environ["PYTHONPATH"] = str(folder / "fakes")
        self.environ["CUDA_STATES"] = str(self.states)
        server = folder / "server.sh"
        server.write_text('#!/bin/sh\necho 0 >"$CUDA_STATES/$$"\necho loading\nexec sleep 600\n')
        server.chmod(0o755)
        rows = [f"  model {name} {row}\n" for name, row in models.items()]
        table = "".join(rows).replace("SERVER", str(server))
        text = (JANO.with_name("contrib") / "swap.cuda-suspend.sh").read_text()
        self.script.write_text(re.sub(r"(?m)^(  model .*\n)+", lambda _: table, text, count=1))

    def calls(self) -> list[str]:
        """What was done since the last time that we asked, with names in place of process ids."""
        file = self.states / "calls"
        text = file.read_text() if file.exists() else ""
        file.unlink(missing_ok=True)
        for name in ("chat", "code"):
            if (self.state / f"{name}.pid").exists():
                text = text.replace(f" {self.pid(name)}\n", f" {name}\n")
        return text.splitlines()


@pytest.fixture
def cuda(tmp_path: Path) -> Iterator[CudaSwap]:
    swap = CudaSwap(tmp_path, chat="SERVER", code="SERVER")
    yield swap
    swap("stop")


def test_cuda_servers_take_turns_on_the_gpu_and_keep_running(cuda: CudaSwap) -> None:
    assert cuda("chat") == (0, "", "")
    chat = cuda.pid("chat")
    assert cuda("code") == (0, "", "")
    assert cuda.calls() == ["Lock chat", "Checkpoint chat"]
    assert cuda("status") == (0, "chat: suspended\ncode: loaded\n", "")
    assert cuda("chat") == (0, "", "")
    assert cuda.calls() == ["Lock code", "Checkpoint code", "Restore chat", "Unlock chat"]
    assert cuda.pid("chat") == chat
    assert cuda("chat") == (0, "", "")
    assert cuda.calls() == []
    assert cuda("unload") == (0, "", "")
    assert cuda("status") == (0, "chat: suspended\ncode: suspended\n", "")
    assert cuda("stop") == (0, "", "")
    assert not alive(chat)


def test_cuda_server_that_cannot_be_suspended_is_killed(cuda: CudaSwap) -> None:
    cuda("chat")
    chat = cuda.pid("chat")
    (cuda.states / "refuse").touch()
    assert cuda("code").code == 0
    assert not alive(chat)
    assert cuda("status").stdout == "code: loaded\n"


def test_cuda_server_that_cannot_be_woken_is_started_anew(cuda: CudaSwap) -> None:
    for name in ("chat", "code", "unload"):
        cuda(name)
    chat = cuda.pid("chat")
    (cuda.states / "refuse").touch()
    assert cuda("chat").code == 0
    assert not alive(chat)
    assert alive(cuda.pid("chat"))


@pytest.mark.parametrize("done", ["1", "2"], ids=["locked", "suspended"])
def test_cuda_server_left_half_way_by_a_killed_call_is_put_right(cuda: CudaSwap, done: str) -> None:
    cuda("chat")
    (cuda.states / str(cuda.pid("chat"))).write_text(done)
    assert cuda("code") == (0, "", "")
    assert cuda("status").stdout == "chat: suspended\ncode: loaded\n"
    (cuda.states / str(cuda.pid("chat"))).write_text(done)
    assert cuda("chat") == (0, "", "")
    assert cuda("status").stdout == "chat: loaded\ncode: suspended\n"


def test_cuda_server_is_replaced_on_demand_and_a_dead_one_is_named(cuda: CudaSwap) -> None:
    cuda("chat")
    chat = cuda.pid("chat")
    assert cuda("chat", JANO_RESTART="1") == (0, "", "")
    assert not alive(chat)
    os.kill(cuda.pid("chat"), signal.SIGKILL)
    wait_until(lambda: not alive(cuda.pid("chat")))
    assert cuda("status") == (0, "chat: dead\n", "chat: dead: loading\n")
    assert cuda("chat") == (0, "", "")
    assert cuda("status") == (0, "chat: loaded\n", "")
