"""The stages of a run, top to bottom: each takes what it reads and returns what it made.

`stages` filters this list and nothing else. What a listed stage reads must be there, or be made by
a stage that is listed too; else the run ends with one sentence that names the stage to add. What is
made lies under the fingerprint of what it was made from, and is made once.
"""

from pathlib import Path

from hydra.utils import get_class
from rich.console import Console

from eagle3.benchmark.benchmark import benchmark, reads_held_out
from eagle3.benchmark.check import check
from eagle3.config import RunConfig
from eagle3.data.chat import load_chat
from eagle3.data.prepare import find_prepared, load_prepared, prepare
from eagle3.data.regenerate import regenerate
from eagle3.data.sources import find_sources
from eagle3.data.view import view
from eagle3.evaluate import generate
from eagle3.export.read import locate
from eagle3.export.write import export_draft
from eagle3.hidden_states.capture import capture, find_store
from eagle3.hidden_states.import_specforge import import_specforge, is_specforge
from eagle3.hidden_states.store import Store
from eagle3.parallel.launch import run_on_ranks, spawns_ranks
from eagle3.parallel.ranks import Ranks, choose_device, load_target
from eagle3.plan import plan, show
from eagle3.runs.artefact import read_facts
from eagle3.runs.tracking import read_acceptance, track_run
from eagle3.target.handle import TargetHandle
from eagle3.target.spec import read_spec
from eagle3.train import describe_training_data, train

STAGES = (
    "import", "regenerate", "view", "prepare", "generate", "capture", "train", "export", "check",
    "benchmark",
)  # fmt: skip
console = Console(markup=False, soft_wrap=True)


def run_pipeline(config: RunConfig, run_dir: Path, overrides: list[str]) -> float | None:
    """Run the listed stages and write the report; returns the acceptance length that they found.

    Raises ConfigError and RunError.
    """
    listed, cache_dir, data = set(config.stages), config.cache_dir, config.data
    mode, hidden = get_class(config.mode["_target_"]), config.hidden_states
    device = choose_device(config.device)
    target = TargetHandle(read_spec(config.model), config.target, device)
    vocab_sizes = target.spec.config.vocab_size, config.draft.vocab_size

    # What the listed stages read, beside what lies in the run's own folder.
    imports = mode.captures and hidden.path is not None and is_specforge(Path(hidden.path))
    reads_store = mode.captures and not imports and bool(listed & {"capture", "train"})
    reads_answers = "generate" in listed or ("train" in listed and not imports)
    reads_prepared = reads_answers or bool(listed & {"prepare", "capture"})
    if "benchmark" in listed and reads_held_out(config.benchmark):
        reads_prepared = True
    reads_rows = reads_prepared or config.plan or bool(listed & {"regenerate", "view"})
    reads_text = reads_rows or bool(listed & {"check", "benchmark"})
    sources = find_sources(data, cache_dir) if reads_rows else None
    chat = load_chat(config.model, data) if reads_text else None

    def prepared_data(make):
        return make(data, config.eval.num_prompts, *vocab_sizes, sources, chat, cache_dir)

    if config.plan:
        prepared = None if "regenerate" in listed else prepared_data(find_prepared)
        show(plan(config, target.spec, sources, chat, prepared, device), console)
        return None

    prepared = answers = store = None
    with track_run(config, run_dir, overrides, device, console) as tracking:
        if imports and listed & {"import", "train"}:
            path = import_specforge(hidden, target, data.max_length, cache_dir, write=True)
            store = Store(path, hidden.on_damage)
            tracking.note("import", (path, read_facts(path)))
        if "regenerate" in listed:
            sources, paths = regenerate(config.regenerate, data, sources, chat, target, cache_dir)
            tracking.note("regenerate", *((path, read_facts(path)) for path in paths))
        if "view" in listed:
            view(data, config.view.num_samples, sources, chat, run_dir, console)
        if reads_prepared:
            prepared = prepared_data(prepare if "prepare" in listed else require_prepared)
            tracking.note("prepare", (prepared.path, prepared.facts))
        if reads_answers:
            write = "generate" in listed
            answers = generate(config.eval, prepared.heldout, target, cache_dir, write)
            tracking.note("generate", (answers, read_facts(answers)))
        if reads_store:
            store = find_store(hidden, prepared, target, cache_dir)
        ...
