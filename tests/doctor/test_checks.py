"""Checks of this machine, with something broken on purpose."""

from __future__ import annotations

import errno
import json
import os
import socket
import time
from pathlib import Path

import pytest
from subjects import BENCH, subject

from dtt import network as machine_network
from dtt.doctor import disk, link, network, nodes, processor, settings, software, trial
from dtt.doctor.bench import UnmeasuredError
from dtt.doctor.examination import CHECKS, examine
from dtt.doctor.finding import Finding, Subject
from dtt.errors import DataError, StorageError
from dtt.place import Place

pytestmark = pytest.mark.processes


def check(name: str, on: Subject) -> list[Finding]:
    """What one check finds, made as an examination makes it."""
    (wanted,) = [check for check in CHECKS if check.name == name]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dtt.doctor.examination.CHECKS", (wanted,))
        patch.setattr("dtt.doctor.processor.WATCHED", 0.0)
        return examine(on)


def one(name: str, on: Subject) -> Finding:
    (finding,) = check(name, on)
    return finding


def test_a_taken_port_is_named_with_who_has_it() -> None:
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        finding = one("port", subject(environ={"MASTER_PORT": str(port)}))
    assert finding.status == "failed"
    assert finding.code == 7
    assert f"(process {os.getpid()})" in finding.measured
    assert "MASTER_PORT" in finding.mend
    assert one("port", subject(environ={"MASTER_PORT": "http"})).status == "failed"


def test_the_usual_port_that_is_taken_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("", 0)) as taken:
        monkeypatch.setattr("dtt.place.PORT", taken.getsockname()[1])
        assert one("port", subject(environ={"MASTER_PORT": ""})).status == "warning"


def test_the_port_of_a_launch_is_not_asked_for() -> None:
    place = Place(0, 2, 0, 2, "torchrun")
    assert one("port", subject(environ={"MASTER_PORT": "1"}, place=place)).status == "skipped"
    unknown = one("port", subject(environ={"PMI_FD": "7"}, place=Place(0, 2, 0, 2, "MPICH")))
    assert unknown.measured == "one that rank 0 chooses: the ranks of this launch meet there"


def test_a_name_that_cannot_be_resolved(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*arguments: object) -> list[str]:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(machine_network, "resolve", unknown)
    assert one("host name", subject()).status == "warning"
    among_several = one("host name", subject(place=Place(0, 4, 0, 2, "Slurm")))
    assert among_several.status == "failed"
    assert "cannot be resolved" in among_several.measured


def test_loopback_connects() -> None:
    assert network.judge_loopback().status == "ok"


def test_a_folder_that_cannot_be_written() -> None:
    with pytest.raises(StorageError):
        disk.try_files(Path("/proc"))
    finding = one("files", subject({"dir": "/proc/runs"}))
    assert (finding.status, finding.code) == ("failed", 5)
    assert "/proc" in finding.measured


def test_a_run_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("")
    finding = one("files", subject({"dir": str(tmp_path / "runs")}))
    assert (finding.status, finding.code) == ("failed", 5)
    assert "--checkpoint-dir" in finding.mend


def test_the_disk_is_tried_where_runs_will_be_and_left_as_it_was(tmp_path: Path) -> None:
    on = subject({"dir": str(tmp_path / "a" / "runs")}, parameters=1000)
    found = [*check("files", on), *check("disk speed", on), *check("disk space", on)]
    assert [finding.status for finding in found if finding.name != "disk speed"] == ["ok", "ok"]
    assert found[0].figures["folder"] == str(tmp_path)
    assert found[1].figures["write_mb_s"] > 0
    assert not list(tmp_path.iterdir())


def test_no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert software.find_compiler() is None
    assert [finding.status for finding in trial.check_compiler(subject())] == ["warning"]
    wanted = subject({"training.compile": "true"})
    assert [finding.status for finding in trial.check_compiler(wanted)] == ["failed"]


def test_missing_data(tmp_path: Path) -> None:
    there = {"data.source.name": "text", "data.source.path": str(tmp_path / "text.txt")}
    finding = one("data", subject({**there, "data.dir": str(tmp_path)}))
    assert (finding.status, finding.code) == ("failed", 3)
    assert "text.txt" in finding.measured


def test_prepared_data_that_is_damaged(tmp_path: Path) -> None:
    from dtt.data.corpora import prepare_corpora

    (tmp_path / "text.txt").write_text("the cat saw a dog. " * 200)
    path, folder = str(tmp_path / "text.txt"), str(tmp_path / "data")
    on = subject(
        {
            "data.source.name": "text",
            "data.source.path": path,
            "data.dir": folder,
            "data.workers": "1",
            "tokenizer.name": "byte",
        }
    )
    assert "will be tokenized" in one("data", on).measured
    corpora = prepare_corpora(on.config.data, on.config.tokenizer)
    whole = one("data", on)
    assert whole.status == "ok"
    assert whole.figures["tokens"] == corpora.total("train", "tokens")
    shard = next(Path(corpora.folders).glob("*train*"))
    data = bytearray(shard.read_bytes())
    data[0] ^= 1
    shard.write_bytes(data)
    finding = one("data", on)
    assert (finding.status, finding.code) == ("failed", 3)
    assert shard.name in finding.measured


