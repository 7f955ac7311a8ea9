"""Train on a text file from Python, then let the model write.

python examples/own_text.py book.txt
"""

import sys

from dtt import Config, generate, load_run, train


def main(path: str, steps: int = 500) -> None:
    config = Config.model_validate(
        {
            "name": "from-python",
            "data": {"source": {"name": "text", "path": path}},
            "tokenizer": {"name": "char"},
            "training": {"max_steps": steps},
            "sample": {"prompts": []},
        }
    )
    trained = train(config)
    print(f"step {trained.step}, validation loss {trained.best_loss:.3f}")

    run = load_run(trained.folder)
    for text in generate(run, ["The ", "And "], max_length=100, seed=1):
        print("---", text, sep="\n")


if __name__ == "__main__":
    if not sys.argv[1:]:
        raise SystemExit("usage: python examples/own_text.py FILE [STEPS]")
    main(sys.argv[1], *(int(steps) for steps in sys.argv[2:3]))
