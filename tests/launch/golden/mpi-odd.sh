#!/usr/bin/env bash
cd '/home/ann/my work' || exit 2
export ODD='It'"'"'s "$HOME", `date` \ $(date) & $$'
MASTER_ADDR=127.0.0.1
MASTER_PORT=29500
export MASTER_ADDR MASTER_PORT
set -m # mpirun has a process group of its own, so that Ctrl-C does not reach it
case "$(mpirun --version 2>&1)" in
  *"Open MPI"* | *OpenRTE*)
    mpirun -n 1 \
      --map-by ppr:1:node:OVERSUBSCRIBE \
      --bind-to none \
      -x MASTER_ADDR \
      -x MASTER_PORT \
      -x ODD \
      /opt/dtt/bin/python -m dtt train \
      -n 'my $run' \
      --sample.prompts 'It'"'"'s "$HOME", `date` \ $(date) & $$' </dev/null &
    ;;
  *) # MPICH, Intel MPI and others with hydra
    mpirun -n 1 \
      -ppn 1 \
      -genvlist MASTER_ADDR,MASTER_PORT,ODD \
      /opt/dtt/bin/python -m dtt train \
      -n 'my $run' \
      --sample.prompts 'It'"'"'s "$HOME", `date` \ $(date) & $$' </dev/null &
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
