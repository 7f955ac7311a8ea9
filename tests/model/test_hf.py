"""Models of transformers under dtt, against transformers itself and a plain PyTorch loop."""

from __future__ import annotations

import math
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dtt.config.familiar import in_our_words
from dtt.config.layers import Layer
from dtt.config.load import load_config
from dtt.config.model import HfModel, Model
from dtt.config.schema import Config
from dtt.data.loader import Batch
from dtt.dist import Place, Runtime
from dtt.errors import ConfigError
from dtt.generation import Sampling, stream_tokens
from dtt.model.blocked_attention import blocked_attention
from dtt.model.hf import attention
from dtt.model.hf.examination import examine
from dtt.model.hf.model import HfCausalModel, without_memory
from dtt.model.hf.settings import complete, config_of
from dtt.model.objective import Objective
from dtt.parallel.layout import resolve
from dtt.training.build import build_model, build_stepper
from dtt.training.step import Stepper

transformers = pytest.importorskip("transformers")

ALONE = Runtime(Place(), torch.device("cpu"))
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
GATED = SIZES | {"intermediate_size": 48}
KINDS: dict[str, dict[str, Any]] = {
    "gpt2": SIZES,
    "llama": GATED | {"num_key_value_heads": 2},
    "qwen3": GATED | {"num_key_value_heads": 2, "head_dim": 8},
    "gemma2": GATED | {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 8},
    "gpt_neox": GATED,
    "phi": GATED,
    "opt": SIZES | {"ffn_dim": 48, "word_embed_proj_dim": 32},
}
"""GPT-2's head is tied, Gemma 2 caps its logits and has windows, Phi's head has a bias."""
VOCABULARY, CONTEXT = 64, 32


def settings_of(kind: str, **changes: Any) -> HfModel:
    own = {"context": CONTEXT, "vocab_size": VOCABULARY, "settings": KINDS[kind]} | changes
    return complete(HfModel(architecture=kind, **own), kind)


def filled(settings: HfModel, seed: int = 0, std: float | None = None) -> HfCausalModel:
    """Return a model with its initial weights, or with others of a standard deviation."""
    model = HfCausalModel(settings)
    model.to_empty(device="cpu")
    model.reset()
    initial, generator = model.initial(seed), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if std is None or tensor.ndim < 2:
                tensor.copy_(initial(name, tuple(tensor.shape)))
            else:
                tensor.normal_(0, std, generator=generator)
    return model.eval()


def theirs_of(model: HfCausalModel) -> Any:
    """Return transformers' own model with the same weights, made without anything of dtt's."""
    theirs = transformers.AutoModelForCausalLM.from_config(config_of(model.settings))
    missing = theirs.load_state_dict(model.state_dict(), strict=False)
    assert not missing.unexpected_keys
    assert set(missing.missing_keys) <= {"lm_head.weight"}  # a tied one
    return theirs.eval()


def rows(count: int = 4, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(VOCABULARY, (count, CONTEXT + 1), generator=generator)
    return drawn[:, :-1], drawn[:, 1:]


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_and_its_gradient_are_those_of_their_logits(kind: str) -> None:
    model = filled(settings_of(kind), std=0.25)
    theirs, (tokens, targets) = theirs_of(model), rows()
    logits = theirs(tokens).logits.flatten(0, 1)
    expected = F.cross_entropy(logits, targets.flatten(), reduction="sum")
    found = Objective(model)(tokens, targets)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    assert model.head_is_plain == (kind not in ("gemma2", "phi"))
    expected.backward()
    found.backward()
    named = dict(theirs.named_parameters())
    largest = max(float(p.grad.abs().max()) for p in named.values() if p.grad is not None)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and named[name].grad is not None
        # The bias of keys has none but for rounding: softmax does not see it.
        scale = max(float(named[name].grad.abs().max()), 1e-2 * largest)
        torch.testing.assert_close(parameter.grad, named[name].grad, rtol=0, atol=1e-5 * scale)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "opt"])
def test_documents_of_a_row_are_as_if_each_were_alone(kind: str) -> None:
    model = filled(settings_of(kind), std=0.25)
    tokens, _ = rows(2)
    border = 12
    positions = torch.cat([torch.arange(border), torch.arange(CONTEXT - border)]).repeat(2, 1)
    with torch.no_grad():
        whole = model.hidden(tokens, positions)
        parts = [model.hidden(tokens[:, :border]), model.hidden(tokens[:, border:])]
    torch.testing.assert_close(whole, torch.cat(parts, 1), rtol=1e-5, atol=1e-5)
    examine(Objective(model))
    assert model.isolates


