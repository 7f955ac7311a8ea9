"""Workers that survive the loss of one of them or of a machine.

`dtt train --world-size N` starts them on this machine. On several, start on each of them, with
torchrun's arguments,

    python -m dtt.launch.elastic --nnodes 1:4 --nproc-per-node 8 --rdzv-endpoint HOST:PORT \\
        -m dtt train -c run.yaml

Other than torchrun it ends with dtt's exit codes, does not restart what would fail again, lets the
workers save when it is asked to stop, and counts restarts anew after each new checkpoint. The
machine at HOST must stay: the run ends with code 7 if it is lost.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from dtt.errors import EXIT_INTERRUPTED
from dtt.reporting import report_error


def main(argv: Sequence[str]) -> int:
    """Be the launcher of one machine's workers and return the exit code."""
    # Pages of C++ frames whenever a connection breaks, unless it is set before torch is loaded.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from dtt.launch.elastic_launch import train_on_nodes

    try:
        return train_on_nodes(argv)
    except KeyboardInterrupt:
        print("dtt train: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 0
    except Exception as error:
        return report_error("dtt train", error)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
