#!/usr/bin/env bash
# Swap script for Jano: CUDA servers that all stay up, one on the GPU, the others suspended. The
# driver moves the GPU memory of a process into host RAM and back. The server keeps its port, its
# weights and its prompt cache, and needs no change.
#
#   swap.cuda-suspend.sh NAME | status | unload     the contract of swap.example.sh
#   swap.cuda-suspend.sh stop                       end all servers
#
# A model's first swap starts its server. One that cannot be suspended or woken is killed.
# Needs Linux, NVIDIA's driver 570 or later, bash 4, python3, procps, util-linux, and as much host RAM
# as all servers have GPU memory. The driver cannot suspend unified memory or memory that
# processes share (IPC).
#
# Measured with transformers serve on an H200 in a virtual machine: 2.2 s instead of 19.3 s for a
# model of 1.2 GB; for one of 36 GB 24 to 28 s (2 GB/s into RAM, 5.5 GB/s back) against 22 s. So it
# pays for servers that start slowly, such as vLLM, and for caches worth keeping; not for
# llama-server. Processes that only hold memory: 1.5 to 2 s for 1 GB, 11 to 15 s for 16 GB.

set -u

table() {     # the name in models.json, its server's command
  model chat vllm serve org/chat --host 127.0.0.1 --port 8081
  model code vllm serve org/code --host 127.0.0.1 --port 8080
}

dir=${SWAP_STATE_DIR:-${XDG_STATE_HOME:-$HOME/.local/state}/jano}/${JANO_GROUP:-default}

die() { echo "${0##*/}: $*" >&2; exit 1; }
file() { echo "$dir/${1//\//_}.$2"; }

# Suspends or resumes these processes, and prints their state. Others than CUDA's do not count.
cuda() {      # state | suspend | resume, then process ids
  python3 - "$@" <<'PYTHON'
import ctypes, sys

RUNNING, LOCKED, SUSPENDED = range(3)
libcuda = ctypes.CDLL("libcuda.so.1")


def call(name, *arguments):
    code = getattr(libcuda, name)(*arguments)
    if code:
        sys.exit(f"{name}{arguments[:1]} failed: CUDA error {code}")


def state(pid):
    found = ctypes.c_int()
    code = libcuda.cuCheckpointProcessGetState(pid, ctypes.byref(found))
    return None if code else found.value


call("cuInit", 0)
action, *numbers = sys.argv[1:]
pids = [pid for pid in map(int, numbers) if state(pid) is not None]
if action == "suspend":
    patience = (ctypes.c_uint * 16)(10_000)  # CUcheckpointLockArgs: milliseconds, then zeros
    for pid in pids:
        if state(pid) == RUNNING:
            call("cuCheckpointProcessLock", pid, patience)
    for pid in pids:
        if state(pid) != SUSPENDED:
            call("cuCheckpointProcessCheckpoint", pid, None)
if action == "resume":
    for pid in pids:
        if state(pid) == SUSPENDED:
            call("cuCheckpointProcessRestore", pid, None)
    for pid in pids:
        if state(pid) == LOCKED:
            call("cuCheckpointProcessUnlock", pid, None)
on_gpu = not pids or any(state(pid) == RUNNING for pid in pids)  # no pids: it is about to load
print("loaded" if on_gpu else "suspended")
PYTHON
}

# Which start of the machine this is, and when in it process $1 began: nothing, if there is none.
born() {
  echo "$(cat /proc/sys/kernel/random/boot_id) $(sed 's/.*) //' "/proc/$1/stat" 2>/dev/null |
    cut -d ' ' -f 20)"
}

record() { local self=$BASHPID; echo "$self $(born "$self")" >"$(file "$1" pid)"; }

# Sets session to that of the server, all its processes; false if the number is another's by now.
recorded() {
  local since
  { read -r session since <"$(file "$1" pid)"; } 2>/dev/null || return 1
  [[ $since == "$(born "$session")"* ]]
}

processes() { ps -o stat= -o pid= -s "$session" | awk '!/^[ZX]/ { print $2 }'; }

running() { recorded "$1" && processes | grep -qx "$session"; }

start() {
  local log; log=$(file "$1" log)
  mv -f "$log" "$log.1" 2>/dev/null
  (record "$1" && exec 9>&- && exec setsid "${cmd[@]}") </dev/null >>"$log" 2>&1 &
  sleep 0.5
  running "$1" || die "\"$1\" exited at once: $(tail -n 1 "$log") (log: $log)"
}

suspend() {
  # shellcheck disable=SC2046  # a word for each process
  if ! running "$1" || [ "$(cuda suspend $(processes))" != suspended ]; then stop "$1"; fi
}

resume() {
  # shellcheck disable=SC2046
  running "$1" && [ "$(cuda resume $(processes))" = loaded ]
}

stop() {      # by force: who is suspended cannot end by itself
  if recorded "$1"; then
    pkill -KILL -s "$session"
    while [ "$(processes)" ]; do sleep 0.1; done
  fi
  rm -f "$(file "$1" pid)"
}

models=() cmd=()
model() {
  models+=("$1")
  if [ "$1" = "$wanted" ]; then cmd=("${@:2}"); fi
}

[ $# -eq 1 ] || die "usage: ${0##*/} NAME | status | unload | stop"
wanted=$1
table
mkdir -p "$dir" || exit 1
[ "$1" = status ] || { exec 9>"$dir/lock" && flock 9; } || die "cannot lock $dir/lock"

case $1 in
  status)
    for name in "${models[@]}"; do
      # shellcheck disable=SC2046
      if running "$name"; then
        echo "$name: $(cuda state $(processes))"
      elif [ -e "$(file "$name" pid)" ]; then
        echo "$name: dead"
        echo "$name: dead: $(tail -n 1 "$(file "$name" log)")" >&2
      fi
    done ;;
  unload) for name in "${models[@]}"; do suspend "$name"; done ;;
  stop) for name in "${models[@]}"; do stop "$name"; done ;;
  *)
    [ "${cmd[*]-}" ] || die "unknown model \"$1\"; its table has: ${models[*]}"
    for name in "${models[@]}"; do [ "$name" = "$1" ] || suspend "$name"; done
    if [ "${JANO_RESTART-}" = 1 ] || ! resume "$1"; then
      stop "$1"
      start "$1"
    fi ;;
esac