def test_a_model_that_cannot_keep_documents_apart_is_refused_by_name() -> None:
    """Bloom takes no positions; OPT takes them, and sees all of the row all the same."""
    bloom = {"hidden_size": 32, "n_layer": 2, "n_head": 4}
    for kind, sizes in (("bloom", bloom), ("opt", KINDS["opt"])):
        own = {"context": CONTEXT, "vocab_size": VOCABULARY, "settings": sizes}
        model = filled(complete(HfModel(architecture=kind, **own), kind))
        examine(Objective(model))
        tokens, _ = rows(2)
        with pytest.raises(ConfigError, match="this model cannot keep the documents"):
            model.hidden(tokens, torch.zeros_like(tokens))


def test_a_model_whose_tokens_see_later_ones_is_refused() -> None:
    model = filled(settings_of("llama"), std=0.25)
    for layer in model.whole.model.layers:
        layer.self_attn.is_causal = False
    with pytest.raises(ConfigError, match="tokens see those after them"):
        examine(Objective(model))


def test_weights_without_a_loss_are_refused() -> None:
    model = filled(settings_of("llama"))
    with torch.no_grad():
        model.whole.model.layers[1].mlp.down_proj.weight[0, 0] = math.nan
    with pytest.raises(ConfigError, match=r"give no finite loss \(nan, nan\)"):
        examine(Objective(model))


def test_weights_that_share_memory_are_refused() -> None:
    sizes = {"context": CONTEXT, "settings": GATED, "vocab_size": VOCABULARY}
    with pytest.raises(ConfigError, match="bert, which has weights that share memory"):
        HfCausalModel(complete(HfModel(architecture="bert", **sizes), "bert"))


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("electra", "in electra tokens see those after them"),
        ("mamba", "mamba, which has no cache of keys and values"),
        ("recurrent_gemma", "recurrent_gemma, which has no cache of keys and values"),
        ("git", "git is of text and other things"),
        ("gemma3", "gemma3 is of text and other things"),
        ("bart", "bart is not a decoder alone"),
    ],
)
def test_models_that_dtt_does_not_train_are_refused_in_a_line(kind: str, said: str) -> None:
    sizes = {"context": CONTEXT, "settings": SIZES, "vocab_size": VOCABULARY}
    with pytest.raises(ConfigError, match=said) as raised:
        examine(Objective(filled(complete(HfModel(architecture=kind, **sizes), kind))))
    assert "\n" not in raised.value.what


@pytest.mark.parametrize("kind", KINDS)
def test_weights_begin_as_transformers_has_them(kind: str) -> None:
    """In distribution: constants are the same, and so are standard deviations to 10%."""
    bigger = {"hidden_size": 64, "num_hidden_layers": 4}
    if kind == "opt":
        bigger["word_embed_proj_dim"] = 64
    settings = settings_of(kind, settings=KINDS[kind] | bigger, vocab_size=1024)
    torch.manual_seed(0)
    theirs = transformers.AutoModelForCausalLM.from_config(config_of(settings)).state_dict()
    for name, tensor in filled(settings).state_dict().items():
        other, large = theirs[name].float(), tensor.numel() >= 2048
        assert (float(tensor.std()) == 0) == (float(other.std()) == 0) or not large, name
        if float(other.std()) == 0:
            torch.testing.assert_close(tensor, other)
        elif large:
            assert abs(float(tensor.std() / other.std()) - 1) < 0.1, name
            assert abs(float(tensor.mean())) < 0.1 * float(other.std()), name


def test_a_tensor_begins_as_its_name_and_the_seed_say() -> None:
    settings = settings_of("gpt2")
    shapes = {name: tuple(t.shape) for name, t in HfCausalModel(settings).state_dict().items()}
    forward, backward = HfCausalModel(settings).initial(3), HfCausalModel(settings).initial(3)
    one = {name: forward(name, shape) for name, shape in shapes.items()}
    other = {name: backward(name, shapes[name]) for name in reversed(shapes)}
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], rtol=0, atol=0)
    matrix = "transformer.h.0.attn.c_attn.weight"
    assert not torch.equal(one[matrix], one[matrix.replace("h.0", "h.1")])
    assert not torch.equal(one[matrix], HfCausalModel(settings).initial(4)(matrix, shapes[matrix]))


def test_torchs_generator_is_left_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    filled(settings_of("gpt2"))
    assert torch.equal(before, torch.get_rng_state())


