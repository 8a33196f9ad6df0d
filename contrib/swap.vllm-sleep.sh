#!/usr/bin/env bash
# Swap script for Jano: vLLM servers that all stay up, one awake, the others in sleep mode. Level 1
# keeps a sleeper's weights in host memory and frees the GPU, so a swap takes seconds and the host
# needs room for all of them.
#
#   swap.vllm-sleep.sh NAME | status | unload     the contract of swap.example.sh
#
# It starts no server and restarts none that hangs. Start the servers yourself, one after the other;
# put each to sleep before you start the next:
#   VLLM_SERVER_DEV_MODE=1 vllm serve org/chat --enable-sleep-mode --host 127.0.0.1 --port 8081
#   ./swap.vllm-sleep.sh unload
# Dev mode opens endpoints that are nobody else's business: keep these servers on loopback.

set -u

table() {     # the name in models.json, the server's address
  model chat http://127.0.0.1:8081
  model code http://127.0.0.1:8080
}

die() { echo "${0##*/}: $*" >&2; exit 1; }

ask() { curl -fsS --noproxy '*' "$@"; }

state() {     # of the server at $1: awake, asleep, down (not running, so it holds nothing), unknown
  local answer
  answer=$(ask -m 4 "$1/is_sleeping" 2>/dev/null)
  case $?:$answer in
    0:*true*) echo asleep ;;
    0:*false*) echo awake ;;
    7:*) echo down ;;
    *) echo unknown ;;
  esac
}

to_sleep() {  # $1 name, $2 url
  case $(state "$2") in
    asleep | down) return ;;
    awake) ask -m 120 -X POST "$2/sleep?level=1" >&2 || die "\"$1\" does not go to sleep" ;;
    *) die "cannot tell whether \"$1\" sleeps: $2/is_sleeping does not say" ;;
  esac
  [ "$(state "$2")" = asleep ] || die "\"$1\" is still awake"
}

wake() {      # $1 name, $2 url
  case $(state "$2") in
    awake) return ;;
    asleep) ask -m 120 -X POST "$2/wake_up" >&2 || die "\"$1\" does not wake up" ;;
    down) die "\"$1\" is not running at $2" ;;
    *) die "cannot tell whether \"$1\" sleeps: $2/is_sleeping does not say" ;;
  esac
  [ "$(state "$2")" = awake ] || die "\"$1\" is still asleep"
}

lock() {      # one call at a time: the lock is on this very file and goes when we go
  exec 9<"$0"
  if command -v flock >/dev/null; then flock 9; else
    perl -e 'open(L, "<&=9") && flock(L, 2) or die "$!\n"'
  fi || die "cannot lock $0"
}

names=() urls=() url=''
model() {
  names+=("$1") urls+=("$2")
  if [ "$1" = "$wanted" ]; then url=$2; fi
}

[ $# -eq 1 ] || die "usage: ${0##*/} NAME | status | unload"
wanted=$1
table

case $wanted in
  status)
    for i in "${!names[@]}"; do
      # All are named: "asleep", "down" and "unknown" are for the reader; jano reads "loaded".
      state=$(state "${urls[i]}")
      echo "${names[i]}: ${state/awake/loaded}"
    done ;;
  unload)
    lock
    for i in "${!names[@]}"; do to_sleep "${names[i]}" "${urls[i]}"; done ;;
  *)
    [ "$url" ] || die "unknown model \"$wanted\"; its table has: ${names[*]}"
    lock
    for i in "${!names[@]}"; do
      [ "${names[i]}" = "$wanted" ] || to_sleep "${names[i]}" "${urls[i]}"
    done
    wake "$wanted" "$url" ;;
esac
exit 0
