"""Generation: a cache against recomputing, 16 prompts against one, dtt against transformers.

All are greedy and never stop early, so every variant does the same number of tokens. Weights are
random; those of the comparison with transformers are the same in both.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from shapes import QUICK, SHAPES, Shape
from table import (
    median,
    note,
    parser,
    print_heading,
    print_table,
    ratio,
    read_peak,
    take_turns,
)

from dtt.generation import Sampling, stream_tokens
from dtt.model.decoder import Decoder

GREEDY = Sampling(temperature=0)
NEVER = -1
"""An end-of-text token that no model writes."""
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}

Prompts = list[list[int]]


def decoder(shape: Shape, dtype: torch.dtype, device: str = "cpu", **changes: Any) -> Decoder:
    """Return a random model as `load_run` prepares a trained one."""
    model = Decoder(shape.settings().model_copy(update=changes))
    model.init_weights(0)
    return model.for_generation(torch.device(device), dtype)


def prompts(shape: Shape, count: int, length: int) -> Prompts:
    """Return `count` different prompts of `length` tokens."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(shape.vocab, (count, length), generator=generator).tolist()


def cached(model: Decoder, given: Prompts, new: int) -> list[list[int]]:
    """Generate as `dtt generate` does; return the new tokens of each prompt."""
    rows = list(stream_tokens(model, given, new, GREEDY, seed=0, end=NEVER))
    return [
        [int(token) for token in column if token is not None] for column in zip(*rows, strict=True)
    ]


@torch.inference_mode()
def recomputed(model: Decoder, given: Prompts, new: int) -> list[list[int]]:
    """Generate without a cache: every token reads the whole text again."""
    context = model.settings.context
    tokens = torch.tensor(given, device=model.embed.weight.device)
    for _ in range(new):
        hidden = model.hidden(tokens[:, -context:])[:, -1]
        logits = torch.nn.functional.linear(hidden, model.head_weight.to(hidden.dtype))
        tokens = torch.cat([tokens, logits.argmax(-1, keepdim=True)], 1)
    return tokens[:, -new:].tolist()


def transformers_model(model: Decoder, dtype: torch.dtype) -> Any:
    """Return transformers' GPT-2 with the weights of dtt's model."""
    from transformers import GPT2Config, GPT2LMHeadModel

    s = model.settings
    config = GPT2Config(
        vocab_size=s.vocab_size,
        n_positions=s.context,
        n_embd=s.dim,
        n_layer=s.layers,
        n_head=s.heads,
        bos_token_id=0,
        eos_token_id=None,
    )
    theirs = GPT2LMHeadModel(config)
    names = {
        "attention_norm": "ln_1",
        "attention.qkv": "attn.c_attn",
        "attention.out": "attn.c_proj",
    }
    names |= {"mlp_norm": "ln_2", "mlp.up": "mlp.c_fc", "mlp.down": "mlp.c_proj"}
    state = {"wte.weight": model.embed.weight, "ln_f.weight": model.norm.weight}
    state |= {"wpe.weight": model.position_embed.weight, "ln_f.bias": model.norm.bias}
    for name, parameter in model.blocks.named_parameters():
        layer, rest = name.split(".", 1)
        part, _, kind = rest.rpartition(".")
        # transformers' GPT-2 keeps its matrices transposed.
        state[f"h.{layer}.{names[part]}.{kind}"] = (
            parameter.t() if parameter.ndim == 2 else parameter
        )
    theirs.transformer.load_state_dict({k: v.detach().float() for k, v in state.items()})
    return theirs.to(dtype=dtype, device=model.embed.weight.device).eval()


@torch.inference_mode()
def their_tokens(theirs: Any, given: Prompts, new: int) -> list[list[int]]:
    tokens = torch.tensor(given, device=theirs.device)
    out = theirs.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=new,
        do_sample=False,
        use_cache=True,
        eos_token_id=None,
        pad_token_id=0,
    )
    return out[:, tokens.shape[1] :].tolist()


