"""Several processes that make one corpus: nothing twice, nothing lost, the same bytes as one."""

from __future__ import annotations

import contextlib
import hashlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dtt.config.data import Bpe, Byte, Data
from dtt.config.schema import Config
from dtt.config.sources import Tales, Text
from dtt.data.preparation import crew as crews
from dtt.data.preparation import encoding, members
from dtt.data.preparation.crew import Crew
from dtt.data.preparation.encoding import PartEncoder
from dtt.data.preparation.members import Members
from dtt.data.preparation.prepare import prepare
from dtt.data.preparation.tokenizing import prepare_command
from dtt.errors import BusyError, ConfigError, DataError, DttError, OtherRankError, PeerError
from dtt.place import Array, Place

PARTS = 6
LAUNCHERS = Path(sys.executable).parent
FLAGS = ("--data.source.separator", "END", "--tokenizer", "byte", "--data.workers", "1")
Files = dict[str, str]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 5.5 MB, which are six parts."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    line = "a long line of text, and another one, and so on, until it has gone on for long enough. "
    path.write_text("END".join(f"{number} {line * 57}" for number in range(1100)))
    return path


@pytest.fixture
def data(text: Path, tmp_path: Path) -> Data:
    source = Text(path=(str(text),), separator="END")
    return Data(source=source, dir=tmp_path, workers=1)


