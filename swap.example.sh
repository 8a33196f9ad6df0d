#!/usr/bin/env bash
# Swap script for Jano: the servers are plain processes, each with a log and a pid file.
#
#   swap.sh NAME      stop the other servers, wait until they are gone, start NAME's; exit 0.
#                     NAME runs already: exit 0 at once. Jano waits until it answers, we do not.
#                     JANO_RESTART=1 in the environment: it runs but does not answer: restart it.
#   swap.sh status    print "NAME: loaded" for a server that runs, "NAME: dead" for one that ended
#                     by itself, and the reason on stderr, whose last line Jano logs
#   swap.sh unload    stop all servers
#
# Exit 0 means done; anything else comes with a line on stderr. Calls may overlap, be repeated, or
# be killed half-way: the next one puts things right. Needs bash 3.2 and ps; for Linux and macOS.

set -u

# Your models: the name in models.json, then its server's command. The command must stay in the
# foreground: no `&`, no daemon mode. `env CUDA_VISIBLE_DEVICES=1 some-server …` works as well.
# A set (models that run at the same time) is a row, too: `model SET together MODEL MODEL …`.
table() {
  model chat llama-server -m "$HOME/models/chat.gguf" --port 8081
  model code llama-server -m "$HOME/models/code.gguf" --port 8080
}

grace=10   # seconds between asking a server to stop and killing it

