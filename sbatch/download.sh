#!/bin/bash
# Bring a corpus to the shared disk:
#   CONFIG=my.yaml sbatch sbatch/download.sh
#SBATCH --job-name=dtt-download
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

# Before anything starts: module load ..., source .venv/bin/activate, export HF_HOME=...
python="${PYTHON:-python}"
arguments=(-c "${CONFIG:-configs/config.yaml}" "$@")

exec "$python" -m dtt download "${arguments[@]}"
