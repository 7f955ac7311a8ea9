#!/bin/bash
# Turn a corpus into token shards, on all nodes:
#   CONFIG=my.yaml sbatch sbatch/tokenize.sh
#   sbatch --array=1-50 --nodes=1 sbatch/tokenize.sh    # or by tasks that share it
#SBATCH --job-name=dtt-tokenize
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

# Before anything starts: module load ..., source .venv/bin/activate, export HF_HOME=...
python="${PYTHON:-python}"
arguments=(-c "${CONFIG:-configs/config.yaml}" "$@")

exec srun "$python" -m dtt tokenize "${arguments[@]}"
