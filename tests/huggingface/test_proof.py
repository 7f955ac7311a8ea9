"""The proof of a folder: it finds planted faults, and names the first part that drifts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from stock_models import LLAMA, MODELS, export_of, left_over, make_run, quick_files, random_decoder

from dtt.config.model import Model
from dtt.errors import CheckpointError
from dtt.huggingface import export as module
from dtt.huggingface import proof
from dtt.huggingface.families import FAMILIES
from dtt.huggingface.pieces import Piece
from dtt.huggingface.settings import to_json

pytest.importorskip("transformers")
NAN = float("nan")


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    quick_files(monkeypatch)


def interleaved(piece: Piece, tensor: torch.Tensor) -> torch.Tensor:
    """Rows of queries in the order of pairs side by side, as the first Llama had them."""
    made = tensor[0] if piece.stacked else tensor
    if not piece.name.endswith("layers.1.self_attn.q_proj.weight"):
        return made.t() if piece.transposed else made
    return made.view(4, 2, -1, 32).transpose(1, 2).reshape(made.shape)


def not_transposed(piece: Piece, tensor: torch.Tensor) -> torch.Tensor:
    keep = "h.0.attn.c_proj" in piece.name  # a square matrix: no shape gives it away
    return tensor.t() if piece.transposed and not keep else tensor


def doubled(part: str) -> Callable[..., torch.Tensor]:
    """What is called so is twice what it was."""
    whole = Piece.from_ours

    def fault(piece: Piece, tensor: torch.Tensor) -> torch.Tensor:
        made = whole(piece, tensor)
        return made * 2 if part in piece.name else made

    return fault


@pytest.mark.parametrize(
    ("model", "fault", "place"),
    [
        ("llama", interleaved, "block 1, its attention ("),
        ("gpt2", not_transposed, "block 0, its attention ("),
        ("llama", doubled("layers.1.post_attention_layernorm"), "block 1, its MLP ("),
        ("starcoder2", doubled("layers.1.mlp.c_proj.weight"), "block 1, its MLP ("),
        ("mistral", doubled("layers.1.self_attn.o_proj"), "block 1, its attention ("),
        ("qwen3", doubled("layers.0.self_attn.k_norm"), "block 0, its attention ("),
        ("mixtral", doubled("layers.1.block_sparse_moe.experts.3.w2"), "block 1, its MLP ("),
        ("mixtral", doubled("layers.0.block_sparse_moe.gate"), "block 0, its MLP ("),
        ("qwen3-moe", doubled("layers.1.mlp.experts.5.down_proj"), "block 1, its MLP ("),
        ("qwen3-moe", doubled("layers.0.mlp.down_proj"), "block 0, its MLP ("),
        ("llama", doubled("embed_tokens"), "the embedding ("),
        ("gpt2", doubled("wpe"), "the embedding ("),
        ("llama", doubled("model.norm"), "the final norm ("),
        ("starcoder2", doubled("lm_head"), "the head"),
    ],
)
def test_a_planted_fault_in_the_weights_names_the_part(
    model: str, fault: Callable[..., torch.Tensor], place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, _ = make_run(Path("runs/small"), MODELS[model][1] | {"heads": 4})
    monkeypatch.setattr(Piece, "from_ours", fault)
    with pytest.raises(CheckpointError) as caught:
        export_of(run)
    said = str(caught.value)
    assert f": {place}" in said and "is the first to drift; please report it" in said
    assert ".tmp" not in said
    assert left_over() == []


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("rms_norm_eps", 1e-3, "block 0, its attention ("),
        ("num_key_value_heads", 4, "transformers finds mismatched keys"),
        ("hidden_act", "gelu", "block 0, its MLP ("),
        ("rope_parameters", {"rope_theta": 1e4 + 10, "rope_type": "default"}, "rotates position"),
    ],
)
def test_a_planted_fault_in_the_settings_is_found(
    key: str, value: Any, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, _ = make_run(Path("runs/small"), LLAMA)

    def wrong(*given: Any) -> dict[str, Any]:
        made = to_json(*given)
        made.pop("rope_scaling")
        return made | {key: value}

    monkeypatch.setattr(module, "to_json", wrong)
    with pytest.raises(CheckpointError) as caught:
        export_of(run)
    assert said in str(caught.value)
    assert left_over() == []


# --- values that are no numbers ------------------------------------------------------------------


def spoilt() -> torch.nn.Module:
    """A Llama of which one weight is NaN."""
    made = random_decoder(Model(**LLAMA))
    made.blocks[1].mlp.up.weight.data[0, 0] = NAN
    return made


def test_nan_is_no_match() -> None:
    run, ours = make_run(Path("runs/small"), LLAMA)
    folder = export_of(run, verify=False)
    assert proof.prove(folder, FAMILIES["llama"], ours).drift <= 1e-6
    with pytest.raises(CheckpointError) as caught:
        proof.prove(folder, FAMILIES["llama"], spoilt())
    assert "the logits are not finite, block 1, its MLP (nan) is the first" in str(caught.value)


def test_nan_of_transformers_alone_is_no_match(monkeypatch: pytest.MonkeyPatch) -> None:
    run, ours = make_run(Path("runs/small"), LLAMA)
    folder = export_of(run, verify=False)
    whole = proof.load_theirs

    def wrong(place: str) -> Callable[..., Any]:
        def load(*given: Any) -> Any:
            theirs = whole(*given)
            found = dict(theirs.named_parameters()) | dict(theirs.named_buffers())
            found[place].data.view(-1)[0] = NAN
            return theirs

        return load

    monkeypatch.setattr(proof, "load_theirs", wrong("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(CheckpointError, match=r"differ from dtt's by nan .*: block 1, its MLP \("):
        proof.prove(folder, FAMILIES["llama"], ours)
    monkeypatch.setattr(proof, "load_theirs", wrong("model.rotary_emb.inv_freq"))
    with pytest.raises(CheckpointError, match="transformers rotates position 0 by other angles"):
        proof.prove(folder, FAMILIES["llama"], ours)


# --- rotary angles -------------------------------------------------------------------------------


@pytest.mark.parametrize(("std", "same_angles"), [(0.1, False), (0.5, True)])
def test_the_proof_says_whether_it_needed_the_same_angles(std: float, same_angles: bool) -> None:
    """Far out in a text, large weights make the rounding of angles visible."""
    settings = LLAMA | {"context": 1024, "init_std": std}
    run, ours = make_run(Path("runs/long"), settings)
    found = proof.prove(export_of(run, verify=False), FAMILIES["llama"], ours)
    assert found.same_angles is same_angles and found.tokens == 1024 and found.drift <= 1e-5
    assert ("with the same rotary angles" in str(found)) is same_angles