def speed(call: Callable[[Prompts, int], list[list[int]]], given: Prompts, new: int) -> float:
    """Return new tokens per second, over all prompts and with reading them."""
    begin = time.perf_counter()
    out = call(given, new)
    seconds = time.perf_counter() - begin
    assert [len(row) for row in out] == [new] * len(given)
    return len(given) * new / seconds


def cache_table(shape: Shape, new: int, rounds: int, device: str = "cpu") -> None:
    """The cache against recomputing, and 16 prompts against one."""
    model = decoder(shape, torch.bfloat16, device)
    one, many = prompts(shape, 1, 1), prompts(shape, 16, 1)
    calls = {
        "recomputing, 1 prompt": lambda: speed(lambda p, n: recomputed(model, p, n), one, new),
        "cache, 1 prompt": lambda: speed(lambda p, n: cached(model, p, n), one, new),
        "cache, 16 prompts": lambda: speed(lambda p, n: cached(model, p, n), many, new),
    }
    cached(model, many, 2)
    found = take_turns(list(calls), lambda name: calls[name](), rounds)
    middle = [median(values) for values in found.values()]
    ratios = [None, ratio(middle[1], middle[0]), ratio(middle[2], middle[1])]
    against = ["", "to recomputing", "to one prompt"]
    rows = [
        [name, max(values), median(values), times, to]
        for (name, values), times, to in zip(found.items(), ratios, against, strict=True)
    ]
    print(f"### {shape.layers} layers x {shape.dim}, bf16, {new} new tokens\n")
    print_table(["variant", "tokens/s, best", "median", "ratio", ""], rows)


def transformers_table(
    shape: Shape, length: int, new: int, rounds: int, device: str = "cpu"
) -> None:
    """dtt against transformers' generate, with equal weights."""
    rows = []
    for label, dtype in DTYPES.items():
        ours = decoder(shape, dtype, device, activation="gelu_tanh")
        theirs = transformers_model(ours, dtype)
        for count in (1, 16):
            given = prompts(shape, count, length)
            makers = {
                "transformers": lambda p, n, m=theirs: their_tokens(m, p, n),
                "dtt": lambda p, n, m=ours: cached(m, p, n),
            }
            first = [makers[maker](given, 4) for maker in makers]  # warm-up
            same = sum(a == b for a, b in zip(*first, strict=True))
            note(f"{label}, {count} prompts: the first tokens of {same} are the same in both")
            found = take_turns(
                list(makers), lambda maker, m=makers, g=given: speed(m[maker], g, new), rounds
            )
            middle = {maker: median(values) for maker, values in found.items()}
            times = ratio(middle["dtt"], middle["transformers"])
            rows.append([label, count, middle["transformers"], middle["dtt"], times])
    print(f"### {shape.layers} layers x {shape.dim}, {length} + {new} tokens\n")
    print_table(["type", "prompts", "transformers, tokens/s", "dtt, tokens/s", "ratio"], rows)


def main() -> None:
    asked = parser(__doc__)
    asked.add_argument("--only", choices=["cache", "transformers"], help="one of the two tables")
    options = asked.parse_args()
    quick, rounds = options.quick, options.rounds or (1 if options.quick else 5)
    torch.set_num_threads(options.threads)
    print_heading("Generation", options.threads, quick)
    peak = read_peak(options.threads, quick=quick)
    count = SHAPES["gpt2-124m"].parameters()
    limits = [
        [f"124M weights in {d}", peak, peak * 1e9 / count / t.itemsize] for d, t in DTYPES.items()
    ]
    print_table(["limit: reading", "GB/s", "times per second"], limits)
    if options.only != "transformers":
        shape, new = (QUICK, 12) if quick else (SHAPES["nanogpt-10m"], 256)
        cache_table(shape, new, rounds)
    if options.only != "cache":
        shape, length, new = (QUICK, 4, 8) if quick else (SHAPES["gpt2-124m"], 32, 128)
        if quick:
            shape = Shape(**{**shape.__dict__, "bias": True})
        transformers_table(shape, length, new, rounds)


if __name__ == "__main__":
    main()
