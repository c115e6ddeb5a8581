"""Measures on a CUDA device what dev/roofline predicts, in under ten minutes.

    bash launch/gpu_check.sh                                    # into outputs/gpu_check
    INSTALL=0 PYTHON=python3 bash launch/gpu_check.sh --minutes 8
    bash launch/gpu_check.sh --tiny                             # tiny shapes, with or without a GPU

A step of a draft for Llama-3.1-8B with plain and with fused kernels at 60, 90 and 100 % supervised,
each the median of 10 updates of a real trainer; then the GPU tests, other losses and sizes, the
target's prefill, online training, the costliest kernels beside their predictions, and other blocks
and warps. results.json is written after every part, speed.md has the table for docs/speed.md. A
part that fails is named, and the rest goes on; the exit code is 1 then.
"""

import argparse
import gc
import json
import statistics
import subprocess
import sys
import time
import traceback
import warnings
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise, product, starmap
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "dev" / "roofline")]

from workload import LLAMA, Documents, Work, make_target, make_trainer  # noqa: E402

from eagle3.draft.initial import draft_config  # noqa: E402
from eagle3.parallel.ranks import set_up_process  # noqa: E402
from eagle3.runs.metrics import peak_memory_bytes  # noqa: E402

# What others have published for training at these shapes, tokens/s on one GPU.
PEERS = {
    "speculators, 7 steps, as published": "about 18,000",
    "SpecForge, offline, as published": "2,500-8,000",
}
# One process predicts all, as importing takes longest.
PREDICT = """
import json, sys
sys.path.insert(0, "dev/roofline")
import sim
for arguments in json.loads(sys.argv[1]):
    print(json.dumps(sim.predict(sim.parse(["--json", *arguments]))[1]), flush=True)
"""
SAME = {"aten::_to_copy": "aten::copy_", "aten::clone": "aten::copy_"}  # names in the profiler
COSTLIEST = 20


