"""The report of one machine and of several: lines, JSON, exit code, and what differs."""

from __future__ import annotations

import json
from typing import Any

import pytest

from dtt.doctor import comparison
from dtt.doctor.examination import CHECKS, _named
from dtt.doctor.finding import Finding, failed, ok, skipped, warning
from dtt.doctor.report import Node, Printer, as_json, exit_code

KEYS = {"name", "group", "status", "measured", "mend", "figures", "exit_code", "seconds"}


def named(finding: Finding, name: str) -> Finding:
    (check,) = [check for check in CHECKS if check.name == name]
    return _named(finding, check, 0.0)


def node(name: str, **changes: Any) -> Node:
    """A machine with figures as all have them, but for the changes."""
    figures = {
        "matmul": {"fp32_gflops": 300.0, "bf16_gflops": 900.0},
        "copy": {"copy_gb_s": 40.0},
        "disk speed": {"write_mb_s": 500.0, "read_mb_s": 2000.0},
        "packages": {"dtt": "0.1.0", "torch": "2.13.0"},
        "python": {"version": "3.11.7"},
    }
    found = [
        named(ok(check, {**values, **changes.get(check.replace(" ", "_"), {})}), check)
        for check, values in figures.items()
    ]
    return Node(name, 1, found)


@pytest.mark.parametrize(
    ("names", "code"),
    [
        ((), 0),
        (("python",), 2),
        (("data",), 3),
        (("disk space",), 5),
        (("all-reduce",), 7),
        (("disk space", "port"), 5),
        (("port", "disk space"), 7),
    ],
)
def test_the_first_failure_decides_the_exit_code(names: tuple[str, ...], code: int) -> None:
    found = [named(ok("fine"), "python"), named(warning("hm", "mend"), "hub")]
    assert exit_code([*found, *(named(failed("bad", "mend"), name) for name in names)]) == code


def test_json_has_the_documented_keys() -> None:
    found = [
        named(ok("3.11", {"version": "3.11"}), "python"),
        named(warning("slow", "wait"), "hub"),
        named(failed("full", "free some"), "disk space"),
        named(skipped("no GPU"), "GPUs"),
    ]
    document = json.loads(as_json([Node("n1", 4, found)], [], 12.34))
    assert document.keys() == {
        "dtt",
        "fit",
        "exit_code",
        "seconds",
        "nodes",
        "together",
    }
    assert (document["fit"], document["exit_code"], document["seconds"]) == (False, 5, 12.3)
    (machine,) = document["nodes"]
    assert (machine["name"], machine["ranks"]) == ("n1", 4)
    assert all(check.keys() == KEYS for check in machine["checks"])
    assert [check["exit_code"] for check in machine["checks"]] == [0, 0, 5, 0]
    assert machine["checks"][0]["figures"] == {"version": "3.11"}


def test_a_line_for_each_finding_and_one_for_each_remedy(
    capsys: pytest.CaptureFixture[str],
) -> None:
    printer = Printer()
    found = [named(ok("3.11"), "python"), named(failed("29500: taken", "take another"), "port")]
    for finding in found:
        printer.tell(finding)
    printer.summary(found, 3.2)
    assert capsys.readouterr().out.splitlines() == [
        "software",
        "  ok       python          3.11",
        "",
        "network",
        "  failed   port            29500: taken",
        "                           -> take another",
        "",
        "not fit to train: port (exit code 7); 1 ok, 1 failed, in 3 s",
    ]


def test_what_all_nodes_say_alike_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    nodes = [
        Node(name, 1, [named(ok("3.11"), "python"), named(warning(f"{n}", "wait"), "cores")])
        for n, name in enumerate(("n1", "n2"))
    ]
    Printer().nodes(nodes, [])
    assert capsys.readouterr().out.splitlines() == [
        "software",
        "  ok       python          all 2 nodes: 3.11",
        "",
        "machine",
        "  warning  cores           n1: 0",
        "  warning  cores           n2: 1",
        "                           -> wait",
    ]