# This folder has NAME.pid, NAME.log and NAME.log.1. Each group of models has its own folder: a swap
# stops only servers of its group. By hand, for the group gpu1: JANO_GROUP=gpu1 ./swap.sh …
group=${JANO_GROUP:-default}
dir=${SWAP_STATE_DIR:-${XDG_STATE_HOME:-$HOME/.local/state}/jano}/${group//\//_}

PATH=$PATH:/usr/sbin:$HOME/.local/bin:/usr/local/bin:/opt/homebrew/bin   # cron's is very short

die() { echo "${0##*/}: $*" >&2; exit 1; }
file() { echo "$dir/${1//\//_}.$2"; }   # names like org/model are fine

# --- Plain processes: start, stop, loaded. Others to put in their place are at the end of the file.

start() {
  local log; log=$(file "$1" log)
  [ "${cmd[*]-}" ] || die "\"$1\" has no command in the table"
  refuse_taken_port "$1"
  mv -f "$log" "$log.1" 2>/dev/null
  set -m      # job control gives the server a process group of its own: it outlives us and jano
  (record "$1" && exec 9>&- && exec "${cmd[@]}") </dev/null >>"$log" 2>&1 &
  set +m
  disown      # or bash reports a crash in words of its own
  for _ in 1 2 3 4 5; do
    sleep 0.1
    living $! $! && continue
    tail -n 5 "$log" >&2
    stop "$1"
    die "\"$1\" exited at once: $(last_words "$1")"
  done
}

stop() {
  if recorded "$1"; then
    kill -TERM -- "-$pid" 2>/dev/null
    kill -CONT -- "-$pid" 2>/dev/null       # a suspended process acts on TERM when it goes on
    if ! gone_within "$grace"; then
      kill -KILL -- "-$pid" 2>/dev/null     # vLLM with an open stream ignores TERM
      gone_within 30 || die "\"$1\" (process group $pid) does not stop"
    fi
  fi
  rm -f "$(file "$1" pid)"
}

loaded() { recorded "$1" && living "$pid" "$pid"; }

died() { [ -s "$(file "$1" pid)" ] && ! loaded "$1"; }      # was started, and not stopped by us

# Why the server of $1 ended: the last line of its log about memory, or else the last line (which,
# with llama-server, says only that it exits).
last_words() {
  local log lines cause memory='(out ?of|insufficient).*memory|(failed|unable) to alloc|bad_alloc'
  log=$(file "$1" log)
  lines=$(export LC_ALL=C
    tail -n 200 "$log" 2>/dev/null | tr '\r\000' '\n ' | grep -a '[^[:space:]]')
  cause=$(printf '%s\n' "$lines" | grep -aEi "$memory")
  cause=${cause:-${lines:-no output}}
  cause=${cause##*$'\n'}
  echo "${cause:0:200} (log: $log)"
}

# A server that finds its port taken dies late or never, and the answers of whoever listens there
# would pass for the model's.
refuse_taken_port() {
  local port owner option=' --port[ =]([0-9]+) '
  [[ " ${cmd[*]-} " =~ $option ]] || return 0
  port=${BASH_REMATCH[1]}
  (exec 3<>"/dev/tcp/localhost/$port") 2>/dev/null || return 0
  owner=$({ lsof -nP -t -iTCP:"$port" -sTCP:LISTEN ||
    ss -Hltnp "sport = :$port" | sed -n 's/.*pid=\([0-9]*\).*/\1/p'; } 2>/dev/null | head -n 1)
  if [ "$owner" ]; then owner="process $owner: $(ps -o args= -p "$owner")"; fi
  die "port $port of \"$1\" is taken by ${owner:-a process of somebody else}"
}

# Runs in the child, before it becomes the server: no server ever runs without its pid file, nor is
# the lock (fd 9) free before that is written, even if we are killed.
record() {
  local self
  self=$(exec sh -c 'echo $PPID')           # bash 3.2 has no BASHPID
  printf '%s\n' "$self" "$(boot_id)" "$(born "$self")" >"$(file "$1" pid)"
}

# Sets pid to the process, and group, that start recorded; false if the number is somebody else's
# by now. A leader that died leaves its number to nobody while its group, with the memory, lives.
recorded() {
  local boot since now
  [ -s "$(file "$1" pid)" ] || return 1
  { read -r pid; read -r boot; read -r since; } <"$(file "$1" pid)"
  [ "$pid" -gt 1 ] 2>/dev/null || return 1
  [ "$boot" = "$(boot_id)" ] || return 1
  now=$(born "$pid")
  [ -z "$now" ] || [ "$now" = "$since" ]
}

boot_id() { cat /proc/sys/kernel/random/boot_id 2>/dev/null || sysctl -n kern.bootsessionuuid; }

born() {      # when process $1 started; Linux's lstart moves when the clock is set, ticks do not
  if [ -r /proc/self/stat ]; then sed 's/.*) //' "/proc/$1/stat" 2>/dev/null | cut -d ' ' -f 20
  else LC_ALL=C TZ=UTC0 ps -o lstart= -p "$1" | tr -d ' '; fi
}

# Is there a process $1 (a pattern) of group $2 that holds memory? A zombie does not, unless other
# threads of it are still on their way out (Zl).
living() {
  local all; all=$(ps -A -o pid= -o pgid= -o stat=) || die "ps failed"
  printf '%s\n' "$all" | grep -Eq "^ *$1 +$2 +([^Z ]|Z[^ ]*l)"    # <<< would need room in /tmp
}

gone_within() {     # counts its looks, as the clock may jump
  local looks=$(($1 * 10))
  while living '[0-9]+' "$pid"; do
    [ $((looks--)) -gt 0 ] || return 1
    sleep 0.1
  done
}

# --- The contract, whatever the servers are.

models=() members=() cmd=() sought=''

# Finds $1 in the table: members are the models that it stands for, and cmd is its command.
look_up() {
  sought=$1 models=() members=() cmd=()
  table
  if [ "${cmd[0]-}" = together ]; then members=("${cmd[@]:1}"); fi
  [ "${members[*]-}" ] || die "unknown model \"$1\"; the table has: ${models[*]-}"
}

model() {
  models+=("$1")
  if [ "$1" = "$sought" ]; then members=("$1") cmd=("${@:2}"); fi
}

among() {     # is $1 one of the others?
  local word
  for word in "${@:2}"; do if [ "$word" = "$1" ]; then return 0; fi; done
  return 1
}

lock() {      # one call at a time; the kernel drops the lock when its holder dies, however it dies
  exec 9>"$dir/lock"
  if command -v flock >/dev/null; then flock 9; else
    perl -e 'open(L, ">&=9") && flock(L, 2) or die "$!\n"'      # macOS has no flock
  fi || die "cannot lock $dir/lock"
}

strays() {    # servers whose row has left the table
  local file name
  for file in "$dir"/*.pid; do
    name=${file##*/} name=${name%.pid}
    among "$name" "${models[@]//\//_}" || models+=("$name")
  done
}

need_room() {   # for pid file and log; to be asked before anything is stopped
  if ! echo >"$dir/room" || ! rm "$dir/room"; then die "cannot write in $dir"; fi
}

[ $# -eq 1 ] || die "usage: ${0##*/} NAME | status | unload"
(umask 077 && mkdir -p "$dir") || exit 1
ps -A -o pid= -o pgid= -o stat= >/dev/null || die "needs a ps that knows -A and -o (procps)"

case $1 in
  status)
    table
    for name in "${models[@]}"; do
      if loaded "$name"; then
        echo "$name: loaded" || exit 1      # for Jano, an unnamed model is not loaded
      elif died "$name"; then
        echo "$name: dead"
        echo "$name: dead: $(last_words "$name")" >&2
      fi
    done ;;
  unload)
    lock
    table
    strays
    for name in "${models[@]}"; do stop "$name"; done ;;
  *)
    look_up "$1"
    wants=("${members[@]}")
    for name in "${wants[@]}"; do
      look_up "$name"
      [ "${cmd[0]-}" != together ] || die "\"$1\": \"$name\" is itself a set"
      [ -z "${cmd[*]-}" ] || command -v "${cmd[0]}" >/dev/null ||
        die "\"$name\": command not found: ${cmd[0]}"
    done
    lock
    for name in "${wants[@]}"; do loaded "$name" || need_room; done
    strays
    for name in "${models[@]}"; do
      if [ "${JANO_RESTART-}" = 1 ] || ! among "$name" "${wants[@]}"; then stop "$name"; fi
    done
    for name in "${wants[@]}"; do
      loaded "$name" && continue
      stop "$name"      # what is left of it, should its leader have died
      look_up "$name"
      start "$name"
    done ;;
