#!/usr/bin/env bash
# Swap script for Jano: each model is a service of the compose.yaml beside this file; one runs.
#
#   swap.docker-compose.sh NAME | status | unload     the contract of swap.example.sh
#
# Name the services as the models in models.json, publish their ports on loopback, and set
# `restart: "no"`, or Docker starts them all at boot:
#
#   services:
#     chat:
#       image: ghcr.io/ggml-org/llama.cpp:server
#       command: -m /models/chat.gguf --host 0.0.0.0 --port 8080
#       ports: ["127.0.0.1:8081:8080"]
#       volumes: ["./models:/models:ro"]
#       restart: "no"
#
# Run `docker compose pull` first: a swap has a deadline.

set -u

models=(chat code)
grace=10      # seconds between asking a server to stop and killing it

die() { echo "${0##*/}: $*" >&2; exit 1; }

stop() { docker compose stop -t "$grace" "$1" || die "\"$1\" does not stop"; }   # waits for its end

running() {   # is the service $1 running?
  local all; all=$(docker compose ps --services --status running) || die "docker compose fails"
  printf '%s\n' "$all" | grep -qxF -e "$1"     # <<< would need room in /tmp
}

lock() {      # one call at a time: the lock is on this very file and goes when we go
  exec 9<"$script"
  if command -v flock >/dev/null; then flock 9; else
    perl -e 'open(L, "<&=9") && flock(L, 2) or die "$!\n"'
  fi || die "cannot lock $script"
}

[ $# -eq 1 ] || die "usage: ${0##*/} NAME | status | unload"
PATH=$PATH:/usr/local/bin:/opt/homebrew/bin
cd "$(dirname "$0")" || exit 1
script=$PWD/${0##*/}

case $1 in
  status)
    for name in "${models[@]}"; do if running "$name"; then echo "$name: loaded"; fi; done ;;
  unload)
    lock
    for name in "${models[@]}"; do stop "$name"; done ;;
  *)
    [[ " ${models[*]} " == *" $1 "* ]] || die "unknown model \"$1\"; it knows: ${models[*]}"
    lock
    for name in "${models[@]}"; do
      # JANO_RESTART=1: it runs but does not answer.
      if [ "$name" != "$1" ] || [ "${JANO_RESTART-}" = 1 ]; then stop "$name"; fi
    done
    running "$1" && exit 0
    docker compose up -d --no-deps "$1" || die "\"$1\" does not start"
    sleep 1
    running "$1" || die "\"$1\" exited at once: $(docker compose logs --no-log-prefix -n 1 "$1")" ;;
esac
exit 0
