"""Models of the Hub: uploaded, downloaded at one commit, and what is refused says how to mend it.

The client is `huggingface_hub`; the server a stand-in on this machine.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_server import Fault, Hub
from model_hub import TOKEN, model_hub
from starting import Command, edit, flags
from stock_models import LLAMA, make_run, quick_files

from dtt.config.load import to_yaml
from dtt.config.schema import Config
from dtt.errors import CheckpointError, ConfigError
from dtt.huggingface.export import open_export, write_export
from dtt.huggingface.origin import with_origin
from dtt.machine import free_port

pytest.importorskip("transformers")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.chdir(tmp_path)
    quick_files(monkeypatch)
    make_run(Path("runs/book"), LLAMA)
    with model_hub(tmp_path, monkeypatch) as hub:
        yield hub


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

    assert 'from_pretrained("me/book")' in (here / "README.md").read_text()
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


def test_a_server_says_when_to_ask_again(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    put_model(hub)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    hub.faults.append(Fault("/api/models", 1, "GET", status=503, retry_after="7"))
    with_origin(Config(name="a", init_from="org/small"))
    assert "HTTP status 503; next try in 7.0 s" in capsys.readouterr().err


def test_a_server_that_cannot_be_reached_is_said(
    hub: Hub, dtt: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    address = f"http://127.0.0.1:{free_port()}"  # nobody listens there
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
    code, _, err = dtt("train", "--init-from", "org/small", "-n", "a")
    *tries, last = err.splitlines()
    assert code == 4 and len(tries) == 4 and all("next try in" in line for line in tries)
    start, _, end = last.partition(" cannot be reached: ")
    assert start == (
        "dtt train: error: no folder org/small is here, nor a download of it, and org/small at "
        f"{address}"
    )
    assert "refused (tried again and again); check the network" in end


def test_without_huggingface_hub_the_package_is_named(
    hub: Hub, dtt: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    said = "models of the Hub need the Python package 'huggingface_hub'; pip install 'dtt[hf]'\n"
    code, _, err = dtt("train", "--init-from", "org/small", "-n", "a")
    assert (code, err) == (2, f"dtt train: error: {said}")
    code, _, err = dtt("export", "runs/book", "--push", "me/book")
    assert (code, err) == (2, f"dtt export: error: {said}")
    assert not Path("exports").exists()


def test_code_of_a_model_neither_comes_nor_runs(hub: Hub) -> None:
    folder = put_model(hub)
    edit(folder, auto_map={"AutoModelForCausalLM": "modeling.Mine"})
    (folder / "modeling.py").write_text("open('executed', 'w')\n")
    with pytest.raises(ConfigError, match=r"has code of its own \(auto_map in config.json\)"):
        with_origin(Config(name="a", init_from="org/small"))
    config = with_origin(Config(name="a", init_from="org/small", init_ignore_code=True))
    assert config.model.dim == LLAMA["dim"]
    assert not any("modeling.py" in request.path for request in hub.requests)
    assert not Path("executed").exists()


def test_a_run_goes_on_where_its_model_is_no_more(
    hub: Hub, dtt: Command, tmp_path: Path, text_here: None
) -> None:
    commit = hub.commit(put_model(hub))
    words = ["train", *flags(), "--init-from", "org/small"]
    assert dtt(*words, "-n", "tuned", "--max-steps", "2")[0] == 0
    shutil.rmtree(hub.root / "models/org")
    shutil.rmtree(tmp_path / "cache")
    code, out, err = dtt(*words, "-n", "tuned", "--max-steps", "3")
    assert code == 0 and "continuing runs/tuned from step 2" in out
    assert "init_from" not in out and "error" not in err
    assert f"init_from: org/small@{commit}" in Path("runs/tuned/config.yaml").read_text()
    code, _, err = dtt(*words, "-n", "new")
    assert code == 4 and "there is no model org/small at" in err
