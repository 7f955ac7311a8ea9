"""How many of a model's stories does the grammar of `tales` accept?

dtt train -n demo
python examples/flawless_tales.py runs/demo
"""

import sys

from dtt import generate, load_run
from dtt.data.tales import bits


def main(path: str, count: int = 20) -> None:
    run = load_run(path)
    stories = generate(run, [""] * count, max_length=300, temperature=1.0, seed=1)
    flawless, reach = 0, 0.0
    for story in stories:
        try:
            bits(story)
            flawless, reach = flawless + 1, reach + 1.0
        except ValueError as error:
            # "... character 312, at '...'": where the story first leaves the grammar
            place = int(str(error).split("character ")[1].split(",")[0])
            reach += place / max(len(story), 1)
    share = f"{reach / count:.0%}"
    print(f"{flawless} of {count} stories are flawless; on average {share} of a story is right")


if __name__ == "__main__":
    if not sys.argv[1:]:
        raise SystemExit("usage: python examples/flawless_tales.py RUN [STORIES]")
    main(sys.argv[1], *(int(count) for count in sys.argv[2:3]))
