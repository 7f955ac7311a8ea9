#!/usr/bin/env bash
cd '/home/ann/my work' || exit 2
MASTER_ADDR=127.0.0.1
MASTER_PORT=29500
export MASTER_ADDR MASTER_PORT
set -m # mpirun has a process group of its own, so that Ctrl-C does not reach it
case "$(mpirun --version 2>&1)" in
  *"Open MPI"* | *OpenRTE*)
    mpirun -n 2 \
      --map-by ppr:2:node:OVERSUBSCRIBE \
      --bind-to none \
      -x MASTER_ADDR \
      -x MASTER_PORT \
      /opt/dtt/bin/python -m dtt train \
      -c tiny </dev/null &
    ;;
  *) # MPICH, Intel MPI and others with hydra
    mpirun -n 2 \
      -ppn 2 \
      -genvlist MASTER_ADDR,MASTER_PORT \
      /opt/dtt/bin/python -m dtt train \
      -c tiny </dev/null &
    ;;
esac
mpirun=$!
set +m
asked=0
# shellcheck disable=SC2317,SC2329 # the trap calls it
stop() {
  # Open MPI kills its ranks when it gets SIGTERM; SIGUSR1 goes through to them, and they save.
  asked=$((asked + 1))
  if [ "$asked" = 1 ]; then kill -s USR1 "$mpirun"; else kill -s TERM "$mpirun"; fi
}
trap stop INT TERM HUP USR1
while kill -0 "$mpirun" 2>/dev/null; do wait "$mpirun"; done
wait "$mpirun"