def test_a_data_set_that_is_not_here_and_the_hub_is_not_there(tmp_path: Path) -> None:
    on = subject(
        {
            "data.source.name": "hub",
            "data.source.dataset": "some/thing",
            "data.dir": str(tmp_path),
        }
    )
    waiting = one("data", on)
    assert waiting.status == "warning"
    assert "dtt download" in waiting.mend
    on.hub_answers = False
    finding = one("data", on)
    assert (finding.status, finding.code) == ("failed", 3)


def test_a_damaged_tokenizer(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text('{"version": "1.0", "model": ')
    finding = one("tokenizer", subject({"tokenizer.name": "file", "tokenizer.path": str(path)}))
    assert (finding.status, finding.code) == ("failed", 3)
    assert "tokenizer.json" in finding.measured
    with pytest.raises(DataError):
        settings.try_tokenizer(path, None)


def test_a_layout_that_does_not_divide_the_ranks() -> None:
    on = subject({"parallel.tensor": "3"}, place=Place(0, 4, 0, 4, "torchrun"))
    finding = one("layout", on)
    assert (finding.status, finding.code) == ("failed", 2)
    assert "4 ranks" in finding.measured


def test_the_model_is_counted_and_its_memory_estimated() -> None:
    import torch

    from dtt.model.decoder import Decoder, count_parameters

    on = subject({"model.vocab_size": "1024"})
    finding = one("model", on)
    with torch.device("meta"):
        expected = count_parameters(Decoder(on.config.model))
    assert on.parameters == finding.figures["parameters"] == expected
    assert finding.figures["needed_gb"] * 1e9 > 16 * expected


def test_rates_are_measured_elsewhere() -> None:
    figures = BENCH.run(processor.measure_matmul, 1, seconds=60)
    assert figures["fp32_gflops"] > 0
    assert figures["bf16_gflops"] > 0


def crash() -> None:
    print("about to crash", flush=True)
    os.abort()


def explode() -> None:
    raise ValueError("of two\nlines")


def test_a_measurement_that_crashes_hangs_or_raises_is_said_so() -> None:
    with pytest.raises(UnmeasuredError, match=r"died by SIGABRT \(about to crash\)"):
        BENCH.run(crash)
    with pytest.raises(UnmeasuredError, match="did not end within 1 s"):
        BENCH.run(time.sleep, 60, seconds=1)
    with pytest.raises(UnmeasuredError, match="ValueError: of two lines"):
        BENCH.run(explode)
    with pytest.raises(DataError, match="cannot read the tokenizer"):
        BENCH.run(settings.try_tokenizer, Path("/nowhere/tokenizer.json"), None)


def test_an_all_reduce_that_fails_says_why() -> None:
    with pytest.raises(UnmeasuredError, match=r"^rank \d: \w+: .*nonsense"):
        BENCH.run(link.measure, "nonsense", 2)


def test_ranks_that_die_in_an_all_reduce() -> None:
    with pytest.raises(UnmeasuredError, match=r"^rank 0: the process died by SIGABRT$"):
        BENCH.run(measure_dying)


def measure_dying() -> float:
    link._rank = lambda *words: os.abort()
    return link.measure("gloo", 2)


def test_a_file_is_locked_for_others(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with nodes.locked(path) as holds:
        assert holds and nodes.is_kept_out(path)
    assert not path.exists()


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Lustre mounted without `-o flock`."""

    def flock(*words: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(nodes.fcntl, "flock", flock)
    with nodes.locked(tmp_path / "lock") as holds:
        assert not holds and not nodes.is_kept_out(tmp_path / "lock")
    with nodes.locked(tmp_path / "missing" / "lock") as holds:
        assert not holds


def test_a_check_that_breaks_is_its_own_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> dict[str, list[str]]:
        raise KeyError("lo")

    monkeypatch.setattr(machine_network, "interfaces", broken)
    finding = one("interfaces", subject())
    assert (finding.status, finding.code) == ("failed", 7)
    assert finding.measured == "KeyError: 'lo'"
    assert finding.mend


def test_findings_are_json() -> None:
    on = subject(quick=True)
    found = [
        f
        for name in ("python", "packages", "cores", "memory", "open files")
        for f in check(name, on)
    ]
    assert all(finding.status in ("ok", "warning") for finding in found)
    assert json.loads(json.dumps([dict(finding.figures) for finding in found]))
