#!/bin/sh
# All GPU measurements; arguments go to step.py. PYTHON names the interpreter that has PyTorch.
set -eu
here=$(dirname "$0")
PYTHON=${PYTHON:-python3}
export PYTHONPATH="$here/../..${PYTHONPATH:+:$PYTHONPATH}"
if ! "$PYTHON" -c "import torch, pydantic, yaml, rich, safetensors, tokenizers, tiktoken"; then
    "$PYTHON" -m pip install "$here/../.."
fi
exec "$PYTHON" "$here/step.py" "$@"
