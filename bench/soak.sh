#!/usr/bin/env bash
# The swap script of soak.py, which calls it for its monkey as well. All that it knows is in files.
#
#   soak.sh SET|unload|status   as SWAP_COMMAND: old servers are killed or left alone, some swaps fail
#   soak.sh START MODEL         starts the model's server; one that runs is kept
#   soak.sh SIGNAL MODEL        sends it a signal

members() {  # members SET prints its models
  if [ "$1" = talk ]; then echo chat embed; else echo "$1"; fi
}

send() {     # send SIGNAL MODEL fails if the model has no server
  [ -e "$2.pid" ] || return 1
  kill "-$1" "$(<"$2.pid")" 2>/dev/null || return 1
  if [ "$1" = KILL ]; then rm "$2.pid"; fi  # its number may be another process's one day
}

start() {    # start MODEL; the server inherits the output, as careless scripts let it
  if send 0 "$1"; then return; fi
  rm -f "$1.sick"
  # shellcheck disable=SC2086  # a command and its arguments
  setsid $SOAK --serve "$1" &
  echo $! >"$1.pid"
}

live() {     # live SET SECONDS: from then on it may be asked. Nobody ever reads half of the file.
  echo "$1 $(date -d "$2 seconds" +%s.%N)" >loaded.new
  mv loaded.new loaded
}

if [ "$1" = START ]; then
  start "$2"
  exit
elif [ $# = 2 ]; then
  send "$1" "$2"
  exit
elif [ "$1" = status ]; then
  read -r name _ <loaded
  for model in $(members "$name"); do
    if send 0 "$model"; then
      echo "$name: loaded"
      break
    fi
  done
  exit 0
fi

live nobody 0
echo "$1" >>swaps
RANDOM=$((SEED * 1000 + $(wc -l <swaps)))
for model in chat embed code math; do
  if [[ " $(members "$1") " = *" $model "* ]]; then
    if [ -n "${JANO_RESTART:-}" ]; then send KILL "$model"; fi
  elif [ "$1" = unload ] || [ -e "$model.sick" ] || ((RANDOM % 2)); then
    send KILL "$model"
  fi
done
if [ "$1" = unload ]; then exit; fi

fate=$((RANDOM % 20))
if ((fate < 2)); then
  echo swap failed >>faults
  if ((RANDOM % 4 == 0)); then sleep 9; fi  # Jano has to end it
  echo CUDA error: out of memory >&2
  exit 1
fi
for model in $(members "$1"); do
  send CONT "$model"
  start "$model"
done
if ((fate == 2)); then
  echo died while loading >>faults
  sleep 1
  for model in $(members "$1"); do send KILL "$model" || true; done
else
  live "$1" "0.$((RANDOM % 4))"
fi