def config(kind: str, **changes: str) -> Config:
    flags = {
        "model.name": "hf",
        "model.architecture": kind,
        "training.batch_size": "8",
        "training.precision": "fp32",
        "optimizer.name": "adamw",
        "optimizer.lr": "1e-2",
    } | {key.replace("__", "."): value for key, value in changes.items()}
    made = load_config(overrides={key: (f"--{key}", value) for key, value in flags.items()})
    return made.model_copy(update={"model": settings_of(kind, dropout=made.model.dropout)})


def stepper_of(config: Config) -> Stepper:
    layout = resolve(config.parallel, config.model, 1)
    model = build_model(config, torch.float32)
    return build_stepper(model, layout, config, ALONE, torch.float32)


def batch(step: int) -> Batch:
    tokens, targets = rows(8, step)
    return Batch(tokens, targets, None, targets.numel(), ())


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("micro", ["8", "2"])
def test_ten_steps_are_those_of_a_plain_loop(kind: str, micro: str) -> None:
    """AdamW with weight decay on matrices, clipping at 1, all in fp32."""
    settings = config(kind, training__micro_batch_size=micro)
    stepper = stepper_of(settings)
    theirs = theirs_of(stepper.model.stages[0].model)  # type: ignore[arg-type]
    matrices = [p for p in theirs.parameters() if p.ndim >= 2]
    vectors = [p for p in theirs.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95))
    for step in range(10):
        result = stepper.step(batch(step), step)
        stepper.update(1.0)
        tokens, targets = rows(8, step)
        loss = F.cross_entropy(theirs(tokens).logits.flatten(0, 1), targets.flatten())
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        found = float(result.totals[0]) / result.tokens
        assert abs(found / loss.item() - 1) < 1e-6, step
        assert abs(float(result.grad_norm) / float(norm) - 1) < 1e-5, step


def test_recomputed_and_compiled_blocks_give_the_same_gradient() -> None:
    """Compiling is tried with the eager backend's graphs, since there may be no C++ compiler."""
    plain = stepper_of(config("llama"))
    again = stepper_of(config("llama", training__gradient_checkpointing="true"))
    assert all(block.gradient_checkpointing for block in again.model.stages[0].model.blocks)
    results = [stepper.step(batch(0), 0) for stepper in (plain, again)]
    assert torch.equal(results[0].totals, results[1].totals)
    for one, other in zip(plain.parameters, again.parameters, strict=True):
        assert one.grad is not None and other.grad is not None
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-6, atol=1e-9)


def test_dropout_depends_on_the_step_and_its_samples_only() -> None:
    changed = config("gpt2", model__dropout="0.2")
    steppers = [stepper_of(changed) for _ in range(2)]
    torch.manual_seed(1)
    one = steppers[0].step(batch(0), 5)
    torch.manual_seed(2)
    other = steppers[1].step(batch(0), 5)
    assert torch.equal(one.totals, other.totals)
    assert not torch.equal(one.totals, steppers[1].step(batch(0), 6).totals)
    without = stepper_of(config("gpt2")).step(batch(0), 5)
    assert not torch.equal(one.totals, without.totals)