@pytest.fixture(scope="module")
def alone(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Files:
    """The files that one process makes, without interruption."""
    source = Text(path=(str(text),), separator="END")
    made = prepare(Data(source=source, dir=tmp_path_factory.mktemp("a"), workers=1), Byte())
    assert len(made.manifest.shards["train"]) == PARTS
    return digest(made.folder)


def digest(folder: Path) -> Files:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


def ranks(count: int, action: Callable[[Crew], Any], folder: Path, launch: str = "L") -> list[Any]:
    """Run `action` on `count` ranks, which are threads here; return results or errors."""
    outcome: list[Any] = [None] * count

    def run(rank: int) -> None:
        try:
            with Crew(folder, Place(rank, count), launch) as crew:
                outcome[rank] = action(crew)
        except DttError as error:
            outcome[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not any(thread.is_alive() for thread in threads), "a rank hangs"
    return outcome


def encoded(monkeypatch: pytest.MonkeyPatch, delay: float = 0.0) -> list[tuple[str, int]]:
    """Have the parts noted that are encoded from now on, with the thread that did it."""
    done: list[tuple[str, int]] = []
    original = PartEncoder.__call__

    def noted(self: PartEncoder, part: Any) -> int:
        done.append((threading.current_thread().name, part.index))
        time.sleep(delay)
        return original(self, part)

    monkeypatch.setattr(PartEncoder, "__call__", noted)
    return done


# --- sharing the work ----------------------------------------------------------------------------


def test_ranks_share_the_parts_and_leave_nothing_behind(
    tmp_path: Path, data: Data, monkeypatch: pytest.MonkeyPatch, alone: Files
) -> None:
    done = encoded(monkeypatch, 0.05)
    made = ranks(2, lambda crew: prepare(data, Byte(), crew=crew), tmp_path)
    assert digest(made[0].folder) == digest(made[1].folder) == alone
    assert sorted(index for _, index in done) == list(range(PARTS))
    assert len({who for who, _ in done}) == 2
    assert [p.name for p in tmp_path.iterdir()] == [made[0].folder.name]


def test_ranks_begin_at_their_own_stripe_and_go_on_with_the_others(
    tmp_path: Path, data: Data, monkeypatch: pytest.MonkeyPatch, alone: Files
) -> None:
    done = encoded(monkeypatch)
    place = Array("7", 1, 3)  # the others never come
    with Crew(tmp_path, array=place) as crew:
        folder = prepare(data, Byte(), crew=crew).folder
    assert [index for _, index in done] == [2, 3, 4, 5, 0, 1]
    assert digest(folder) == alone
    with Crew(tmp_path, array=Array("7", 2, 3)) as crew:  # one that comes when all is done
        prepare(data, Byte(), crew=crew)
    assert len(done) == PARTS


def test_a_finished_corpus_is_not_touched(tmp_path: Path, data: Data) -> None:
    folder = prepare(data, Byte()).folder
    before = {p: p.stat().st_mtime_ns for p in [tmp_path, folder, *folder.iterdir()]}
    prepare(data, Byte())
    assert {p: p.stat().st_mtime_ns for p in before} == before
    made = ranks(2, lambda crew: prepare(data, Byte(), crew=crew), tmp_path)
    assert [m.folder for m in made] == [folder, folder]
    assert {p: p.stat().st_mtime_ns for p in before if p != tmp_path} == {
        p: t for p, t in before.items() if p != tmp_path
    }


def test_only_one_trains_the_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dtt.data.preparation import prepare as preparing

    trained: list[str] = []
    original = preparing.train_tokenizer

    def slow(*arguments: Any, **named: Any) -> Any:
        trained.append(threading.current_thread().name)
        time.sleep(0.2)
        return original(*arguments, **named)

    monkeypatch.setattr(preparing, "train_tokenizer", slow)
    small = Data(source=Tales(stories=300), dir=tmp_path, workers=1)
    made = ranks(3, lambda crew: prepare(small, Bpe(vocab_size=300), crew=crew), tmp_path)
    assert len(trained) == 1
    assert {m.manifest.tokenizer for m in made} == {made[0].manifest.tokenizer}


def test_parts_whose_files_are_not_whole_are_made_again(
    tmp_path: Path, data: Data, monkeypatch: pytest.MonkeyPatch, alone: Files
) -> None:
    folder = prepare(data, Byte()).folder
    manifest = json.loads((folder / "manifest.json").read_text())
    for index in range(PARTS):  # as it was before the last step
        row = {"bad": {}} | {s: manifest["shards"][s][index] for s in ("train", "val")}
        (folder / f"part-{index:05d}.json").write_text(json.dumps(row))
    (folder / "manifest.json").unlink()
    (folder / "train-00001.bin").unlink()
    (folder / "val-00003.docs").write_bytes(b"")
    (folder / "part-00004.json").write_text("{")
    (folder / ".train-00005.bin.12ab.tmp").write_bytes(b"left behind")
    done = encoded(monkeypatch)
    prepare(data, Byte())
    assert sorted(index for _, index in done) == [1, 3, 4]
    assert digest(folder) == alone


def test_tokens_that_wait_on_the_disk_are_the_same(
    tmp_path: Path, data: Data, monkeypatch: pytest.MonkeyPatch, alone: Files
) -> None:
    monkeypatch.setattr(encoding, "SPILL", 10_000)
    assert digest(prepare(data, Byte()).folder) == alone


# --- force ---------------------------------------------------------------------------------------


def test_force_removes_the_old_data_once(
    tmp_path: Path, data: Data, monkeypatch: pytest.MonkeyPatch, alone: Files
) -> None:
    folder = prepare(data, Byte()).folder
    (folder / "train-00000.bin").write_bytes(b"damaged")
    done = encoded(monkeypatch)
    ranks(2, lambda crew: prepare(data, Byte(), crew=crew, force=True), tmp_path)
    assert sorted(index for _, index in done) == list(range(PARTS))
    assert digest(folder) == alone


def test_force_in_an_array_removes_the_old_data_once(
    tmp_path: Path, data: Data, monkeypatch: pytest.MonkeyPatch, alone: Files
) -> None:
    folder = prepare(data, Byte()).folder
    done = encoded(monkeypatch)
    for job, times in (("1", 1), ("2", 2)):
        for task in range(3):
            with Crew(tmp_path, array=Array(job, task, 3)) as crew:
                prepare(data, Byte(), crew=crew, force=True)
        assert sorted(index for _, index in done) == sorted([*range(PARTS)] * times)
    assert digest(folder) == alone


def test_force_does_not_take_a_corpus_from_others(tmp_path: Path, data: Data) -> None:
    folder = prepare(data, Byte()).folder
    with Crew(tmp_path) as other:
        other.meet(folder.name, lambda: None)
        with pytest.raises(BusyError, match=rf"is being made by process {os.getpid()} on"):
            prepare(data, Byte(), force=True)
    assert (folder / "manifest.json").exists()


# --- meeting -------------------------------------------------------------------------------------


def test_nobody_goes_on_before_the_first_has_made_ready(tmp_path: Path) -> None:
    order: list[str] = []

    def first() -> None:
        time.sleep(0.2)
        order.append("first")

    def action(crew: Crew) -> None:
        crew.meet("corpus", first)
        order.append("on")
        crew.meet("another", lambda: order.append("second"))

    assert ranks(3, action, tmp_path) == [None] * 3
    assert order[:2] == ["first", "on"] and order.count("first") == order.count("second") == 1
    assert not any(tmp_path.iterdir())


def test_ranks_with_other_settings_are_refused_before_anything_is_removed(
    tmp_path: Path, data: Data
) -> None:
    old = prepare(data, Byte()).folder

    def action(crew: Crew) -> None:
        changed = {"val_fraction": 0.3} if crew.rank else {}
        prepare(data.model_copy(update=changed), Byte(), crew=crew, force=True)

    errors = ranks(2, action, tmp_path)
    assert isinstance(errors[0], ConfigError) and isinstance(errors[1], OtherRankError)
    assert "rank 1 would make text-byte-" in str(errors[0])
    assert errors[1].exit_code == 2
    assert [p.name for p in tmp_path.iterdir()] == [old.name]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_does_not_come(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int
) -> None:
    monkeypatch.setattr(crews, "ARRIVAL", 0.2)
    monkeypatch.setattr(crews, "LINGER", 0.1)
    missing = 1 - rank
    with (
        pytest.raises(PeerError, match=rf"rank {missing} of 2 did not come .*share") as error,
        Crew(tmp_path, Place(rank, 2), "L") as crew,
    ):
        crew.meet("corpus", lambda: None)
    assert error.value.exit_code == 7
    assert not any(tmp_path.iterdir())


def test_a_record_of_a_dead_launch_is_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(crews, "ARRIVAL", 0.2)
    monkeypatch.setattr(crews, "LINGER", 0.1)
    for pid, host in ((2**22 + 1, None), (1, "elsewhere/")):  # never a process; no sign of life
        other = Members(tmp_path / ".crew", "L", "old", 1, "L")
        other.own = members.replace(other.own, pid=pid, host=host or other.own.host)
        other.folder.mkdir(parents=True, exist_ok=True)
        other._write()
        with pytest.raises(PeerError), Crew(tmp_path, Place(0, 2), "L") as crew:
            crew.meet("corpus", lambda: None)


def test_a_rank_that_fails_stops_the_others_with_its_code(tmp_path: Path) -> None:
    def action(crew: Crew) -> None:
        if crew.rank == 1:
            raise DataError("line 7 is bad")
        crew.meet("corpus", lambda: None)

    errors = ranks(3, action, tmp_path)
    assert [type(error) for error in errors] == [OtherRankError, DataError, OtherRankError]
    assert str(errors[1]) == "line 7 is bad"
    assert [error.exit_code for error in errors] == [3, 3, 3]
    assert not any(tmp_path.iterdir())


def test_what_all_ranks_have_to_say_is_said_once(tmp_path: Path) -> None:
    source = Text(path=(str(tmp_path / "missing.txt"),))
    data = Data(source=source, dir=tmp_path, workers=1)
    errors = ranks(3, lambda crew: prepare(data, Byte(), crew=crew), data.dir)
    assert [type(error) for error in errors] == [DataError, OtherRankError, OtherRankError]
    assert {error.exit_code for error in errors} == {3}


def test_a_part_that_fails_stops_all_ranks(
    tmp_path: Path, data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = PartEncoder.__call__

    def failing(self: PartEncoder, part: Any) -> int:
        if part.index == 3:
            raise DataError("part 3 cannot be read")
        time.sleep(0.3)
        return original(self, part)

    monkeypatch.setattr(PartEncoder, "__call__", failing)
    errors = ranks(2, lambda crew: prepare(data, Byte(), crew=crew), tmp_path)
    assert sorted(str(error) for error in errors) == [
        "another rank failed",
        "part 3 cannot be read",
    ]


# --- claims --------------------------------------------------------------------------------------


@contextlib.contextmanager
def two(folder: Path) -> Iterator[tuple[Crew, Crew]]:
    with Crew(folder) as one, Crew(folder) as other:
        for crew in (one, other):
            crew.meet("corpus", lambda: None)
        yield one, other


def test_a_claim_belongs_to_one(tmp_path: Path) -> None:
    with two(tmp_path) as (one, other):
        assert one.claim("a") and one.claim("a")
        assert not other.claim("a") and other.claim("b")


def test_a_claim_of_one_that_left_is_free(tmp_path: Path) -> None:
    with two(tmp_path) as (one, _):
        with Crew(tmp_path) as third:
            third.meet("corpus", lambda: None)
            assert third.claim("a") and not one.claim("a")
        assert one.claim("a")


def test_an_empty_claim_is_free(tmp_path: Path) -> None:
    with two(tmp_path) as (one, other):
        one.claim("b")
        (tmp_path / ".crew" / "corpus" / "a").touch()  # its writer died in the middle
        assert one.claim("a") and not other.claim("a")


def test_one_that_shows_no_life_loses_its_claims(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(members, "BEAT", 60.0)
    monkeypatch.setattr(members, "LEASE", 0.3)
    with two(tmp_path) as (one, other):
        assert one.claim("a") and not other.claim("a")
        one.members.tell(beat=1)
        assert not other.claim("a")
        time.sleep(0.2)
        one.members.tell(beat=2)
        time.sleep(0.2)
        assert not other.claim("a")  # it lives: it has moved since
        time.sleep(0.4)
        assert other.claim("a") and not one.claim("a")


def test_beats_go_on_while_a_member_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(members, "BEAT", 0.02)
    monkeypatch.setattr(members, "LEASE", 0.2)
    with two(tmp_path) as (one, other):
        one.claim("a")
        for _ in range(20):
            time.sleep(0.03)
            assert not other.claim("a")


# --- deaths --------------------------------------------------------------------------------------


def start_rank(data: Data, place: Place) -> Any:
    """Prepare in a process of its own, which leads a process group."""

    def run() -> None:
        os.setpgid(0, 0)
        with Crew(data.dir, place, "L") as crew:
            prepare(data, Byte(), crew=crew)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    return process


def kill(process: Any, *, group: bool) -> None:
    with contextlib.suppress(ProcessLookupError):
        (os.killpg if group else os.kill)(process.pid, signal.SIGKILL)
    process.join()


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_a_process_whose_number_another_has_is_dead(tmp_path: Path) -> None:
    names = []
    for token, changes in (("alive", {}), ("dead", {"born": "1"})):
        member = Members(tmp_path, "L", token, 0, "job")
        member.own = replace(member.own, **changes)
        member.folder.mkdir(exist_ok=True)
        member._write()
        names.append(member.name)
    one = Members(tmp_path, "L", "one", 1, "job")
    assert [name for name, _ in one.others()] == names[:1]
    assert os.listdir(one.folder) == names[:1]


@pytest.mark.processes
def test_kills_at_any_moment_change_nothing(tmp_path: Path, data: Data, alone: Files) -> None:
    draw, kills = random.Random(1), 0
    while kills < 40:
        process = start_rank(data.model_copy(update={"workers": 2}), Place())
        process.join(draw.uniform(0.0, 0.15))
        if process.exitcode is None:
            kill(process, group=draw.random() < 0.5)
            kills += 1
        else:
            assert process.exitcode == 0
            folder = next(p for p in tmp_path.iterdir() if p.name[0] != ".")
            # A worker outlives its parent by a moment, in which it may begin another file.
            assert {k: v for k, v in digest(folder).items() if k[0] != "."} == alone
            shutil.rmtree(folder)
    for _ in range(2):
        folder = prepare(data, Byte()).folder
    assert digest(folder) == alone
    others = (p for p in tmp_path.rglob("*") if p.is_file() and p.parent != folder)
    assert not [p for p in others if p.stat().st_size]  # no records or claims of the dead


@pytest.mark.processes
@pytest.mark.parametrize("victim", [0, 1])
def test_the_other_rank_does_the_work_of_one_that_is_killed(
    tmp_path: Path, data: Data, monkeypatch: pytest.MonkeyPatch, alone: Files, victim: int
) -> None:
    original = PartEncoder.__call__

    def slow(self: PartEncoder, part: Any) -> int:
        time.sleep(0.2)
        return original(self, part)

    monkeypatch.setattr(PartEncoder, "__call__", slow)
    both = [start_rank(data, Place(rank, 2)) for rank in range(2)]
    deadline = time.monotonic() + 20
    while not list(tmp_path.glob("*/part-*.json")):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    kill(both[victim], group=True)
    both[1 - victim].join(20)
    assert both[1 - victim].exitcode == 0
    folder = next(p for p in tmp_path.iterdir() if p.name[0] != ".")
    assert digest(folder) == alone
    assert [p.name for p in tmp_path.iterdir()] == [folder.name]


@pytest.mark.processes
def test_a_worker_that_is_killed_is_said_in_a_line(
    tmp_path: Path, data: Data, monkeypatch: pytest.MonkeyPatch, alone: Files
) -> None:
    original = PartEncoder.__call__

    def dying(self: PartEncoder, part: Any) -> int:
        if part.index == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, part)

    with monkeypatch.context() as patch:
        patch.setattr(PartEncoder, "__call__", dying)
        with pytest.raises(PeerError, match=r"a worker process was killed.*goes on where it"):
            prepare(data.model_copy(update={"workers": 2}), Byte())
    assert digest(prepare(data, Byte()).folder) == alone


# --- launchers -----------------------------------------------------------------------------------


def command(folder: Path, text: Path) -> list[str]:
    where = ("--data-path", str(text), "--data.dir", str(folder))
    return [sys.executable, "-m", "dtt", "tokenize", *FLAGS, *where]


def run(words: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, capture_output=True, text=True, check=False, timeout=60)


@pytest.mark.processes
def test_mpirun(tmp_path: Path, text: Path, alone: Files) -> None:
    mpirun = shutil.which("mpirun", path=f"{LAUNCHERS}:{os.environ['PATH']}")
    if mpirun is None:
        pytest.skip("no mpirun (pip install mpich)")
    done = run([mpirun, "-n", "2", *command(tmp_path, text)])
    assert (done.returncode, done.stderr) == (0, "")
    folder = next(p for p in tmp_path.iterdir() if p.name[0] != ".")
    assert done.stdout.splitlines().count(str(folder)) == 1  # one rank speaks
    assert digest(folder) == alone
    assert [p.name for p in tmp_path.iterdir()] == [folder.name]
    failed = run([mpirun, "-n", "2", *command(tmp_path, tmp_path / "missing.txt")])
    assert failed.returncode == 3
    assert failed.stderr.count("missing.txt") == 1


@pytest.mark.parametrize(
    ("environ", "where"),
    [
        ({"PMI_RANK": "0", "PMI_SIZE": "2"}, "2 ranks of MPICH"),
        ({"SLURM_ARRAY_TASK_ID": "1"}, "a Slurm array"),
    ],
)
def test_dask_and_ranks_are_two_ways(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, environ: Files, where: str
) -> None:
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    config = Config(data=Data(dir=tmp_path))
    with pytest.raises(ConfigError, match=f"--dask in {where}"):
        prepare_command(config, force=False, dask="local")


@pytest.mark.processes
@pytest.mark.usefixtures("slurm")
def test_srun(tmp_path: Path, text: Path, alone: Files) -> None:
    done = run(["srun", "-N2", "-n2", *command(tmp_path, text)])
    assert (done.returncode, done.stderr) == (0, "")
    folder = next(p for p in tmp_path.iterdir() if p.name[0] != ".")
    assert digest(folder) == alone


@pytest.mark.processes
def test_tokenizing_needs_no_torch(tmp_path: Path, text: Path) -> None:
    """Nor MPI's library: ranks read their environment."""
    script = (
        "import sys; from dtt.cli import main; code = main(sys.argv[1:]); "
        "print(code, sorted({'torch', 'mpi4py', 'distributed'} & set(sys.modules)))"
    )
    done = run([sys.executable, "-c", script, *command(tmp_path, text)[3:]])
    assert done.stdout.splitlines()[-1] == "0 []", done.stderr


@pytest.mark.processes
def test_dask_makes_the_same_bytes_though_a_worker_dies(
    tmp_path: Path, data: Data, monkeypatch: pytest.MonkeyPatch, alone: Files
) -> None:
    pytest.importorskip("distributed")
    from dtt.data.preparation import dask

    with dask.DaskWorkers("local", 2) as workers:
        pids = workers._client.run(os.getpid)

        def kill_one() -> None:
            while not list(tmp_path.glob("*/part-*.json")):
                time.sleep(0.01)
            os.kill(next(iter(pids.values())), signal.SIGKILL)

        killer = threading.Thread(target=kill_one)
        killer.start()
        folder = prepare(data, Byte(), workers=workers).folder
        killer.join()
        assert digest(folder) == alone
        monkeypatch.setattr(dask, "ARRIVAL", 0.5)
        workers._cluster.scale(0)
        with pytest.raises(PeerError, match="no workers for"):
            prepare(data, Byte(), workers=workers, force=True)


def test_dask_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("distributed")
    from dtt.data.preparation import dask

    monkeypatch.setattr(dask, "ARRIVAL", 0.2)
    with (
        pytest.raises(PeerError, match=r"--dask tcp://127\.0\.0\.1:9: no scheduler with workers"),
        dask.DaskWorkers("tcp://127.0.0.1:9"),
    ):
        pass
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(ConfigError, match=r"pip install 'dtt\[dask\]'"):
        dask.DaskWorkers("local")
