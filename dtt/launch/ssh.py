"""Bare machines: an agent on each over ssh, and one script of bash that watches them.

The script and each host speak over ssh's standard input: a line is a signal for the agent there,
and its end means that the script or the connection is gone; then the agent saves and stops. So
nothing is left running, and nothing needs a terminal.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import sys
from collections.abc import Sequence

from dtt.errors import ConfigError
from dtt.launch.hosts import add_hosts, address, matching
from dtt.launch.job import Job
from dtt.launch.shell import exports, folded
from dtt.launch.torchrun import PORT, agent, endpoint

EXAMPLES = (
    "dtt launch ssh -c run.yaml --hosts node1,node2 --gpus-per-node 8",
    "dtt launch ssh -c run.yaml --hosts ann@node1,ann@node2 --env NCCL_SOCKET_IFNAME=eth1",
    "dtt launch ssh -c run.yaml --hosts node1,node2,node3 --nodes 2:3 --gpus-per-node 8",
)

# What a host runs; $1: whether the others meet there, $2: its address, $3: the launch.
HOST = """\
cd {directory} || exit 2
command -v {python} >/dev/null || {{
  echo {missing} >&2
  exit 2
}}
{exports}relay() {{ # goes on reading when nobody listens any more: the agent has to save
  trap '' PIPE
  exec tee /dev/null 2>/dev/null
}}
set -m # the agent has a process group of its own
exec 3<&0
{agent}
agent=$!
set +m
{{
  while read -r signal; do
    if [ "$signal" = KILL ]; then kill -s KILL -- "-$agent"; else kill -s "$signal" "$agent"; fi
  done
  kill -s TERM "$agent"
}} <&3 >/dev/null 2>&1 &
disown
exec 3<&-
wait "$agent"
code=$?
kill -s KILL "$!" 2>/dev/null
exit "$code"
"""

SCRIPT = """\
#!/usr/bin/env bash
# An agent on each host. A signal (Ctrl-C, SIGTERM, SIGUSR1) saves and stops, the next one kills.
hosts=({hosts})
addresses=({addresses})
fewest={fewest} # hosts without which the others cannot go on
ssh=({ssh})
launch={label}-$(date +%s)-$$

IFS= read -r -d '' remote <<'END_OF_AGENT'
{remote}END_OF_AGENT

work=$(mktemp -d) || exit 5
trap 'rm -rf "$work"' EXIT
: >"$work/ended"

remotely() {{ # FIRST ADDRESS: the command for the host's own shell, whatever that is
  local quote="'" inside="'\\''"
  printf "bash -c '%s' dtt-agent %s" "${{remote//$quote/$inside}}" "$1 $2 $launch"
}}

start() {{ # K: runs the agent of host K, with signals from a FIFO, and notes how it ended
  trap '' INT TERM HUP USR1 # it is told through the FIFO, not by the death of its ssh
  local host=${{hosts[$1]}} first=false
  if [ "$1" = 0 ]; then first=true; fi
  {{
    {{
      "${{ssh[@]}}" "$host" "$(remotely "$first" "${{addresses[$1]}}")" <"$work/$1"
      echo "$? $host" >>"$work/ended"
    }} 2>&1 >&3 | sed -u "s/^/[$host] /" >&2
  }} 3>&1 | sed -u "s/^/[$host] /"
}}

tell() {{ # SIGNAL: to every agent
  local k
  for k in "${{!hosts[@]}}"; do eval "echo $1 >&$((10 + k))"; done 2>/dev/null
}}

asked=0
# shellcheck disable=SC2317,SC2329 # the traps call it
stop() {{
  asked=$((asked + 1))
  if [ "$asked" = 1 ]; then tell TERM; else tell KILL; fi
}}

left=${{#hosts[@]}}
result=0
stopping= # when the others are told to stop
deadline= # when they are killed
ended() {{ # CODE HOST: an agent has ended; the first cause decides how the script ends
  left=$((left - 1))
  local code=$1
  case "$code" in
    0) return ;;
    255)
      echo "dtt launch: error: $2: the ssh connection failed or was cut;" \\
        "\\`${{ssh[*]}} $2 true\\` must work without a question" >&2
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
  if [ "$1" = 7 ]; then pause={patience}; fi
  if [ -z "$stopping" ]; then stopping=$((SECONDS + pause)); fi
}}

