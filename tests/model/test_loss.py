"""The chunked loss against torch's cross-entropy of all logits at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dtt.model import loss
from dtt.model.loss import sum_cross_entropy

IGNORED = -1


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "LARGE_VOCABULARY", 50)
    monkeypatch.setattr(loss, "CHUNK", 8)
    monkeypatch.setattr(loss, "BLOCK", 3)


def problem(
    count: int, dtype: torch.dtype = torch.float32, vocabulary: int = 61
) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden [count, 5], head [vocabulary, 5] in fp32 (fp64 for fp64), targets with holes."""
    generator = torch.Generator().manual_seed(count)
    hidden = torch.randn(count, 5, generator=generator, dtype=torch.float64).to(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    head = torch.randn(vocabulary, 5, generator=generator, dtype=torch.float64).to(wide)
    targets = torch.randint(vocabulary, (count,), generator=generator)
    targets[::4] = IGNORED
    return hidden.requires_grad_(), head.requires_grad_(), targets


def reference(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    logits = F.linear(hidden.double(), head.double())
    return F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")


# One token; below, at and above a block and a chunk; several chunks with a ragged last one.
@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 8, 9, 16, 29])
@pytest.mark.parametrize("scale", [1.0, 1 / 3])
def test_loss_and_gradients_are_those_of_all_logits(count: int, scale: float) -> None:
    hidden, head, targets = problem(count)
    expected = reference(hidden, head, targets)
    wanted = torch.autograd.grad(expected * scale, (hidden, head))
    found = sum_cross_entropy(hidden, head, targets, IGNORED)
    assert found.dtype == torch.float32 and found.shape == ()
    torch.testing.assert_close(found, expected.float(), rtol=1e-6, atol=1e-6)
    gradients = torch.autograd.grad(found * scale, (hidden, head))
    for gradient, exact in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(gradient, exact, rtol=1e-5, atol=2e-6)