@dataclass
class Check:
    """Where it runs, until when, and what it has found."""

    device: torch.device
    tiny: bool
    repeats: int
    ends: float  # of time.monotonic
    folder: Path
    results: dict = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)

    def part(self, name: str, seconds: float, run: Callable, *given) -> None:
        """Run it, if it will be done in time, and keep what it returns; or why it failed."""
        if time.monotonic() + seconds > self.ends:
            print(f"{name}: left out, as about {seconds:.0f} s are needed")
            return
        began = time.monotonic()
        try:
            self.results[name] = run(self, *given)
        except Exception as error:
            traceback.print_exc()
            self.failed.append(name)
            self.results[name] = {"failed": f"{type(error).__name__}: {error}"[:500]}
        self.free()
        found, spent = self.results[name], time.monotonic() - began
        rate = f"{found['tokens_per_second']:,} tokens/s, " if "tokens_per_second" in found else ""
        print(f"{name}: {rate}in {spent:.1f} s", flush=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "results.json").write_text(json.dumps(self.results, indent=1))

    def work(self, supervised: float, kernels: str, *overrides: str, **sizes) -> Work:
        given = [f"draft/kernels={kernels}", *overrides]
        if self.tiny:
            small = {"model": ROOT / "eagle3" / "tiny" / "target", "tokens": 256, "length": 64}
            given += ["draft.vocab_size=1024", "loss.chunk_rows=64"]
            return Work(**small | sizes, supervised=supervised, overrides=given)
        return Work(LLAMA, **sizes, supervised=supervised, overrides=given)

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def mark(self):
        """This moment, on the device."""
        if self.device.type == "cuda":
            return torch.cuda.current_stream().record_event(torch.cuda.Event(enable_timing=True))
        return time.perf_counter()

    def free(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def machine(check: Check) -> dict:
    """Its name, and the rates that the simulator's profiles assume."""
    found = {"torch": torch.__version__, "device": "CPU"}
    if check.device.type != "cuda":
        return found
    a = torch.randn(16384, 4096, dtype=torch.bfloat16, device=check.device)
    b = torch.randn(4096, 14336, dtype=torch.bfloat16, device=check.device)
    large = torch.empty(1 << 30, dtype=torch.uint8, device=check.device)
    copied = torch.empty_like(large)
    pageable = torch.zeros(1 << 28, dtype=torch.uint8)
    pinned = pageable.pin_memory()
    rates = {
        "product TFLOP/s": (lambda: a @ b, 2 * 16384 * 4096 * 14336 / 1e12),
        "device copy TB/s": (lambda: copied.copy_(large), 2 * large.nbytes / 1e12),
        "pinned copy GB/s": (lambda: copied[: 1 << 28].copy_(pinned), pinned.nbytes / 1e9),
        "pageable copy GB/s": (lambda: copied[: 1 << 28].copy_(pageable), pinned.nbytes / 1e9),
    }
    for name, (call, amount) in rates.items():
        found[name] = round(amount / (statistics.median(milliseconds(check, call)[0]) / 1e3), 2)
    return found | {"device": torch.cuda.get_device_name(), "cuda": torch.version.cuda}


def milliseconds(check: Check, call: Callable, warm: int = 3) -> tuple[list[float], list[float]]:
    """Of each of the repeats: from end to end on the device, and until the host had issued it."""
    for _ in range(warm):
        call()
    check.wait()
    issued, marks = [], [check.mark()]
    for _ in range(check.repeats):
        began = time.perf_counter()
        call()
        issued.append(1e3 * (time.perf_counter() - began))
        marks.append(check.mark())
    check.wait()
    if check.device.type == "cuda":
        return list(starmap(torch.cuda.Event.elapsed_time, pairwise(marks))), issued
    return [1e3 * (b - a) for a, b in pairwise(marks)], issued


def prepare(check: Check, work: Work) -> tuple:
    """A trainer, the target if the work has one, and the batches of each update."""
    config, spec = work.config()
    target = None if work.stored else make_target(config, spec, check.device)
    documents = Documents(work, config, spec, random=True)
    trainer = make_trainer(config, spec, documents, target, check.device)
    return trainer, target, iter(trainer.loader)


def prepared_update(check: Check, work: Work) -> Callable:
    """A function that trains on the next batch."""
    trainer, _, updates = prepare(check, work)
    return lambda: trainer.train_update(next(updates), waited=0.0)


def step(check: Check, work: Work) -> dict:
    update = prepared_update(check, work)
    for _ in range(2):  # compiles, and makes the optimiser's moments
        update()
    check.wait()
    if check.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times, issued = milliseconds(check, update, warm=1)
    found = measured(work, times) | {
        "host_milliseconds": round(statistics.median(issued), 2),
        "peak_gib": round(peak_memory_bytes(check.device) / 2**30, 2),
    }
    if check.device.type == "cuda":
        found["reserved_gib"] = round(torch.cuda.max_memory_reserved() / 2**30, 2)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            update()
            torch.cuda.set_sync_debug_mode("default")
        found["syncs"] = sum("synchroniz" in str(each.message) for each in said)
    return found


def measured(work: Work, times: list[float]) -> dict:
    median = statistics.median(times)
    return {
        "tokens": work.tokens,
        "supervised": work.supervised,
        "milliseconds": round(median, 2),
        "spread": [round(min(times), 2), round(max(times), 2)],
        "tokens_per_second": round(1e3 * work.tokens / median),
    }


def prefill(check: Check, work: Work) -> dict:
    _, target, updates = prepare(check, work)
    [batch] = next(updates)
    batch = batch.to(check.device)
    return measured(work, milliseconds(check, lambda: target(batch))[0]) | {"way": target.way}


def tests(check: Check) -> dict:
    files = [p for p in sorted(ROOT.glob("tests/test_*.py")) if "mark.gpu" in p.read_text()]
    command = [sys.executable, "-m", "pytest", "--gpu", "-m", "gpu", *map(str, files)]
    command += ["--collect-only"] * (check.device.type != "cuda")
    most = max(30.0, min(240.0, check.ends - time.monotonic()))
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=most)
    lines = done.stdout.strip().splitlines()
    if done.returncode:
        raise RuntimeError("\n".join(lines[-30:]))
    return {"pytest": lines[-1]}


def costliest(check: Check, work: Work) -> list[dict]:
    """The operators that take the most time on the device, those alike in their shapes together."""
    update, rounds, sizes = prepared_update(check, work), 2, sizes_of(work)
    for _ in range(3):
        update()
    check.wait()
    with torch.profiler.profile(record_shapes=True) as profiler:
        for _ in range(rounds):
            update()
        check.wait()
    groups = defaultdict(lambda: {"calls": 0, "milliseconds": 0.0, "kernel": ""})
    for event in profiler.events():
        spent = sum(kernel.duration for kernel in event.kernels)
        if check.device.type != "cuda" and event.name.startswith("aten::"):
            spent = event.self_cpu_time_total
        if spent:
            owner = owner_of(event)
            row = groups[key(owner.name, flat(owner.input_shapes or []), sizes)]
            row["milliseconds"] += spent / 1e3 / rounds
            row["calls"] += 1 / rounds
            longest = max(event.kernels, key=lambda kernel: kernel.duration, default=None)
            row["kernel"] = longest.name[:60] if longest else ""
    rows = [{"operator": name} | row for name, row in groups.items()]
    return sorted(rows, key=lambda row: -row["milliseconds"])[:COSTLIEST]