def test_muon_takes_the_matrices_of_blocks_and_nothing_else() -> None:
    stepper = stepper_of(config("llama", optimizer__name="muon"))
    muon, adamw = stepper.optimizer.parts
    names = [name for group in muon.param_groups for name in group["param_names"]]
    assert len(names) == 2 * 7 and all(name.startswith("model.layers.") for name in names)
    rest = [name for group in adamw.param_groups for name in group["param_names"]]
    assert {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"} <= set(rest)


@pytest.mark.parametrize("kind", KINDS)
def test_cached_greedy_text_is_that_of_transformers(kind: str) -> None:
    model = filled(settings_of(kind), std=0.25)
    theirs = theirs_of(model)
    prompts, new = [[3, 5, 7, 9, 11], [8], [1, 2, 3]], 12
    written = list(stream_tokens(model, prompts, new, Sampling(0), seed=0, end=-1))
    for row, prompt in enumerate(prompts):  # each as if it were alone
        tokens = torch.tensor([prompt])
        expected = []
        with torch.no_grad():
            for _ in range(new):
                chosen = theirs(tokens).logits[:, -1].argmax(-1)
                expected.append(int(chosen))
                tokens = torch.cat([tokens, chosen[:, None]], 1)
        assert [step[row] for step in written] == expected


def documents_gradient(kind: str, dtype: torch.dtype, implementation: str) -> list[Tensor]:
    """The gradient for rows of two documents, by an attention of transformers."""
    tokens, targets = rows(2)
    positions = torch.cat([torch.arange(12), torch.arange(CONTEXT - 12)]).repeat(2, 1)
    model = filled(settings_of(kind), std=0.25).compute_in(dtype).train()
    assert model.whole.config._attn_implementation == "dtt"
    model.whole.set_attn_implementation(implementation)
    with patch.object(attention, "blocked_attention", wraps=blocked_attention) as blocks:
        Objective(model)(tokens, targets, positions).backward()
    assert blocks.call_count == (2 if implementation == "dtt" else 0)
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


def apart(found: list[Tensor], other: list[Tensor]) -> float:
    differences = [a - b for a, b in zip(found, other, strict=True)]
    norms = [torch.nn.utils.get_total_norm(tensors) for tensors in (differences, other)]
    return float(norms[0] / norms[1])


@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen3"])
def test_attention_in_blocks_is_that_of_sdpa(kind: str) -> None:
    """In training on a CPU, where dtt's own takes the place of sdpa; in bf16 as near to fp32."""
    exact = documents_gradient(kind, torch.float32, "sdpa")
    assert apart(documents_gradient(kind, torch.float32, "dtt"), exact) < 1e-5
    theirs = apart(documents_gradient(kind, torch.bfloat16, "sdpa"), exact)
    assert apart(documents_gradient(kind, torch.bfloat16, "dtt"), exact) < 1.3 * theirs


def test_text_goes_on_beyond_the_context() -> None:
    model = filled(settings_of("gpt2", context=16), std=0.25)
    written = list(stream_tokens(model, [[1, 2, 3]], 40, Sampling(0), seed=0, end=-1))
    assert len(written) == 40


def test_complete_settings_are_complete() -> None:
    """Nothing of transformers' defaults is left out, and completing them again changes nothing."""
    for kind in KINDS:
        settings = settings_of(kind)
        assert complete(settings, kind) == settings
        assert (settings.layers, settings.dim, settings.heads) == (2, 32, 4)
        usual, made = config_of(settings).to_dict(), without_memory(settings).config.to_dict()
        assert usual | {"dtype": "float32"} == made


@pytest.mark.parametrize(
    ("kind", "settings", "said"),
    [
        ("gpt2", {"n_layers": 2}, "gpt2 has no such setting, did you mean n_layer?"),
        ("gpt2", {"attn_pdrop": 0.1}, "model.settings.attn_pdrop: dtt sets it"),
        ("gpt2", {"n_layer": "two"}, "model: gpt2: "),
        ("llama", {"hidden_size": 30, "num_attention_heads": 4}, "not a multiple"),
        ("gpt3", {}, "transformers has no causal language model 'gpt3', did you mean gpt"),
        ("mixtral", {}, "mixtral has experts"),
        ("t5", {}, "no causal language model 't5'"),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(kind: str, settings: Any, said: str) -> None:
    with pytest.raises(ConfigError) as raised:
        complete(HfModel(architecture=kind, settings=settings, context=CONTEXT), kind)
    assert said in raised.value.what and "\n" not in raised.value.what


@pytest.mark.parametrize("axis", ["context", "expert", "pipeline"])
def test_other_axes_are_refused_by_name(axis: str) -> None:
    changed = config("gpt2", **{f"parallel__{axis}": "2"})
    with pytest.raises(ConfigError, match=f"parallel.{axis} is 2, and divides dtt's own decoder"):
        resolve(changed.parallel, changed.model, 2)


def test_s2s_configuration_is_the_preset() -> None:
    """`model: {name: "gpt2-small", hidden_size: 768, num_attention_heads: 12}`, as it stands."""
    words = {"name": "gpt2-small", "hidden_size": 768, "num_attention_heads": 12}
    layer = in_our_words(Layer({"model": words}))
    assert layer.tree["model"] == {"preset": "gpt2-small", "dim": 768, "heads": 12}
    usual = load_config(["gpt2-small"]).model
    assert isinstance(usual, Model)
    flags = {f"model.{key}": (f"--{key}", str(value)) for key, value in words.items()}
    found = load_config(overrides=flags).model
    assert found == usual.model_copy(update={"preset": "gpt2-small"})


def test_an_unknown_name_says_what_there_is() -> None:
    with pytest.raises(ConfigError, match=r"unknown model 'gpt2-smal', did you mean gpt2-small\?"):
        load_config(overrides={"model.name": ("--model.name", "gpt2-smal")})
    with pytest.raises(ConfigError, match="hidden_size and dim are the same setting"):
        in_our_words(Layer({"model": {"hidden_size": 4, "dim": 4}}))
