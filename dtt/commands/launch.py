"""`dtt launch`."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from dtt.config.flags import ConfigParser
from dtt.config.load import to_yaml
from dtt.config.parser import CommandParser, at_least
from dtt.config.schema import Config
from dtt.errors import ConfigError
from dtt.launch.arguments import add_train_options
from dtt.launch.engines import ENGINES, Engine
from dtt.launch.job import Job
from dtt.runs import find_run

DESCRIPTION = "Start a training run on one machine or many, or look after one that was started."
EXAMPLES = (
    "dtt launch local -c run.yaml --gpus-per-node 8",
    "dtt launch slurm -c run.yaml --nodes 4 --gpus-per-node 8 --print",
    "dtt launch ssh -c run.yaml --hosts node1,node2 --gpus-per-node 8",
    "dtt launch torchrun --help",
)
WATCHERS = {
    "status": "Say how the jobs of a run are.",
    "logs": "Show what a rank of a run prints.",
}
TRAIN = (
    "Everything else goes to `dtt train`, and is checked before anything is started: -c FILE,\n"
    "--max-steps N, ... (`dtt train --help`)."
)


def run(argv: list[str]) -> int:
    """Find the engine, or what is to be looked after, and run it."""
    debug = "--debug" in argv
    words = [word for word in argv if word != "--debug"]
    if not words:
        raise ConfigError("no engine given", f"one of {', '.join(ENGINES)}")
    name, rest = words[0], words[1:]
    if name in ("-h", "--help"):
        CommandParser("dtt launch", "dtt launch ENGINE [options]", _overview(), EXAMPLES).parse(
            ["--help"]
        )
    if name in WATCHERS:
        return _watch(name, rest)
    if name not in ENGINES:
        near = difflib.get_close_matches(name, [*ENGINES, *WATCHERS], 1, 0.5)
        hint = f", did you mean {near[0]}?" if near else ""
        fix = "" if near else f"one of {', '.join([*ENGINES, *WATCHERS])} comes first"
        raise ConfigError(f"unknown engine {name!r}{hint}", fix)
    return _launch(name, [*rest, *(["--debug"] if debug else [])])


def _overview() -> str:
    rows = [*((name, engine.summary) for name, engine in ENGINES.items()), *WATCHERS.items()]
    table = "\n".join(f"  {name:<10}{summary}" for name, summary in rows)
    return f"{DESCRIPTION}\n\n{table}\n\n`dtt launch ENGINE --help` shows the options of one."


class LaunchParser(ConfigParser):
    """Parses the options of an engine among those of `dtt train`, and tells which are which."""

    def __init__(self, name: str, engine: Engine, module: Any) -> None:
        super().__init__(f"dtt launch {name}", f"{engine.summary}\n\n{TRAIN}", module.EXAMPLES)
        add_train_options(self)
        self.usage = f"dtt launch {name} [options] [-c FILE ...] [options of dtt train]"
        known = set(self._option_string_actions)
        self.add_argument(
            "--nodes",
            type=_node_range if engine.elastic else _node_number,
            metavar="N" + "|MIN:MAX" * engine.elastic,
            help="machines (default: 1, or the number of --hosts)"
            + "; MIN:MAX: goes on while MIN are left" * engine.elastic,
        )
        self.add_argument(
            "--gpus-per-node",
            type=at_least(0),
            metavar="G",
            help="GPUs of each, with a rank for each GPU (default: none are asked for)",
        )
        self.add_argument(
            "--ranks-per-node",
            type=at_least(1),
            metavar="R",
            help="ranks on each (default: the GPUs, else parallel.world_size)",
        )
        self.add_argument(
            "--env",
            type=_assignment,
            action="append",
            default=[],
            metavar="NAME=VALUE",
            help="a variable that every rank gets (GLOO_SOCKET_IFNAME=eth0); may be repeated",
        )
        self.add_argument(
            "--print", action="store_true", help="show what would be started, and stop"
        )
        module.add_options(self)
        # The number of ranks is the launcher's to say, in the words of each engine.
        ranks = {"--world-size", "--parallel.world-size"}
        self.own = set(self._option_string_actions) - known | ranks

    def help_text(self, section: str | None) -> str:
        if section is not None:
            return super().help_text(section)
        return f"{self.format_help()}\n{self.examples_text()}"

    def for_train(self, argv: Sequence[str]) -> list[str]:
        """Return `argv` without launching's own options and their values."""
        kept: list[str] = []
        at = 0
        while at < len(argv):
            word = argv[at].partition("=")[0].replace("_", "-")
            action = self._option_string_actions.get(word) if word in self.own else None
            if action is None:
                kept.append(argv[at])
            elif action.nargs != 0 and "=" not in argv[at]:
                at += 1
            at += 1
        return kept