def owner_of(event):
    """The operator of this project that an event is part of, else torch's."""
    torchs, at = event, event
    while at is not None:
        if at.name.startswith("eagle3::"):
            return at
        if not torchs.name.startswith("aten::"):
            torchs = at
        at = at.cpu_parent
    return torchs


def flat(shapes: list) -> list[list[int]]:
    """Shapes of all tensors, those in lists too."""
    found = []
    for shape in shapes:
        found += flat(shape) if shape and isinstance(shape[0], list) else [shape]
    return found


def sizes_of(work: Work) -> set[int]:
    """Those that the model has; others count rows."""
    config, spec = work.config()
    shape = draft_config(config.draft, spec.config, len(spec.aux_layer_ids))
    queries = shape.num_attention_heads * shape.head_dim
    keys = shape.num_key_value_heads * shape.head_dim
    sizes = {*range(9), queries, keys, 2 * keys, queries + 2 * keys, *vars(shape).values()}
    sizes |= {2 * shape.hidden_size, shape.aux_size, 2 * shape.intermediate_size}
    return sizes | {shape.head_dim // 2}


def key(name: str, shapes: list[list[int]], sizes: set[int]) -> str:
    """As the rows are fewer from step to step, they are n here."""
    different = {tuple(n if n in sizes else "n" for n in shape) for shape in shapes if shape}
    texts = sorted(f"[{', '.join(map(str, shape))}]" for shape in different)
    return f"{SAME.get(name, name).removeprefix('aten::')} {' '.join(texts)}"


class Arguments(TorchDispatchMode):
    """The first call of each operator of this project: the largest, as rows become fewer."""

    def __init__(self):
        super().__init__()
        self.calls = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name
        if name.startswith("eagle3::"):
            self.calls.setdefault(name.removeprefix("eagle3::"), (function, args, kwargs or {}))
        return function(*args, **(kwargs or {}))


def candidates(check: Check, work: Work) -> list[dict]:
    """Each Triton kernel at the step's own arguments, with other blocks and warps."""
    from eagle3.kernels import jit

    update = prepared_update(check, work)
    update()
    with Arguments() as seen:
        update()
    rows = []
    constants = {name for name in vars(jit) if name.endswith(("_BLOCK", "_WARPS"))}
    for prefix in sorted({name.rpartition("_")[0] for name in constants}):
        names = sorted(name for name in constants if name.rpartition("_")[0] == prefix)
        chosen = [getattr(jit, name) for name in names]
        choices = [
            [1, 2, 4, 8, 16] if name.endswith("_WARPS") else [value // 2, value, 2 * value]
            for name, value in zip(names, chosen)
        ]
        operators = [name for name in seen.calls if name.startswith(prefix.lower())]
        for name, values in product(operators, product(*choices)):
            if time.monotonic() > check.ends:
                break
            function, args, kwargs = seen.calls[name]
            row = {"name": name, **dict(zip(names, values)), "chosen": list(values) == chosen}
            for constant, value in zip(names, values):
                setattr(jit, constant, value)
            try:
                times = milliseconds(check, lambda: function(*args, **kwargs))[0]  # noqa: B023
                row["milliseconds"] = round(statistics.median(times), 4)
            except Exception as error:  # more than the device has
                row["failed"] = str(error)[:100]
            rows.append(row)
        for constant, value in zip(names, chosen):
            setattr(jit, constant, value)
    return rows


def predict(check: Check, works: dict[str, Work]) -> dict[str, dict]:
    arguments = []
    for name, work in works.items():
        given = [f"--model={work.model}", f"--tokens={work.tokens}", f"--length={work.length}"]
        given += [f"--supervised={work.supervised}"]
        kind = name.partition(",")[0]
        given += {"prefill": ["--prefill"], "online": ["--online"]}.get(kind, [])
        given += ["--operators"] * (name == next(iter(works)))
        arguments.append(given + work.overrides)
    command = [sys.executable, "-c", PREDICT, json.dumps(arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    if done.returncode:
        print(f"no prediction of {list(works)[len(lines)]}: {done.stderr.strip()[-300:]}")
    return dict(zip(works, map(json.loads, lines)))


def table(check: Check, works: dict[str, Work], predicted: dict[str, dict]) -> str:
    """For docs/speed.md."""
    found, first = check.results, next(iter(works))
    where = f"{found['machine'].get('device')}, torch {torch.__version__}"
    heading = (
        "what | tokens/s measured | predicted | ms | GiB measured | predicted | host ms | syncs"
    )
    lines = [f"{where}; {works[first].model.name}", "", f"| {heading} |", "|---" * 8 + "|"]
    for name in works:
        row, guess = found.get(name, {}), predicted.get(name, {})
        if "milliseconds" in row:
            cells = [name, f"{row['tokens_per_second']:,}"]
            cells += [f"{guess['likely_tokens_per_second']:,}" if guess else "-"]
            cells += [row["milliseconds"], row.get("peak_gib", "-"), guess.get("peak_gib", "-")]
            cells += [row.get("host_milliseconds", "-"), row.get("syncs", "-")]
            lines.append(f"| {' | '.join(map(str, cells))} |")
    lines += [f"| {name} | {rate} |" + " |" * 6 for name, rate in PEERS.items()]
    guesses, sizes = defaultdict(float), sizes_of(works[first])
    for row in predicted.get(first, {}).get("operators", []):
        guesses[key(row["name"], row["shapes"], sizes)] += row["milliseconds"]
    lines += ["", f"| costliest of {first} | calls | ms measured | predicted | kernel |"]
    lines.append("|---" * 5 + "|")
    profile = found.get("costliest", [])
    for row in profile if isinstance(profile, list) else ():
        name, spent = row["operator"], f"{row['milliseconds']:.2f}"
        guess = f"{guesses[name]:.2f}" if name in guesses else "-"
        lines.append(f"| {name} | {row['calls']:.0f} | {spent} | {guess} | {row['kernel']} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tiny", action="store_true", help="shapes that a CPU can do")
    parser.add_argument("--minutes", type=float, default=9.5, help="parts beyond are left out")
    parser.add_argument("--repeats", type=int, default=10, help="updates measured of each")
    parser.add_argument("--folder", type=Path, default=Path("outputs/gpu_check"))
    options, cuda = parser.parse_args(), torch.cuda.is_available()
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11):
        sys.exit(f"error: torch {torch.__version__} is too old; this needs 2.11 or newer")
    if not cuda and not options.tiny:
        sys.exit("error: torch sees no CUDA device; --tiny shows on a CPU that the script runs")
    device, ends = torch.device("cuda" if cuda else "cpu"), time.monotonic() + 60 * options.minutes
    check = Check(device, options.tiny, options.repeats, ends, options.folder)
    choices, works = ("fused", "eager") if cuda else ("eager",), {}
    best = choices[0]
    for kernels, share in product(choices, (0.6, 0.9, 1.0)):
        works[f"step, {kernels}, {100 * share:.0f} %"] = check.work(share, kernels)
    main_table = list(works)
    works["step, 60 %, lk"] = check.work(0.6, best, "loss=lk")
    for tokens in () if options.tiny else (2048, 32768):
        works[f"step, 60 %, {tokens:,} tokens"] = check.work(0.6, best, tokens=tokens)
    for kernels in choices:
        given = best, f"target.kernels={kernels}"
        works[f"prefill, {kernels}"] = check.work(0.6, *given, stored=False)
    for share in (0.6, 1.0):
        works[f"online, {100 * share:.0f} %"] = check.work(share, best, stored=False)

    set_up_process(works[main_table[0]].config()[0])  # which sets the allocator
    if cuda:
        torch.cuda.init()  # from here on memory for copies is pinned
    check.part("machine", 5, machine)
    with ThreadPoolExecutor(1) as beside:
        predicting = beside.submit(predict, check, works)
        for name in main_table:
            check.part(name, 15, step, works[name])
        check.part("tests", 45, tests)
        for name in list(works)[len(main_table) :]:
            check.part(name, 20, prefill if name.startswith("prefill") else step, works[name])
        check.part("costliest", 20, costliest, works[main_table[0]])
        if cuda:
            check.part("candidates", 40, candidates, works[main_table[0]])
        predicted = predicting.result()
    check.part("predicted", 0, lambda check: predicted)
    text = table(check, works, predicted)
    (check.folder / "speed.md").write_text(text)
    print(f"\n{text}\nAll of it is in {check.folder}.")
    if check.failed:
        sys.exit(f"error: failed: {', '.join(check.failed)}")


if __name__ == "__main__":
    main()