def test_nodes_that_are_alike() -> None:
    found = list(comparison.compare([node("n1"), node("n2"), node("n3")]))
    assert [finding.status for finding in found] == ["ok", "ok"]


@pytest.mark.parametrize("rate", [250.0, 260.0])
def test_a_node_far_below_the_median_is_named(rate: float) -> None:
    nodes = [node("n1"), node("n2", matmul={"fp32_gflops": rate}), node("n3")]
    found = list(comparison.judge_rates(nodes))
    if rate < 0.85 * 300:
        assert [finding.status for finding in found] == ["warning"]
        assert "n2 is slow: 250 GFLOP/s in fp32, the median is 300" in found[0].measured
        assert found[0].figures["node"] == "n2"
    else:
        assert [finding.status for finding in found] == ["ok"]


def test_a_disk_may_vary_more() -> None:
    for rate, status in ((260.0, "ok"), (240.0, "warning")):
        nodes = [node("n1"), node("n2"), node("n3", disk_speed={"write_mb_s": rate})]
        assert [finding.status for finding in comparison.judge_rates(nodes)] == [status]


def test_the_slowest_gpu_of_a_node_counts() -> None:
    nodes = [node(f"n{n}") for n in range(3)]
    for number, machine in enumerate(nodes):
        rates = (700.0, 500.0 if number == 1 else 700.0)
        gpus = [ok("", {"matmul_tflops": r}, name=f"GPU {i}") for i, r in enumerate(rates)]
        machine.findings.extend(named(gpu, "GPUs") for gpu in gpus)  # type: ignore[attr-defined]
    (finding,) = comparison.judge_rates(nodes)
    assert "n1 is slow: 500 TFLOP/s of the GPU" in finding.measured


def test_versions_that_differ_are_named_with_their_nodes() -> None:
    nodes = [node("n1"), node("n2", packages={"torch": "2.12.0"})]
    finding = next(comparison.compare(nodes))
    assert (finding.status, finding.code) == ("failed", 2)
    assert finding.measured == "torch is 2.13.0 on n1, 2.12.0 on n2"


@pytest.mark.parametrize(
    ("offset", "status", "said"),
    [(0.9, "ok", "0.90"), (1.5, "warning", "ahead"), (-9, "warning", "behind")],
)
def test_a_clock_that_is_wrong_is_named(offset: float, status: str, said: str) -> None:
    finding = comparison.judge_clocks([("n1", 100.0), ("n2", 100.0 + offset), ("n3", 100.0)])
    assert finding.status == status
    assert said in finding.measured
    assert ("n2" in finding.measured) == (status == "warning")


def test_a_folder_that_a_node_does_not_see_is_a_failure() -> None:
    blind = comparison.judge_folder([("n1", True, True), ("n2", False, True)])
    assert (blind.status, blind.measured) == ("failed", "n2 does not see what n1 writes there")
    free = comparison.judge_folder([("n1", True, True), ("n2", True, False)])
    assert free.status == "warning"
    assert comparison.judge_folder([("n1", True, True), ("n2", True, True)]).status == "ok"


def test_a_network_that_carries_little_of_its_speed() -> None:
    # A card of 25 Gbit/s has 3.125 GB/s.
    assert comparison.judge_all_reduce("gloo", 1.0, 8, 3.125).status == "warning"
    assert comparison.judge_all_reduce("gloo", 1.5, 8, 3.125).status == "ok"
    assert comparison.judge_all_reduce("nccl", 0.2, 8, 0.0).status == "ok"


def test_lost_ranks_are_named_with_their_hosts() -> None:
    finding = comparison.judge_loss([2, 3], ["n1", "n1", "n2", "n2"])
    assert finding.code == 7
    assert "rank 2 on n2, rank 3 on n2" in finding.measured
    assert finding.figures["hosts"] == ["n2"]