def plan(name: str, argv: Sequence[str]) -> tuple[Any, argparse.Namespace, Job]:
    """Return the engine's module, what a command line says, and the job, which can be."""
    engine = ENGINES[name]
    module = import_module(engine.module)
    parser = LaunchParser(name, engine, module)
    options = parser.parse(argv)
    config = parser.config(options)
    if options.print_config:
        print(to_yaml(config), end="")
        raise SystemExit(0)
    job = _job(name, config, options, parser.for_train(argv))
    _check_layout(config, job)
    return module, options, job


def _launch(name: str, argv: Sequence[str]) -> int:
    module, options, job = plan(name, argv)
    text = module.write(job, options)
    if options.print:
        print(text, end="")
        return 0
    return int(module.run(job, options, text))


def _job(name: str, config: Config, options: argparse.Namespace, arguments: list[str]) -> Job:
    """Return the job that a command line asks for; ConfigError where it contradicts itself."""
    fewest, nodes = options.nodes or (None, len(getattr(options, "hosts", None) or ()) or 1)
    gpus, ranks = options.gpus_per_node or 0, options.ranks_per_node
    if gpus and ranks not in (None, gpus):
        raise ConfigError(
            f"--gpus-per-node {gpus} and --ranks-per-node {ranks}: a rank has one GPU",
            "leave out --ranks-per-node",
        )
    ranks = gpus or ranks or config.parallel.world_size
    said = (options.given.overrides if options.given else {}).get("parallel.world_size")
    if said is not None and config.parallel.world_size != ranks:
        raise ConfigError(
            f"{said[0]} {said[1]} is a number of ranks on each node, and {ranks} were asked for",
            f"leave out {said[0]}",
        )
    device = config.training.device
    if gpus and device not in ("auto", "cuda"):
        raise ConfigError(
            f"--gpus-per-node {gpus}, and training.device is {device}", "give --device auto"
        )
    if device == "cuda" and not gpus:
        raise ConfigError(
            "training.device is cuda, and no GPUs are asked for", "give --gpus-per-node"
        )
    if options.fresh and name != "local":
        raise ConfigError(
            "--fresh: each restart of the job would remove what it has done",
            f"give another --name, or remove {config.dir / str(config.name)} first",
        )
    return Job(
        name=str(config.name),
        folder=config.dir / str(config.name),
        arguments=tuple(arguments),
        nodes=nodes,
        ranks=ranks,
        gpus=gpus,
        fewest_nodes=fewest,
        directory=Path.cwd(),
        environment=tuple(options.env),
        config=to_yaml(config),
        others=("--resume", str(options.resume)) if options.resume else (),
    )


def _check_layout(config: Config, job: Job) -> None:
    """Raise ConfigError if the model or the batch cannot be divided among the job's ranks.

    With init_from the model is one that perhaps only the job's machines have: they look.
    """
    if config.init_from is not None:
        return
    from dtt.training.batching import require_layout

    for nodes in sorted({job.fewest_nodes or job.nodes, job.nodes}):
        require_layout(config, nodes * job.ranks)


def _watch(name: str, argv: list[str]) -> int:
    usage = f"dtt launch {name} [RUN]" + " [--rank K] [--follow]" * (name == "logs")
    example = f"dtt launch {name} runs/book" + " --rank 3 --follow" * (name == "logs")
    parser = CommandParser(f"dtt launch {name}", usage, WATCHERS[name], (example,))
    parser.add_argument(
        "run", nargs="?", type=Path, metavar="RUN", help="run folder; default: the newest in runs/"
    )
    if name == "logs":
        parser.add_argument("--rank", type=at_least(0), default=0, metavar="K", help="default: 0")
        parser.add_argument("--follow", action="store_true", help="go on as more is printed")
    options = parser.parse(argv)
    folder = find_run(options.run, planned=True)
    watch = import_module("dtt.launch.watch")
    if name == "status":
        return int(watch.status(folder))
    return int(watch.logs(folder, options.rank, options.follow))


def _node_number(text: str) -> tuple[None, int]:
    if re.fullmatch(r"[0-9]+:[0-9]+", text):
        able = " and ".join(name for name, engine in ENGINES.items() if engine.elastic)
        raise argparse.ArgumentTypeError(f"only {able} go on with fewer nodes, got {text!r}")
    return None, int(at_least(1)(text))


def _node_range(text: str) -> tuple[int | None, int]:
    match = re.fullmatch(r"([0-9]+):([0-9]+)", text)
    if match is None:
        return None, int(at_least(1)(text))
    fewest, most = int(match[1]), int(match[2])
    if not 0 < fewest <= most:
        raise argparse.ArgumentTypeError(f"should be N or MIN:MAX, 0 < MIN <= MAX, got {text!r}")
    return (fewest if fewest < most else None), most


def _assignment(text: str) -> tuple[str, str]:
    match = re.fullmatch(r"([A-Za-z_]\w*)=(.*)", text, re.DOTALL)
    if match is None:
        raise argparse.ArgumentTypeError(f"should be NAME=VALUE, got {text!r}")
    return match[1], match[2]
