#!/bin/bash
# Train on one node with eight GPUs:
#   CONFIG=my.yaml sbatch sbatch/train_8gpu.sh --max-steps 5000
#   sbatch --nodes=4 sbatch/train_8gpu.sh
# It saves before the wall time, goes back into the queue, and goes on until the run is
# complete. Ranks write to RUN/logs/rank-K.log; `dtt launch status RUN` says how far it is.
#SBATCH --job-name=dtt-train-8gpu
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@300
#SBATCH --output=%x-%j.log

# Before anything starts: module load ..., source .venv/bin/activate, export HF_HOME=...
python="${PYTHON:-python}"
arguments=(-c "${CONFIG:-configs/config.yaml}" "$@")
run=$("$python" -m dtt.launch.slurm_attempt folder "${arguments[@]}") || exit

messages="$run/logs/srun.err"
attempt() {
  "$python" -m dtt.launch.slurm_attempt "$1" --run "$run" --job "$SLURM_JOB_ID" \
    --chain "$DTT_CHAIN" --nodes "$SLURM_JOB_NODELIST" --messages "$messages" "${@:2}"
}
asked=
trap 'asked=1' USR1 TERM  # by the signal before the wall time, or by a person
export DTT_CHAIN="${DTT_CHAIN:-$SLURM_JOB_ID}"  # the first job of those that go on with each other
mkdir -p "$run/logs"
attempt begin || exit
touch "$run/logs/rank-0.log"
# A rank that ends does not end the others, which may be saving; they have --wait seconds.
srun --kill-on-bad-exit=0 --wait=600 --open-mode=append \
  --output="$run/logs/rank-%t.log" bash -c 'trap "" USR1; exec "$@"' rank \
  "$python" -m dtt train "${arguments[@]}" 2> >(tee "$messages" >&2) &
ranks=$!
tail --pid="$ranks" -s 0.5 -n 0 -F "$run/logs/rank-0.log" &  # rank 0 speaks here too
speaker=$!
# A signal ends `wait`, not the ranks: they are asked to save. Those that still load Python ignore
# it (see above), so they are asked until they have ended.
while kill -0 "$ranks" 2>/dev/null; do
  if [ -z "$asked" ]; then wait "$ranks"; continue; fi
  scancel --signal=USR1 "$SLURM_JOB_ID" 2>/dev/null
  for _ in 1 2 3 4 5; do kill -0 "$ranks" 2>/dev/null && sleep 1; done
done
wait "$ranks"; code=$?
wait "$speaker"
attempt end --code "$code" -- "$@"
