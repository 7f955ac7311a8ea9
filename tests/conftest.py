"""One thread per process: deterministic, and safe to fork (an OpenMP pool does not survive it)."""

import os

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"  # as `dtt` has it
os.environ["TOKENIZERS_PARALLELISM"] = "false"
