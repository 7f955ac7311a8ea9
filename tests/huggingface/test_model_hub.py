"""Models of the Hub: uploaded, downloaded at one commit, and what is refused says how to mend it.

The client is `huggingface_hub`; the server a stand-in on this machine.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hub_server import Fault, Hub
from model_hub import TOKEN, model_hub
from stock_models import LLAMA, make_run, quick_files

from dtt.cli import main
from dtt.config.load import to_yaml
from dtt.config.schema import Config
from dtt.errors import CheckpointError
from dtt.huggingface.export import open_export, write_export
from dtt.huggingface.origin import with_origin

pytest.importorskip("transformers")
Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.chdir(tmp_path)
    quick_files(monkeypatch)
    make_run(Path("runs/book"), LLAMA)
    with model_hub(tmp_path, monkeypatch) as hub:
        yield hub


@pytest.fixture
def dtt(capsys: pytest.CaptureFixture[str]) -> Command:
    def run(*words: str) -> tuple[int, str, str]:
        code = main(list(words))
        streams = capsys.readouterr()
        return code, streams.out, streams.err

    return run


def put_model(hub: Hub, seed: int = 0) -> Path:
    """Put a model on the server; return its folder there."""
    run, _ = make_run(Path(f"runs/model-{seed}"), LLAMA, seed=seed)
    folder = hub.root / "models/org/small"
    shutil.rmtree(folder, ignore_errors=True)
    write_export(open_export(run, "last", "hf", "fp32"), folder, verify=False)
    return folder


def test_what_is_pushed_comes_back_the_same(
    hub: Hub, dtt: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    code, out, err = dtt("export", "runs/book", "--push", "me/book")
    assert code == 0, err
    assert f"{hub.url}/me/book" in out
    here, there = Path("exports/book-hf"), hub.root / "models/me/book"
    assert {p.name for p in here.iterdir()} == {p.name for p in there.iterdir()}
    assert all((there / p.name).read_bytes() == p.read_bytes() for p in here.iterdir())

    config = with_origin(Config(name="again", init_from="me/book"))
    assert config.init_from == f"me/book@{hub.commit(there)}"
    assert config.model.dim == LLAMA["dim"] and config.tokenizer.name == "file"


@pytest.mark.parametrize(
    ("fault", "token", "code", "said"),
    [
        (None, "", 2, "cannot push to me/book at {url}: you are not logged in"),
        (None, "hf_wrong", 2, "cannot push to me/book at {url}: you are not logged in"),
        (Fault("create", 9, "POST", status=403), TOKEN, 2, "you may not write there"),
        (Fault("create", 99, "POST", status=500), TOKEN, 5, "HTTP status 500"),
        (Fault("create", 99, "POST", drop=True), TOKEN, 5, "cannot push to me/book at {url}: "),
    ],
)
def test_a_refused_push_is_one_line_and_the_folder_stays(
    hub: Hub,
    dtt: Command,
    monkeypatch: pytest.MonkeyPatch,
    fault: Fault | None,
    token: str,
    code: int,
    said: str,
) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    hub.faults += [fault] if fault else []
    found, _, err = dtt("export", "runs/book", "--push", "me/book")
    assert found == code and said.format(url=hub.url) in err
    assert err.count("\n") == 1 and "`hf upload me/book exports/book-hf` sends it" in err
    assert (Path("exports/book-hf") / "model.safetensors").exists()


def test_a_push_that_cannot_be_is_refused_before_the_work(hub: Hub, dtt: Command) -> None:
    code, _, err = dtt("export", "runs/book", "--push", "book")
    assert (code, err) == (2, "dtt export: error: --push: should be ORG/NAME, got 'book'\n")
    assert not Path("exports").exists()


def test_a_run_keeps_the_commit_that_it_began_with(hub: Hub) -> None:
    first = hub.commit(put_model(hub))
    config = with_origin(Config(name="tuned", init_from="org/small"))
    assert config.init_from == f"org/small@{first}"
    folder = Path("runs/tuned")
    folder.mkdir()
    (folder / "config.yaml").write_text(to_yaml(config))

    second = hub.commit(put_model(hub, seed=1))
    assert second != first
    # The server no longer has the first commit; it is here.
    again = with_origin(Config(name="tuned", init_from="org/small"))
    assert again == config
    assert with_origin(again) == again
    other = with_origin(Config(name="other", init_from="org/small"))
    assert other.init_from == f"org/small@{second}"
    fresh = with_origin(Config(name="tuned", init_from="org/small"), fresh=True)
    assert fresh.init_from == f"org/small@{second}"


def test_without_the_network_the_cache_is_used(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    put_model(hub)
    online = with_origin(Config(name="a", init_from="org/small"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    asked = len(hub.requests)
    assert with_origin(Config(name="a", init_from="org/small")) == online
    assert len(hub.requests) == asked
    with pytest.raises(CheckpointError, match=r"no folder org/other is here, nor a download of it"):
        with_origin(Config(name="b", init_from="org/other"))


def test_only_settings_and_safetensors_are_downloaded(hub: Hub) -> None:
    folder = put_model(hub)
    for name in ("pytorch_model.bin", "modeling.py", "onnx/model.json", "consolidated.safetensors"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"no")
    with_origin(Config(name="a", init_from="org/small"))
    got = {request.path.rpartition("/")[2] for request in hub.requests if "resolve" in request.path}
    assert "model.safetensors" in got and "config.json" in got
    assert not got & {"pytorch_model.bin", "modeling.py", "model.json", "consolidated.safetensors"}


@pytest.mark.parametrize(
    ("named", "said"),
    [
        ("org/absent", r"there is no model org/absent at http://127\S+ \(and no such folder here"),
        ("org/small@v9", r"org/small has no revision 'v9'"),
        ("nowhere", r"init_from: nowhere does not exist, and is no ORG/NAME of the Hub"),
        ("./org/small", r"init_from: ./org/small does not exist"),
    ],
)
def test_what_is_not_there_is_said(hub: Hub, named: str, said: str) -> None:
    put_model(hub)
    with pytest.raises(CheckpointError, match=said):
        with_origin(Config(name="a", init_from=named))


def test_a_server_that_is_busy_is_asked_again(hub: Hub) -> None:
    put_model(hub)
    hub.faults.append(Fault("resolve/.*config.json", 2, "GET", status=503))
    hub.faults.append(Fault("/api/models", 1, "GET", status=500))
    config = with_origin(Config(name="a", init_from="org/small"))
    assert config.init_from is not None and not any(fault.times for fault in hub.faults)
