"""`dtt doctor`."""

from __future__ import annotations

from dtt.config.flags import ConfigParser
from dtt.config.load import load_config, to_yaml
from dtt.errors import DttError

DESCRIPTION = """Examine this machine in under a minute: is it fit to train, and if not, what helps?

Software, network, limits, rates of processor, GPUs, links and disk, the run of a configuration,
and a few steps of training. Started by torchrun, srun or mpirun it examines every machine, and
names the one that is slow, different or missing. The exit code is 0 if nothing failed, else that
of the first failure (docs/doctor.md)."""
EXAMPLES = (
    "dtt doctor",
    "dtt doctor -c run.yaml --world-size 8",
    "dtt doctor --quick --json",
    "srun --nodes 4 --ntasks-per-node 8 dtt doctor -c run.yaml",
)


def run(argv: list[str]) -> int:
    """Parse, and examine; settings that do not load are a finding."""
    parser = ConfigParser("dtt doctor", DESCRIPTION, EXAMPLES)
    parser.add_argument(
        "--quick", action="store_true", help="look only: no rates, no compiling, no second rank"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    options = parser.parse(argv)
    config, error = load_config(), None
    try:
        config = parser.config(options)
        if config.is_described_elsewhere:
            from dtt.huggingface.origin import with_origin

            config = with_origin(config)
    except DttError as problem:
        error = problem
    if options.print_config:
        if error is not None:
            raise error
        print(to_yaml(config), end="")
        return 0

    from dtt.doctor.visit import visit

    return visit(config, error, quick=options.quick, as_document=options.json, debug=options.debug)
