"""What `prepare` costs, beside the tokenizer alone on the same text and SpecForge's preprocessing
of the same rows.

    python dev/compare_prepare.py --rows 2000                          # a look
    python dev/compare_prepare.py --rows 100000 --peer specforge       # the figures of RESULTS.md

Rows are made up: 1-6 turns of words and code from Python's own sources, lengths spread as in
ShareGPT. All contenders use the tokenizer of --tokenizer and as many processes as --num-proc, each
contender in a process tree of its own; time is CPU-seconds of that tree and wall seconds, memory
its largest resident set, summed over processes. `--peer specforge` wants `pip install --no-deps
specforge==0.2.0`; it is given a dataset in memory and a cache to write, as its trainer does.
"""

import argparse
import json
import multiprocessing
import os
import random
import re
import resource
import sysconfig
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer

from eagle3.config import Data
from eagle3.data import prepare, templates
from eagle3.data.chat import Chat
from eagle3.data.sources import Source, find_files, read_rows

ROOT = Path(prepare.__file__).parents[2]
TINY = ROOT / "eagle3" / "tiny" / "target"
MAX_LENGTH = 2048


def write_rows(path: Path, rows: int) -> None:
    """Conversations cut from Python's standard library, with lengths spread as in ShareGPT (about
    1,000 tokens).
    """
    sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    text = "".join(source.read_text(errors="ignore") for source in sources)
    randomly = random.Random(0)

    def passage(median: int) -> str:
        size = min(20_000, int(median * randomly.lognormvariate(0, 1)) + 8)
        start = randomly.randrange(len(text) - size)
        return text[start : start + size].strip() or "nothing"

    with path.open("w") as file:
        for number in range(rows):
            turns = []
            for _ in range(randomly.choice((1, 1, 1, 2, 2, 3, 4, 6))):
                turns += [
                    {"from": "human", "value": passage(180)},
                    {"from": "gpt", "value": passage(700)},
                ]
            file.write(json.dumps({"id": str(number), "conversations": turns}) + "\n")


def load_chat(tokenizer: str) -> Chat:
    """The template without `{% generation %}`, so that turns are found as they are for most
    tokenizers.
    """
    loaded = AutoTokenizer.from_pretrained(tokenizer)
    loaded.chat_template = re.sub(r"{%-?\s*(end)?generation\s*-?%}", "", templates.read("llama3"))
    chat = Chat(loaded)
    assert not chat.marked
    return chat


