"""Ways to train a draft against EAGLE3 and `loss=kl`, at equal data, paired over seeds and prompts.

    python dev/compare_recipes.py --seeds 5                      # all recipes, the embedded target
    python dev/compare_recipes.py --recipes mix --add 'both=draft=eagle31 loss=mix'
    python dev/compare_recipes.py --seeds 2 experiment=smollm2-135m data.path=prompts.jsonl

Words at the end are overrides of run.py for all runs. Each cell, a recipe and a seed, is a run in
FOLDER/RECIPE/SEED up to its training; one that has ended is not repeated, one that was interrupted
goes on. The table is printed, and written to FOLDER/table.md, after every cell; with `--table` from
what is there alone. Every seed sees the same conversations in the same order in all recipes.

Differences are of acceptance lengths at `eval.draft_length`, on the same answers, of runs of the
same seed. Their 95 % interval adds up two variances: of the seeds (Student's t of the paired
differences) and of the prompts (bootstrap of the mean over the seeds).
"""

import argparse
import json
import math
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import torch

from eagle3.config import Model, compose_flat
from eagle3.target.spec import read_spec

ROOT = Path(__file__).parents[1]
EAGLE3, EAGLE31 = (f"draft={draft} loss/weights=powers" for draft in ("eagle3", "eagle31"))
DSPARK = "draft=dspark draft.block=5 loss=mix loss/weights=powers train.max_grad_norm=4"
RECIPES = {
    "eagle3": EAGLE3,
    "specforge": f"{EAGLE3} loss/mask=shifted draft/initial=drawn",  # its schedule is ours
    "shifted": f"{EAGLE3} loss/mask=shifted",
    "random": f"{EAGLE3} draft/initial=random",
    "eagle31": EAGLE31,
    "eagle31-random": f"{EAGLE31} draft/initial=random",
    "eagle31-reached": "draft=eagle31 loss/weights=reached",
    "layers5": f"{EAGLE3} LAYERS5",
    "eagle31-layers5": f"{EAGLE31} LAYERS5",
    "lk": f"{EAGLE3} loss=lk",
    "tv": f"{EAGLE3} loss=tv",
    "nla": f"{EAGLE3} loss=nla",
    "reverse_kl": f"{EAGLE3} loss=reverse_kl",
    "jsd": f"{EAGLE3} loss=jsd",
    "mix": f"{EAGLE3} loss=mix",
    "reached": "draft=eagle3 loss/weights=reached",
    "gamma1": f"{EAGLE3} loss.gamma=1",
    "dflash": "draft=dflash draft.block=6 loss/weights=powers train.max_grad_norm=4",
    "dspark": DSPARK,
}
AFTER = {"export", "check", "benchmark"}  # stages that the table does not need
T975 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)  # by degrees of freedom, from 1
RESAMPLES = 2000


def shared_overrides(given: list[str]) -> tuple[list[str], str]:
    """Overrides of all runs, and what LAYERS5 stands for: five layers, evenly from 1 to L - 3."""
    values = compose_flat(given)
    model = {name: values[f"model.{name}"] for name in Model.__annotations__}
    last = read_spec(Model(**model)).num_layers - 4
    layers = ",".join(str(round(1 + step * last / 4)) for step in range(5))
    stages = ",".join(stage for stage in values["stages"] if stage not in AFTER)
    return [*given, f"stages=[{stages}]"], f"model.aux_layer_ids=[{layers}]"