def test_gradients_are_the_differences_of_the_loss() -> None:
    hidden, head, targets = problem(9, torch.float64)
    gradients = torch.autograd.grad(
        sum_cross_entropy(hidden, head, targets, IGNORED) * 0.7, (hidden, head)
    )
    generator, step = torch.Generator().manual_seed(1), 1e-2
    for index, gradient in enumerate(gradients):
        way = torch.randn(gradient.shape, generator=generator, dtype=torch.float64)
        ends = []
        for sign in (1, -1):
            inputs = [hidden.detach(), head.detach()]
            inputs[index] = inputs[index] + sign * step * way
            ends.append(0.7 * reference(inputs[0], inputs[1], targets))
        slope = (ends[0] - ends[1]) / (2 * step)
        torch.testing.assert_close((gradient * way).sum(), slope, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("count", [7, 29])
def test_bf16_gradients_are_as_good_as_those_of_the_plain_path(
    count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden, head, targets = problem(count, torch.bfloat16)
    # The head as the product sees it, so that only the arithmetic is compared.
    head = head.detach().bfloat16().float().requires_grad_()
    exact = torch.autograd.grad(reference(hidden, head, targets), (hidden, head))

    def errors() -> list[float]:
        found = sum_cross_entropy(hidden, head, targets, IGNORED)
        gradients = torch.autograd.grad(found, (hidden, head))
        assert [g.dtype for g in gradients] == [torch.bfloat16, torch.float32]
        return [float((g - e).norm() / e.norm()) for g, e in zip(gradients, exact, strict=True)]

    chunked = errors()
    monkeypatch.setattr(loss, "LARGE_VOCABULARY", 1000)
    plain = errors()
    assert all(0 < c < 1.5 * p for c, p in zip(chunked, plain, strict=True)), (chunked, plain)
    assert max(chunked) < 2**-7


def test_scaling_a_bf16_gradient_rounds_once() -> None:
    hidden, head, targets = problem(29, torch.bfloat16)
    unit, scaled = (
        torch.autograd.grad(sum_cross_entropy(hidden, head, targets, IGNORED) * factor, hidden)[0]
        for factor in (1.0, 0.7)
    )
    assert torch.equal(scaled, (unit.double() * float(torch.tensor(0.7))).bfloat16())


def test_each_input_may_do_without_a_gradient() -> None:
    hidden, head, targets = problem(19)
    both = torch.autograd.grad(sum_cross_entropy(hidden, head, targets, IGNORED), (hidden, head))
    for index in (0, 1):
        inputs = [hidden.detach(), head.detach()]
        inputs[index].requires_grad_()
        sum_cross_entropy(*inputs, targets, IGNORED).backward()
        assert torch.equal(inputs[index].grad, both[index])
        assert inputs[1 - index].grad is None


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_evaluation_computes_the_same_loss_and_no_gradient(
    mode: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden, head, targets = problem(29)
    trained = sum_cross_entropy(hidden, head, targets, IGNORED)
    monkeypatch.setattr(loss.ChunkedCrossEntropy, "apply", None)
    with mode():
        found = sum_cross_entropy(hidden, head, targets, IGNORED)
    assert not found.requires_grad
    torch.testing.assert_close(found, trained.detach(), rtol=1e-6, atol=0)


def test_ignored_targets_have_no_gradient_and_all_may_be_ignored() -> None:
    hidden, head, targets = problem(29)
    sum_cross_entropy(hidden, head, targets, IGNORED).backward()
    untouched = (hidden.grad == 0).all(1)
    assert torch.equal(untouched, targets == IGNORED)
    hidden.grad = head.grad = None
    found = sum_cross_entropy(hidden, head, torch.full_like(targets, IGNORED), IGNORED)
    found.backward()
    assert found.item() == 0 and not hidden.grad.any() and not head.grad.any()


def test_extreme_logits_stay_finite() -> None:
    hidden, head, targets = problem(9)
    large = (hidden.detach() * 1e4).requires_grad_()
    found = sum_cross_entropy(large, head, targets, IGNORED)
    found.backward()
    torch.testing.assert_close(found, reference(large, head, targets).float(), rtol=1e-6, atol=0)
    assert large.grad.isfinite().all()


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements that a tensor with the vocabulary in its shape has had."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.vocabulary, self.rows, self.wide_rows = vocabulary, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.shape[-1:] == (self.vocabulary,):
            rows = out.numel() // self.vocabulary
            self.rows = max(self.rows, rows)
            if out.dtype == torch.float32:
                self.wide_rows = max(self.wide_rows, rows)
        return out


@pytest.mark.parametrize("gradients", [True, False])
def test_only_a_chunk_of_logits_and_a_block_in_fp32_exist_at_a_time(gradients: bool) -> None:
    hidden, head, targets = problem(40, torch.bfloat16)
    with torch.set_grad_enabled(gradients), LargestTensor(len(head)) as seen:
        sum_cross_entropy(hidden, head, targets, IGNORED)
    assert (seen.rows, seen.wide_rows) == (loss.CHUNK, loss.BLOCK)


def test_small_vocabularies_take_the_plain_path(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, head, targets = problem(9)
    monkeypatch.setattr(loss, "LARGE_VOCABULARY", len(head) + 1)
    monkeypatch.setattr(loss.ChunkedCrossEntropy, "apply", None)
    found = sum_cross_entropy(hidden, head, targets, IGNORED)
    torch.testing.assert_close(found, reference(hidden, head, targets).float(), rtol=1e-6, atol=0)


def test_a_tied_embedding_collects_both_of_its_gradients() -> None:
    tokens = torch.randint(61, (1, 12), generator=torch.Generator().manual_seed(0))
    results = []
    for plain in (True, False):
        _, head, targets = problem(12)
        hidden = F.embedding(tokens, head).flatten(0, 1).tanh()
        function = reference if plain else lambda *given: sum_cross_entropy(*given, IGNORED)
        (function(hidden, head, targets) / 11).backward()
        results.append(head.grad)
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-6)


def test_gradients_add_up_over_micro_batches_and_a_graph_serves_once() -> None:
    hidden, head, targets = problem(24)
    whole = torch.autograd.grad(sum_cross_entropy(hidden, head, targets, IGNORED) / 18, head)[0]
    for rows in (slice(0, 8), slice(8, 24)):
        (sum_cross_entropy(hidden[rows], head, targets[rows], IGNORED) / 18).backward()
    torch.testing.assert_close(head.grad, whole, rtol=1e-5, atol=1e-6)
    again = sum_cross_entropy(hidden, head, targets, IGNORED)
    again.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        again.backward()