esac
exit 0

# --- Other kinds of server. Put one of these blocks in place of start, stop and loaded (record and
# what follows it are then unused); the rows of the table need no command any more: `model chat`.
# With several groups, let the table list the models of $JANO_GROUP alone.
#
# systemd: a user unit a model, llm-chat.service and so on, with Type=exec
#   start()  { systemctl --user start "llm-$1" || die "llm-$1 does not start"; }
#   stop()   { systemctl --user stop "llm-$1" || die "llm-$1 does not stop"; }
#   loaded() { systemctl --user --quiet is-active "llm-$1"; }
#
# launchd: llm.chat.plist and so on with RunAtLoad, not in LaunchAgents: they would start at login
#   start()  { launchctl bootstrap "gui/$UID" "$HOME/models/llm.$1.plist" || exit 1; }
#   stop()   { launchctl bootout "gui/$UID/llm.$1" 2>/dev/null
#              while job "$1" >/dev/null; do sleep 0.1; done; }
#   loaded() { job "$1" | grep -q 'state = running'; }
#   job()    { launchctl print "gui/$UID/llm.$1" 2>/dev/null; }
#
# docker: `docker create --name llm-chat …` once for each model (Compose: contrib/)
#   start()  { docker start "llm-$1" >/dev/null || exit 1; }
#   stop()   { docker stop -t "$grace" "llm-$1" >/dev/null || exit 1; }
#   loaded() { [ "$(docker inspect -f '{{.State.Running}}' "llm-$1")" = true ]; }
#
# vLLM asleep: all servers stay up, one awake (contrib/swap.vllm-sleep.sh does it with more checks)
#   url()    { case $1 in chat) echo 127.0.0.1:8081 ;; code) echo 127.0.0.1:8080 ;; esac; }
#   start()  { curl -fsS -m 60 -X POST "$(url "$1")/wake_up" || exit 1; }
#   stop()   { ! loaded "$1" || curl -fsS -m 60 -X POST "$(url "$1")/sleep?level=1" || exit 1; }
#   loaded() { curl -fsS -m 4 "$(url "$1")/is_sleeping" | grep -q false; }
