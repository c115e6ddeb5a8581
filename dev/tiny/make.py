"""Makes everything in this folder: `python -m dev.tiny.make --work DIR
[corpus|tokenizer|train|answers]`.
"""

import argparse
import json
from pathlib import Path

from transformers import AutoTokenizer

from dev.tiny.answers import make_answers
from dev.tiny.corpus import conversations
from dev.tiny.tokenizer import save_tokenizer, train_tokenizer
from dev.tiny.train import train, write_rows

HERE = Path(__file__).parent
STEPS = ["corpus", "tokenizer", "train", "answers"]


def read_rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--work", type=Path, required=True, help="folder for the corpus and the training state"
    )
    parser.add_argument(
        "--out", type=Path, default=HERE, help="where target/ and the two JSONL files go"
    )
    parser.add_argument(
        "steps", nargs="*", default=STEPS, help=f"of {', '.join(STEPS)}; all by default"
    )
    options = parser.parse_args()
    work, target = options.work, options.out / "target"
    work.mkdir(parents=True, exist_ok=True)
    if "corpus" in options.steps:
        training, held_out = conversations()
        write_rows(work / "training.jsonl", training)
        write_rows(work / "held_out.jsonl", held_out)
    training, held_out = read_rows(work / "training.jsonl"), read_rows(work / "held_out.jsonl")
    if "tokenizer" in options.steps:
        save_tokenizer(train_tokenizer(training), target)
    tokenizer = AutoTokenizer.from_pretrained(target)
    if "train" in options.steps:
        train(tokenizer, training, held_out, work, target)
    if "answers" in options.steps:
        make_answers(tokenizer, training, held_out, options.out)


if __name__ == "__main__":
    main()