def default_data(num_proc: int) -> Data:
    """The section `data` with the values that conf/ has."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        overrides = ["name=compare", "model=hf", "model.path=x", f"data.max_length={MAX_LENGTH}"]
        composed = compose("run", [*overrides, f"data.num_proc={num_proc}"])
    return OmegaConf.to_object(composed.data)


def ours(path: Path, tokenizer: str, num_proc: int) -> dict:
    chat, source = load_chat(tokenizer), Source(str(path))
    vocab_size = len(chat.tokenizer)
    data = default_data(num_proc)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        sources = [(source, find_files(source, folder))]
        sizes = (vocab_size, min(32000, vocab_size))
        facts = prepare.prepare(data, 64, *sizes, sources, chat, folder, write=True).facts
    return {"conversations": facts["documents"] + facts["held_out_rows"], "tokens": facts["tokens"]}


def tokenizer_alone(path: Path, tokenizer: str, num_proc: int) -> dict:
    """Texts that are rendered already, in batches, through the tokenizer's own call; the ids are
    thrown away.
    """
    texts = path.with_suffix(".rendered")
    if not texts.exists():
        chat = load_chat(tokenizer)
        with texts.open("w") as file:
            for row in read_rows(find_files(Source(str(path)), "")):
                file.write(json.dumps(chat.render(row.conversation.messages)[0]) + "\n")
    with (
        multiprocessing.get_context("fork").Pool(num_proc, load_tokenizer, (tokenizer,)) as pool,
        texts.open() as file,
    ):
        batches = iter(lambda: [json.loads(line) for _, line in zip(range(128), file)], [])
        counts = list(pool.imap(count_tokens, batches))
    return {
        "conversations": sum(n for n, _ in counts),
        "tokens": sum(tokens for _, tokens in counts),
    }


def load_tokenizer(path: str) -> None:
    global alone
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    alone = AutoTokenizer.from_pretrained(path)


def count_tokens(texts: list[str]) -> tuple[int, int]:
    return len(texts), sum(map(len, alone(texts, add_special_tokens=False)["input_ids"]))


def specforge(path: Path, tokenizer: str, num_proc: int) -> dict:
    import datasets
    from specforge.data.preprocessing import build_eagle3_dataset

    rows = datasets.load_dataset(
        "json", data_files=str(path), split="train", cache_dir=str(path.parent / "hf")
    )
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = build_eagle3_dataset(
            rows,
            load_chat(tokenizer).tokenizer,
            "llama3",
            MAX_LENGTH,
            num_proc=num_proc,
            cache_dir=folder,
            cache_key="c",
        )
        return {"conversations": len(made), "tokens": 0}


CONTENDERS = {"tokenizer": tokenizer_alone, "prepare": ours, "specforge": specforge}


def resident(pid: int) -> int:
    """Bytes of a process and its descendants that no other process shares, and those it shares by
    their part (PSS).
    """
    total, waiting = 0, [pid]
    while waiting:
        process = waiting.pop()
        try:
            rollup = Path(f"/proc/{process}/smaps_rollup").read_text()
            total += 1024 * sum(
                int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:")
            )
            waiting += map(
                int, Path(f"/proc/{process}/task/{process}/children").read_text().split()
            )
        except OSError:
            continue
    return total


def measure(name: str, path: Path, tokenizer: str, num_proc: int) -> dict:
    """Run a contender in a fresh process; seconds, CPU-seconds and peak memory of its tree, its
    imports left out.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        pid = pool.submit(os.getpid).result()
        pool.submit(CONTENDERS[name], path.with_name("warm.jsonl"), tokenizer, num_proc).result()
        before, peak, done = pool.submit(cpu_seconds).result(), [0], threading.Event()

        def watch() -> None:
            while not done.wait(0.2):
                peak[0] = max(peak[0], resident(pid))

        watcher = threading.Thread(target=watch)
        watcher.start()
        started = time.time()
        result = pool.submit(CONTENDERS[name], path, tokenizer, num_proc).result()
        result |= {"wall": time.time() - started}
        done.set()
        watcher.join()
        return result | {"cpu": pool.submit(cpu_seconds).result() - before, "bytes": peak[0]}


def cpu_seconds() -> float:
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--num-proc", type=int, default=2)
    parser.add_argument("--peer", nargs="*", choices=["specforge"], default=[])
    parser.add_argument(
        "--tokenizer",
        default=str(TINY),
        help="a folder or hub id; the embedded one has 2,048 tokens",
    )
    parser.add_argument("--folder", type=Path, help="where to keep the rows, to use them again")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.folder or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"rows_{arguments.rows}.jsonl"
        write_rows(folder / "warm.jsonl", 300)
        if not path.exists():
            write_rows(path, arguments.rows)
        tokenizer_alone(
            path, arguments.tokenizer, arguments.num_proc
        )  # renders the texts, which is not measured
        results = {
            name: measure(name, path, arguments.tokenizer, arguments.num_proc)
            for name in ("tokenizer", "prepare", *arguments.peer)
        }
    table = Table(
        "", "conversations/s", "CPU-seconds", "against the tokenizer", "wall seconds", "peak memory"
    )
    for name, result in results.items():
        table.add_row(
            name,
            f"{result['conversations'] / result['wall']:,.0f}",
            f"{result['cpu']:.1f}",
            f"{result['cpu'] / results['tokenizer']['cpu']:.2f}x",
            f"{result['wall']:.1f}",
            f"{result['bytes'] / 1e6:,.0f} MB",
        )
    console = Console()
    console.print(table)
    console.print(
        f"{arguments.rows:,} rows, {results['tokenizer']['tokens']:,} tokens, "
        f"{arguments.num_proc} processes"
    )
    if "specforge" in results:
        ratio = results["specforge"]["cpu"] / results["prepare"]["cpu"]
        console.print(f"SpecForge / prepare, CPU-seconds: {ratio:.1f}x")


if __name__ == "__main__":
    main()