for k in "${{!hosts[@]}}"; do
  mkfifo "$work/$k" || exit 5
  start "$k" &
done
for k in "${{!hosts[@]}}"; do eval "exec $((10 + k))>\\"\\$work/$k\\""; done
trap '' PIPE # a host that has ended reads no more
trap stop INT TERM HUP USR1
exec 9<"$work/ended"
while [ "$left" -gt 0 ]; do
  sleep 0.2 &
  wait "$!" # which a signal interrupts
  while read -r code host <&9; do ended "$code" "$host"; done
  if [ -n "$stopping" ] && [ "$asked" = 0 ] && [ "$SECONDS" -ge "$stopping" ]; then
    stop
    deadline=$((SECONDS + {grace}))
  elif [ -n "$deadline" ] && [ "$SECONDS" -ge "$deadline" ]; then
    tell KILL
  fi
done
wait
exit "$result"
"""
PATIENCE = 10
"""Seconds in which the cause of a loss is waited for."""
GRACE = 120
"""Seconds that the other hosts have to end when one has failed."""
CONNECTION = {"BatchMode": "yes", "ConnectTimeout": 15, "ServerAliveInterval": 15}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the hosts, ssh's configuration, and where the agents meet."""
    add_hosts(parser, "machines, as ssh names them: ann@node1; the first one is where they meet")
    parser.add_argument(
        "--ssh-config", metavar="FILE", help="ssh's configuration (default: ~/.ssh/config)"
    )
    parser.add_argument(
        "--rdzv-endpoint",
        type=endpoint,
        metavar="HOST:PORT",
        help=f"address of the first host for the others (default: its name, port {PORT})",
    )


def write(job: Job, options: argparse.Namespace) -> str:
    """Return the script that starts all hosts and watches them."""
    if not options.hosts:
        raise ConfigError("ssh: no hosts are given", "give --hosts A,B,...")
    hosts = matching(job, options.hosts)
    config = ["-F", options.ssh_config] if options.ssh_config else []
    ssh = ["ssh", *config]
    for name, value in CONNECTION.items():
        ssh += ["-o", f"{name}={value}"]
    return SCRIPT.format(
        hosts=" ".join(hosts),
        addresses=" ".join(map(address, hosts)),
        fewest=job.fewest_nodes or job.nodes,
        ssh=shlex.join(ssh),
        label=job.label,
        grace=GRACE,
        patience=PATIENCE,
        remote=_remote(job, options, hosts),
    )


def run(job: Job, options: argparse.Namespace, text: str) -> int:
    """Become that script."""
    if shutil.which("ssh") is None:
        raise ConfigError("ssh is not in PATH", "install an OpenSSH client")
    if options.ssh_config is not None and not os.access(options.ssh_config, os.R_OK):
        raise ConfigError(f"--ssh-config: cannot read {options.ssh_config}", "check the path")
    sys.stdout.flush()
    os.execvp("bash", ["bash", "-c", text, "dtt-launch-ssh"])


def _remote(job: Job, options: argparse.Namespace, hosts: Sequence[str]) -> str:
    """Return the script of a host."""
    at = options.rdzv_endpoint or f"{address(hosts[0])}:{PORT}"
    meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", at]
    words, train = agent(job, meeting)
    # The first host is told that it is the one: its own name for itself may be another.
    own = ["--rdzv-id", '"$3"', "--rdzv-conf", '"is_host=$1"', "--local-addr", '"$2"']
    return HOST.format(
        directory=shlex.quote(str(job.directory)),
        python=shlex.quote(job.python),
        missing=shlex.quote(
            f"dtt launch: error: there is no {job.python} here; install dtt in the same place"
        ),
        exports=exports(job.environment),
        agent=folded(
            [*map(shlex.quote, words), *own],
            [*map(shlex.quote, train)],
            end=" </dev/null 3<&- > >(relay) 2> >(relay >&2) &",
        ),
    )