def run_cell(folder: Path, overrides: list[str]) -> str:
    """Train, or go on; returns what went wrong, "" for nothing."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "run.py", f"hydra.run.dir={folder.absolute()}", *overrides]
    with (folder.parent / f"{folder.name}.log").open("a") as log:
        run = subprocess.run(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, text=True)
    if run.returncode == 0:
        return ""
    said = Path(log.name).read_text().strip().splitlines()
    errors = [line for line in said if line.startswith("error: ")]
    return f"{folder} ended with {run.returncode}: {(errors or said)[-1]}"


def read_cells(folder: Path, name: str) -> dict[int, dict[str, torch.Tensor]]:
    """By seed and temperature: tokens and rounds of every answer, float64 [2,P]."""
    cells = {}
    for path in sorted(folder.glob(f"{name}/*/evaluation.json")):
        evaluation = json.loads(path.read_text())
        at = {"0": evaluation} | evaluation["sampled"]
        cells[int(path.parent.name)] = {
            temperature: torch.tensor([each["tokens"], each["rounds"]], dtype=torch.float64)
            for temperature, each in at.items()
        }
    return cells


def lengths(counts_SxP: torch.Tensor) -> torch.Tensor:
    """[S,2,P] -> acceptance lengths [S]."""
    tokens_S, rounds_S = counts_SxP.sum(-1).unbind(-1)
    return tokens_S / rounds_S


def compare(ours: torch.Tensor, others: torch.Tensor) -> tuple[float, float]:
    """Mean difference of the lengths of [S,2,P] and [S,2,P], and half of its 95 % interval."""
    apart_S = lengths(ours) - lengths(others)
    prompts = ours.shape[-1]
    generator = torch.Generator().manual_seed(0)
    picked = torch.randint(prompts, (RESAMPLES, prompts), generator=generator)
    means = [(lengths(ours[..., p]) - lengths(others[..., p])).mean() for p in picked]
    variance = 1.96**2 * float(torch.stack(means).var())
    if len(apart_S) == 1:
        return float(apart_S[0]), math.sqrt(variance)
    quantile = T975[min(len(apart_S) - 1, len(T975)) - 1]
    variance += quantile**2 * float(apart_S.var()) / len(apart_S)
    return float(apart_S.mean()), math.sqrt(variance)


def table(folder: Path, recipes: dict[str, str], base: str) -> str:
    """Markdown: a row a recipe, against `base` over the seeds that both have."""
    base_cells = read_cells(folder, base)
    temperatures = list(next(iter(base_cells.values()), {}))
    titles = ["recipe", "overrides", "seeds"]
    titles += [f"T {t}{words}" for t in temperatures for words in ("", " against " + base)]
    titles += [f"T {t} / T 0" for t in temperatures[1:]]
    lines = [titles, ["---"] * len(titles)]
    for name, overrides in recipes.items():
        cells = read_cells(folder, name)
        seeds = sorted(cells.keys() & base_cells.keys())
        if not seeds:
            continue
        row, means = [name, f"`{overrides}`" if overrides else "", str(len(seeds))], []
        for t in temperatures:
            ours, others = (torch.stack([c[s][t] for s in seeds]) for c in (cells, base_cells))
            means.append(float(lengths(ours).mean()))
            row.append(f"{means[-1]:.3f}")
            if name == base:
                row.append("")
                continue
            apart, half = compare(ours, others)
            percent = apart / float(lengths(others).mean())
            row.append(f"{apart:+.3f} ± {half:.3f} ({percent:+.1%})")
        lines.append(row + [f"{mean / means[0]:.3f}" for mean in means[1:]])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("outputs/recipes"))
    parser.add_argument("--recipes", default="", metavar="NAME,NAME")
    parser.add_argument("--add", action="append", default=[], metavar="NAME=OVERRIDES")
    parser.add_argument("--base", default="eagle3", help="what differences are against")
    parser.add_argument("--seeds", type=int, default=5, help="seeds 0, 1, ...")
    parser.add_argument("--processes", type=int, default=2, help="runs at a time")
    parser.add_argument("--table", action="store_true", help="only show what is there")
    options, given = parser.parse_known_args()
    recipes = RECIPES | dict(each.split("=", 1) for each in options.add)
    added = [each.split("=", 1)[0] for each in options.add]
    named = [name for name in options.recipes.split(",") if name]
    chosen = [*named, *added] or list(recipes)
    if unknown := {*chosen, options.base} - recipes.keys():
        parser.error(f"{', '.join(unknown)}: no recipe; there are {', '.join(recipes)}")
    shared, layers5 = shared_overrides(given)
    recipes = {name: recipes[name].replace("LAYERS5", layers5) for name in recipes}
    cells = [
        (options.folder / name / str(seed), [*shared, *recipes[name].split(), f"seed={seed}"])
        for seed in range(options.seeds)  # all recipes of a seed first: pairs are there early
        for name in dict.fromkeys([options.base, *chosen])
    ]
    waiting = [cell for cell in cells if not (cell[0] / "evaluation.json").exists()]
    failures = []
    with ThreadPoolExecutor(options.processes) as pool:
        runs = [pool.submit(run_cell, *cell) for cell in waiting if not options.table]
        try:
            for number, run in enumerate(as_completed(runs), start=1):
                failures += filter(None, [run.result()])
                text = table(options.folder, recipes, options.base)
                (options.folder / "table.md").write_text(text)
                print(f"{number} of {len(runs)} runs\n{text}", *failures, sep="\n", flush=True)
        except KeyboardInterrupt:  # which the runs have heard too: they keep what they have
            pool.shutdown(cancel_futures=True)
            raise
    if not runs:
        print(table(options.folder, recipes, options.base))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
