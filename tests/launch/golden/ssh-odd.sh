#!/usr/bin/env bash
# An agent on each host. A signal (Ctrl-C, SIGTERM, SIGUSR1) saves and stops, the next one kills.
hosts=(n1)
addresses=(n1)
fewest=1 # hosts without which the others cannot go on
ssh=(ssh -o BatchMode=yes -o ConnectTimeout=15 -o ServerAliveInterval=15)
launch=my-run-$(date +%s)-$$

IFS= read -r -d '' remote <<'END_OF_AGENT'
cd '/home/ann/my work' || exit 2
command -v /opt/dtt/bin/python >/dev/null || {
  echo 'dtt launch: error: there is no /opt/dtt/bin/python here; install dtt in the same place' >&2
  exit 2
}
export ODD='It'"'"'s "$HOME", `date` \ $(date) & $$'
relay() { # goes on reading when nobody listens any more: the agent has to save
  trap '' PIPE
  exec tee /dev/null 2>/dev/null
}
set -m # the agent has a process group of its own
exec 3<&0
/opt/dtt/bin/python -m dtt.launch.elastic \
  --nnodes 1 \
  --nproc-per-node 1 \
  --rdzv-backend c10d \
  --rdzv-endpoint n1:29400 \
  --rdzv-id "$3" \
  --rdzv-conf "is_host=$1" \
  --local-addr "$2" \
  -m dtt train \
  -n 'my $run' \
  --sample.prompts 'It'"'"'s "$HOME", `date` \ $(date) & $$' </dev/null 3<&- > >(relay) 2> >(relay >&2) &
agent=$!
set +m
{
  while read -r signal; do
    if [ "$signal" = KILL ]; then kill -s KILL -- "-$agent"; else kill -s "$signal" "$agent"; fi
  done
  kill -s TERM "$agent"
} <&3 >/dev/null 2>&1 &
disown
exec 3<&-
wait "$agent"
code=$?
kill -s KILL "$!" 2>/dev/null
exit "$code"
END_OF_AGENT

work=$(mktemp -d) || exit 5
trap 'rm -rf "$work"' EXIT
: >"$work/ended"

remotely() { # FIRST ADDRESS: the command for the host's own shell, whatever that is
  local quote="'" inside="'\''"
  printf "bash -c '%s' dtt-agent %s" "${remote//$quote/$inside}" "$1 $2 $launch"
}

start() { # K: runs the agent of host K, with signals from a FIFO, and notes how it ended
  trap '' INT TERM HUP USR1 # it is told through the FIFO, not by the death of its ssh
  local host=${hosts[$1]} first=false
  if [ "$1" = 0 ]; then first=true; fi
  {
    {
      "${ssh[@]}" "$host" "$(remotely "$first" "${addresses[$1]}")" <"$work/$1"
      echo "$? $host" >>"$work/ended"
    } 2>&1 >&3 | sed -u "s/^/[$host] /" >&2
  } 3>&1 | sed -u "s/^/[$host] /"
}

tell() { # SIGNAL: to every agent
  local k
  for k in "${!hosts[@]}"; do eval "echo $1 >&$((10 + k))"; done 2>/dev/null
}

asked=0
# shellcheck disable=SC2317,SC2329 # the traps call it
stop() {
  asked=$((asked + 1))
  if [ "$asked" = 1 ]; then tell TERM; else tell KILL; fi
}

left=${#hosts[@]}
result=0
stopping= # when the others are told to stop
deadline= # when they are killed
ended() { # CODE HOST: an agent has ended; the first cause decides how the script ends
  left=$((left - 1))
  local code=$1
  case "$code" in
    0) return ;;
    255)
      echo "dtt launch: error: $2: the ssh connection failed or was cut;" \
        "\`${ssh[*]} $2 true\` must work without a question" >&2
      code=7
      ;;
    126 | 127)
      echo "dtt launch: error: $2: bash is missing there; install it" >&2
      code=2
      ;;
  esac
  case "$code" in
    7 | 75 | 129 | 13? | 14?) # what may succeed another time: others may go on, or are the cause
      if [ "$asked" = 0 ] && [ "$left" -ge "$fewest" ]; then return; fi
      if [ "$result" = 0 ]; then result=$code; fi
      ;;
    *)
      case "$result" in 0 | 7 | 75 | 129 | 13? | 14?) result=$code ;; esac
      ;;
  esac
  # An agent that ends with 7 has lost another one, whose own end says why.
  local pause=0
  if [ "$1" = 7 ]; then pause=10; fi
  if [ -z "$stopping" ]; then stopping=$((SECONDS + pause)); fi
}

for k in "${!hosts[@]}"; do
  mkfifo "$work/$k" || exit 5
  start "$k" &
done
for k in "${!hosts[@]}"; do eval "exec $((10 + k))>\"\$work/$k\""; done
trap '' PIPE # a host that has ended reads no more
trap stop INT TERM HUP USR1
exec 9<"$work/ended"
while [ "$left" -gt 0 ]; do
  sleep 0.2 &
  wait "$!" # which a signal interrupts
  while read -r code host <&9; do ended "$code" "$host"; done
  if [ -n "$stopping" ] && [ "$asked" = 0 ] && [ "$SECONDS" -ge "$stopping" ]; then
    stop
    deadline=$((SECONDS + 120))
  elif [ -n "$deadline" ] && [ "$SECONDS" -ge "$deadline" ]; then
    tell KILL
  fi
done
wait
exit "$result"
