"""Command lines: what they come to, and mistakes in them as one sentence with exit code 2."""

import json
import runpy
import shlex
import shutil
import sys
from itertools import chain, product, zip_longest
from typing import Annotated

import pytest
import torch
from conftest import ROOT, TINY, as_sent, compose_config, run_command, spec_of
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from eagle3.checks import check, check_value, fits
from eagle3.config import Within, flatten, label, layout
from eagle3.data.vocab import complete_section
from eagle3.draft.initial import derive_config, draft_config, read_config
from eagle3.errors import ConfigError, first_line
from eagle3.hydra_errors import explain
from eagle3.runs.resume import command_to_resume, load_config, run_folder

CONF = ROOT / "conf"
SENTENCES = {
    # the composition
    "trian.epochs=3": "trian is no key of the config; did you mean train?",
    "optimizer.lrr=3": "optimizer.lrr is no key of the config; did you mean optimizer.lr?",
    "benchmark.max_new_token=8": "no key of the config; did you mean benchmark.max_new_tokens?",
    "modl=hf": "modl is no key of the config; did you mean model?",
    "model=lama3-8b": "qwen3-32b, qwen3-8b, smollm2-135m, tiny; did you mean llama3-8b?",
    "loss/mask=servin": "loss/mask=servin is unknown; allowed: serving, shifted; did you mean serv",
    "train.epochs=abc": "train.epochs=abc must be of type int",
    "train.epochs=null": "train.epochs=None must be of type int",
    "train.deterministic=7x": "train.deterministic=7x must be of type bool",
    "stages=train": "stages=train must be of type list, as 'stages=[train]'",
    "eval.temperature=[0,warm]": "eval.temperature[1]=warm must be of type float",
    "model.aux_layer_ids=[0,x]": "model.aux_layer_ids[1]=x must be of type int",
    "model.aux_layer_ids=x": "model.aux_layer_ids=x must be of type list",
    "train.resume=conf": "train.resume=conf must be a run with a checkpoint",
    "model=hf": "model.path has no value; set model.path=...",
    "+data.sources.a.path=a/b": "a is no source of data yet: write '+data.sources={a: {path: ...}}",
    "data.sources={a:{path:a/b}}": "a is no source of data yet: write '+data.sources={a: {path:",
    "data.chat_template_kwargs.enable_thinking=false": "put + before it, as +data.chat_template_k",
    "train.epochs=[": "train.epochs=[ cannot be read (no viable alternative at input '[')",
    "data.path=a=b, c (1)/x": """quote the text, as 'data.path="a=b, c (1)/x"'""",
    "data.path=it's": """quote the text, as 'data.path="it'"'"'s"'""",
    "data.path": "data.path cannot be read (missing EQUAL at '<EOF>'); write key=value",
    "hydra/launcher=submitit_slurm": "a package is missing: pip install -e '.[slurm]'",
    "hydra/launcher=joblib": "because a package is missing: pip install -e '.[sweep]'",
    "hydra/launcher=ray": "because a package is missing: pip install hydra-ray-launcher",
    "hydra/sweeper=optuna": "allowed: basic, optuna_pruning; did you mean optuna_pruning?",
    "hydra/launcher=basi": "hydra/launcher=basi is unknown; allowed: basic; did you mean basic?",
    # single values
    "+loss.gama=0.5": "loss.gama is unknown to eagle3.loss.SoftTargetLoss",
    "loss.gamma=high": "loss.gamma=high is a str, but eagle3.loss.SoftTargetLoss takes",
    "loss.gamma=-3": "loss.gamma=-3 must be within 0 and 1",
    "loss.chunk_rows=0": "loss.chunk_rows=0 must be within 1 and",
    "optimizer.lr=abc": "optimizer.lr=abc is a str, but eagle3.optim.adamw takes float",
    "optimizer.lr=-1": "optimizer.lr=-1 must be within 1e-12 and 1000",
    "optimizer.betas=[0.9,2]": "optimizer.betas=[0.9, 2] must be within 0 and 1",
    "optimizer._target_=torch.optim.Adan": "; did you mean torch.optim.Adam?",
    "scheduler.warmup_ratio=5": "scheduler.warmup_ratio=5 must be within 0 and 1",
    "train.epochs=0": "train.epochs=0 must be at least 1",
    "train.max_grad_norm=0": "train.max_grad_norm=0.0 must be at least",
    "draft.ttt_steps=17": "draft.ttt_steps=17 must be within 1 and 16",
    "data.num_proc=0": "data.num_proc=0 must be at least 1",
    "+data.sources={a:{path:a/b,weight:-1}}": "data.sources.a.weight=-1.0 must be within 0 and",
    "model.dtype=float23": "must be one of auto, float32, bfloat16, float16; did you mean float32?",
    "hidden_states.dtype=fp8": "hidden_states.dtype=fp8 must be one of fp32, bf16, int8",
    "hidden_states.max_disk=lots": "hidden_states.max_disk=lots is no size; write it as 500GB or",
    "check.engines=[sglang,vlm]": "must be one of sglang, vllm, trtllm, official; did you mean vll",
    "data.chat_template=lama3": "data.chat_template=lama3 is none of auto, chatml,",
    "eval.temperature=[1]": "eval.temperature=[1.0] must have 0, as [0,1] does, and each once",
    "eval.temperature=[0,-1]": "eval.temperature=[0.0, -1.0] must be within 0 and 100",
    "train.best_by=[0.5]": "train.best_by=[0.5] must be some of eval.temperature=[0.0, 1.0]",
    "train.best_by=[]": "train.best_by=[] must be some of eval.temperature",
    "stages=[]": "stages is empty; name at least one",
    "stages=[prepar]": "; did you mean prepare?",
    "benchmark.suites=[]": "benchmark.suites or benchmark.configs is empty; name at least one",
    "benchmark.suites=[heldou:3]": "benchmark.suites=heldou:3 is unknown",
    "benchmark.protocol=specforg": "must be one of chat, specforge, eagle; did you mean spec",
    "benchmark.configs=[[4,7,10]]": "benchmark.configs=[4, 7, 10] must be [batch, 0, 0, 0]",
    "benchmark.configs=[[4,3,1,5]]": "benchmark.configs=[4, 3, 1, 5] must be [batch, 0, 0, 0]",
    # files
    "data.path=no.jsonl": "data.path=no.jsonl does not exist; give a local file or folder, a hub",
    "draft_path=nowhere": "draft_path=nowhere does not exist",
    "draft.config=nowhere": "draft.config=nowhere is not a JSON object",
    "draft.config=run.py": "draft.config=run.py is not a JSON object with the draft's shape",
    "model.path=./nowhere": "model.path=./nowhere is no model: ",
    "model.path=conf": "model.path=conf is no model: ",
    # pairs
    "model=llama3-8b": "prepare reads data, but none is named; set data=<preset>",
    "data.path=null": "prepare reads data, but none is named",
    "+data.sources={a:{path:a/b}}": "data.path and data.sources exclude each other; set one of",
    "data.max_length=4096": "data.max_length=4096 must be at most train.tokens_per_step=",
    "target.tp_size=2": "target.tp_size=2: target=hf cannot split it; use target=sglang",
    "draft.vocab_size=2049": "draft.vocab_size=2049 must be at most the target's vocab_size=2048",
    "draft=dspark & export.speculators=true": "is a form of EAGLE3, not of draft=dspark, which",
    "draft=dflash & draft.block=1": "draft.block=1 must be within 2 and 16",
    "draft=dflash & draft.block=17": "draft.block=17 must be within 2 and 16",
    "draft=dflash & draft.anchors=0": "draft.anchors=0 must be at least 1",
    "draft=dflash & draft.mask_token_id=2048": "give an id below 2048 of a token that no text",
    "draft=dspark & eval.draft_length=8": "eval.draft_length=8 is more than the 7 tokens that a",
    "draft=dflash & draft.block=5": "is more than the 4 tokens that a block drafts; raise draft.b",
    "parallel.ulysses=2": "parallel.ulysses x parallel.ring = 2 must divide launch.nproc_per_node",
    "parallel=usp & parallel.ring=2": "parallel.ring = 2 must divide launch.nproc_per_node x laun",
    "parallel=usp & launch.nproc_per_node=8": "parallel.ulysses=8 must divide the draft's 2 key/",
    "draft=dflash & benchmark.configs=[[1,3,2,6]]": "configs=[1, 3, 2, 6]: steps=3, topk=2",
    "draft=dspark & benchmark.configs=[[1,8,1,9]]": "drafts blocks: topk must be 1, steps in 1..7",
    "draft=dflash & draft.block=4 & eval.draft_length=3": "configs=[1, 5, 1, 6]: steps=5, topk=1",
    "launch.nnodes=2": "launch.nnodes=2 needs launch/torchrun.sh on every node",
    "model.aux_layer_ids=[2,1]": "model.aux_layer_ids=[2, 1] must be different layers of",
    "model.aux_layer_ids=[]": "must be different layers of 0..9, low to high",
    "model.aux_layer_ids=[1,2,10]": "must be different layers of 0..9, low to high",
}
SHARE = Within(0, 1)
TINY_LEAVES = (
    "optimizer.lr", "draft.ttt_steps", "draft.vocab_size", "train.max_steps", "data.path",
    "data.eval_path", "data.max_length", "loss.chunk_rows", "launch.threads",
)  # fmt: skip


@pytest.mark.parametrize("override", SENTENCES)
def test_mistakes_are_one_sentence(override, tmp_path):
    with pytest.raises(Exception) as raised:
        overrides = override.split(" & ")
        check(load_config(compose_config(*overrides), tmp_path, overrides))
    message, exit_code = explain(raised.value)
    assert SENTENCES[override] in message
    assert exit_code == 2 and "\n" not in message


def test_a_mistake_is_explained_under_a_debugger():
    """While a trace function is set, OmegaConf's errors cause each other in a circle."""
    before, override = sys.gettrace(), "+data.sources.a.path=a/b"
    sys.settrace(lambda frame, event, argument: None)
    try:
        with pytest.raises(Exception) as raised:
            compose_config(override)
    finally:
        sys.settrace(before)
    assert SENTENCES[override] in explain(raised.value)[0]


MISTAKES = (
    "train.epochs=0", "trian.epochs=3", "model=null", "train.resume=/x", "-m trian.epochs=0,1",
)  # fmt: skip


@pytest.mark.runs
@pytest.mark.parametrize("arguments", MISTAKES)
def test_the_command_exits_with_2_and_one_line(arguments, tmp_path):
    result = run_command(*arguments.split(), cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1 and result.stderr.startswith("error: "), result.stderr
    assert list(tmp_path.iterdir()) == [], "not even an empty folder is left"


@pytest.mark.runs
def test_folders_in_which_no_run_began(settings, tmp_path):
    """They go, with those above them that the command made; what was there before stays, and so do
    the jobs of a sweep that ran.
    """
    (tmp_path / "mine").mkdir()
    sweep = ["-m", "seed=0,1", "hydra.sweep.dir=mine/c"]
    for given in (["hydra.run.dir=mine/a/b"], ["hydra.run.dir=mine"], sweep):
        refused = run_command(*given, "train.epochs=0", cwd=tmp_path)
        assert refused.returncode and "train.epochs=0 must be at least 1" in refused.stderr
        assert [*tmp_path.rglob("*")] == [tmp_path / "mine"]
    deep = "hydra.sweep.subdir=a/${hydra:job.num}"
    planned = run_command("-m", *settings, "plan=true", "seed=0,-1", deep, cwd=tmp_path)
    assert "Recommended: " in planned.stdout and not (tmp_path / "outputs").exists()
    run_command("-m", *settings, "stages=[prepare]", "train.epochs=0,1", cwd=tmp_path)
    (sweep,) = tmp_path.glob("outputs/target*-chat-online/*")
    assert sorted(path.name for path in sweep.iterdir()) == ["1", "multirun.yaml"]


NAMES = {
    "": "tiny-tiny-online",
    "model=llama3-8b model.path=/models/copy data=mix mode=offline": "llama3-8b-mix-offline",
    "model=hf": "hf-none-online",
    "model=hf model.path=/models/SmolLM2-135M/ data=jsonl data.path=a/prompts.v2.jsonl.gz": (
        "SmolLM2-135M-prompts.v2-online"
    ),
    "model=hf model.path=x/Llama-3.1-8B \"data.path='s3://me:key@b/c/x%20y.json?sig=1'\"": (
        "Llama-3.1-8B-x_20y-online"
    ),
    "model=hf model.path=.. data=none": f"{ROOT.parent.name}-none-online",
    "model=hf model.path=a/b data=jsonl data.path=s3://bucket/": "b-bucket-online",
    "model=hf model.path=a/b data=none '+data.sources={x:{path:p},y z:{path:q}}'": "b-x+y_z-online",
    "name=mine model=hf model.path=a/b": "mine",
}


@pytest.mark.parametrize("given", NAMES)
def test_run_folders_are_named_by_what_is_used(given):
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        composed = compose("run", overrides=shlex.split(given), return_hydra_config=True)
    assert composed.name == NAMES[given]


def test_the_folder_of_a_sweep_is_named_by_what_is_swept():
    choices = {"model": "tiny", "data": "jsonl"}
    swept = ["model=llama3-8b,qwen3-8b", "data.path=a/one.jsonl,two.json", "optimizer.lr=1,2"]
    hydra = {"runtime": {"choices": choices}, "overrides": {"task": swept}}
    root = OmegaConf.create({"hydra": hydra, "model": {"path": "x"}, "data": {"path": "???"}})
    named = [label(group, _root_=root) for group in ("model", "data")]
    assert named == ["llama3-8b+qwen3-8b", "one+two"]


@pytest.mark.parametrize("processes", [1, 2, 4, 8])
def test_every_layout_works_or_is_refused(processes):
    """A layout is found by trying: whole groups, and whole heads for each rank of a group."""
    config = OmegaConf.to_object(compose_config("stages=[export]", "parallel=usp"))
    config.launch.nproc_per_node, shape, heads = processes, config.parallel, 2
    for shape.ulysses, shape.ring in product([None, 1, 2, 3, 4, 8], [1, 2, 3, 4, 8]):
        tried = [shape.ulysses] if shape.ulysses else range(1, 9)
        groups = [(u, processes / (u * shape.ring)) for u in tried if heads % u == 0]
        fitting = [u for u, g in groups if g == 1 or (shape.ulysses and g.is_integer())]
        try:
            check(config)
            assert fitting == [layout(config)[0]]
        except ConfigError as refused:
            assert not fitting and "parallel.ring" in str(refused) and "must divide" in str(refused)


@pytest.mark.runs
@pytest.mark.parametrize("arguments", ["--help", "--cfg job", "train.resume=/nowhere"])
def test_what_else_the_command_prints(arguments):
    environment = {"HYDRA_FULL_ERROR": "1", "PATH": "/usr/bin:/bin"}
    result = run_command(*arguments.split(), env=environment)
    if "resume" in arguments:
        assert "Traceback" in result.stderr and "ConfigError" in result.stderr
    else:
        assert result.returncode == 0 and "ttt_steps: 5" in result.stdout and not result.stderr
        assert ("loss/mask: serving, shifted" in result.stdout) == (arguments == "--help")


FILES = sorted(CONF.glob("*/**/*.yaml"))
GROUPS = {file.parent for file in FILES}
# The options of these ask for others; of each other group one is tried at a time.
LARGE = {"data", "model", "experiment", "benchmark", "target", "parallel"}
NEEDED = {  # what an option asks for; engines are not installed here
    "data=none": ["stages=[export]"],
    "data=jsonl": ["data.path=run.py"],
    "model=hf": ["model.path=x/y"],
    "experiment=smollm2-135m": ["data.path=run.py"],
    "experiment=finetuned": ["data.path=run.py", "model.path=x/y", "draft.init_from=x/y"],
    "parallel=usp": ["launch.nproc_per_node=2"],
    "target=sglang": ["target.url=http://127.0.0.1:1", "stages=[prepare,generate,train]"],
    "benchmark=sglang": ["benchmark.url=http://a", "benchmark.alone_url=http://b"],
    "benchmark=vllm": ["benchmark.url=http://a", "benchmark.alone_url=http://b"],
}
ALONE = ["target=hf", "target.tp_size=1", "benchmark=builtin", "parallel=ddp", "parallel.ulysses=1"]


def checked(*overrides, run_dir=CONF, **changes):
    """What comes of a command line, checked; `changes` by section beforehand."""
    config = load_config(compose_config(*overrides), run_dir, list(overrides))
    for name, values in changes.items():
        vars(getattr(config, name)).update(values)
    check(config)


def options():
    """All options of conf/, as few command lines."""
    named = {
        group: [f"{group.relative_to(CONF)}={file.stem}" for file in sorted(group.glob("*.yaml"))]
        for group in sorted(GROUPS)
    }
    large = [names for group, names in named.items() if group.name in LARGE]
    small = [names for group, names in named.items() if group.name not in LARGE]
    columns = [" ".join(filter(None, column)) for column in zip_longest(*small)]
    return [*chain(*large), *columns]


@pytest.mark.parametrize("given", options())
def test_every_option_composes_and_binds(given):
    """Each file of conf/ is reachable, typed and bound to a signature; no hub model is fetched."""
    overrides = [*given.split(), *NEEDED.get(given, [])]
    overrides += ["data=tiny"] if given.startswith("model=") else []
    overrides += ALONE if given.startswith("experiment=") else []
    small = {"max_length": 64}  # what the stand-in takes
    model = {"path": str(TINY / "target")}
    checked(*overrides, model=model, draft={"vocab_size": 1000}, data=small)


def test_the_embedded_default_is_its_experiment():
    default = flatten(compose_config())
    assert default == flatten(compose_config("experiment=tiny"))
    assert default == flatten(compose_config("model=tiny", "data=tiny", "mode=online"))
    assert (default["optimizer.lr"], default["draft.ttt_steps"]) == (2e-3, 5)
    assert default["data.path"].endswith("conversations.jsonl")
    assert default["draft.initial._target_"].endswith("induction")


@pytest.mark.parametrize(
    ("overrides", "path"),
    [
        ("model=llama3-8b", None),
        ("model=llama3-8b data=sharegpt", "Aeala/ShareGPT_Vicuna_unfiltered"),
        ("model=hf model.path=a/b data=jsonl data.path=x", "x"),
        ("model=hf model.path=a/b data.path=x", "x"),
        ("experiment=llama3-8b-sharegpt-online", "Aeala/ShareGPT_Vicuna_unfiltered"),
        ("experiment=llama3-8b-sharegpt-online data=gsm8k", "openai/gsm8k"),
    ],
)
def test_nothing_of_the_embedded_default_stays_in_another_model(overrides, path):
    tiny, other = flatten(compose_config()), flatten(compose_config(*overrides.split()))
    assert other["data.path"] == path
    assert not [key for key in TINY_LEAVES if tiny[key] == other[key]]
    assert other["draft.initial._target_"].endswith("random")


def test_what_is_named_beside_the_embedded_default(tmp_path):
    """An experiment of one's own may set what the root sets, as run.yaml comes first."""
    tiny = flatten(compose_config())
    mine = flatten(compose_config("model=tiny", "data=jsonl", "data.path=x", "optimizer.lr=1"))
    changed = {key for key in tiny if tiny[key] != mine[key]}
    assert changed == {"data.path", "data.eval_path", "optimizer.lr"}
    other = compose_config("model=llama3-8b", "data=tiny")
    assert other.data.path == tiny["data.path"] and other.data.max_length == 2048
    other = compose_config("model=llama3-8b", "experiment=tiny")
    assert (other.model.path, other.optimizer.lr) == ("meta-llama/Llama-3.1-8B-Instruct", 2e-3)
    (tmp_path / "experiment").mkdir()
    recipe = "# @package _global_\nstages: [prepare]\nseed: 7\ntrain: {epochs: 9}\n"
    (tmp_path / "experiment" / "mine.yaml").write_text(recipe)
    mine = compose_config(f"hydra.searchpath=[file://{tmp_path}]", "experiment=mine")
    assert (mine.stages, mine.seed, mine.train.epochs) == (["prepare"], 7, 9)


def test_stages_that_read_no_data_need_none(tmp_path):
    model = ["model=hf", f"model.path={compose_config().model.path}", "draft.vocab_size=1000"]
    stored = ["mode=offline", f"hidden_states.path={tmp_path}", "stages=[train,export]"]
    draft = ["stages=[check,benchmark]", f"draft_path={tmp_path}", "draft.vocab_size=999999"]
    gone = ["stages=[benchmark]", "data.path=moved.jsonl", "benchmark.suites=[gsm8k]"]
    for overrides in (["stages=[export]"], draft, gone, stored):
        checked(*model, *overrides)
    with pytest.raises(ConfigError, match=r"data\.path=moved\.jsonl does not exist"):
        checked(*model, *gone, "benchmark.suites=[heldout]")


def test_going_on_with_a_run(tmp_path):
    """A resumed run has its own config; only what no weight depends on may differ."""
    run_dir, overrides = tmp_path / "run", ["optimizer.lr=0.5", "train.max_steps=3"]
    defaults = ["model=tiny", "mode=online", "seed=0", "+data.sources={}", "name=mine"]
    needed = "python run.py name=mine optimizer.lr=0.5 train.max_steps=3"
    assert command_to_resume(run_dir, [*defaults, *overrides]) == needed
    # A default that an experiment would change, and an option that is found only with a searchpath.
    for given in ("experiment=llama3-8b-sharegpt-offline mode=online", "model=own seed=0"):
        assert command_to_resume(run_dir, given.split()) == f"python run.py {given}"
    as_sent(run_dir, *overrides)
    assert command_to_resume(run_dir, overrides) == f"python run.py train.resume={run_dir}"
    assert run_folder(str(run_dir), "new") == str(run_dir)

    def resumed(*overrides):
        return load_config(compose_config(*overrides), run_dir, list(overrides))

    named = resumed(f"train.resume={run_dir}", "train.keep_last=9", "stages=[export]")
    assert (named.optimizer["lr"], named.train.max_steps) == (0.5, 3)
    assert (named.train.keep_last, named.stages) == (9, ["export"])
    assert resumed(*overrides, "parallel.ring=2").parallel.ring == 2
    recorded = json.loads((run_dir / "run.json").read_text())
    del recorded["config"]["export"]["push_to_hub"], recorded["config"]["eval"]["draft_length"]
    (run_dir / "run.json").write_text(json.dumps(recorded))
    older = resumed(f"train.resume={run_dir}")
    assert older.export.push_to_hub is None and older.eval.draft_length == 5
    with pytest.raises(ConfigError, match=r"draft\.ttt_steps=4 differs from the run"):
        resumed(f"train.resume={run_dir}", "draft.ttt_steps=4")
    with pytest.raises(ConfigError, match=r"optimizer\.lr=\S+ differs from .* has 0\.5"):
        resumed("train.max_steps=3")
    with pytest.raises(ConfigError, match="is no run folder with a checkpoint"):
        run_folder("conf", "new")


def test_draft_config_files(target_folder, tmp_path):
    shape = {"intermediate_size": 96, "max_position_embeddings": 2048, "num_hidden_layers": 1}
    more = {"architectures": ["x"], "fc_norm": True}
    (tmp_path / "draft.json").write_text(json.dumps(shape | more))
    derived = derive_config(spec_of(target_folder).config, 300)
    read = read_config(str(tmp_path / "draft.json"), derived)
    assert read.intermediate_size == 96 and read.fc_norm and not read.norm_output
    assert read.max_position_embeddings == 512, "positions are the target's"
    wrong = {"hidden_act": "gelu", "draft_vocab_size": 299, "hidden_size": 32}
    for name, value in (wrong | {"num_aux_hidden_states": 5}).items():
        (tmp_path / "draft.json").write_text(json.dumps({name: value}))
        with pytest.raises(ConfigError, match=f"{name}={value}, but it must be"):
            read_config(str(tmp_path / "draft.json"), derived)


def test_what_a_block_drafter_takes_from_its_target(target_folder, tmp_path):
    """Its vocabulary, and a token for the empty slots, which is to be named where there is no
    tokenizer; a file with the shape changes neither.
    """
    given = "draft=dflash", "draft.ttt_steps=3", "draft.mask_token_id=null"
    section = OmegaConf.to_object(compose_config(*given)).draft
    completed = complete_section(section, spec_of(target_folder))
    assert (completed.ttt_steps, completed.vocab_size) == (15, 2048)
    assert completed.mask_token_id == 5 and complete_section(completed, spec_of(TINY / "target"))
    shutil.copy(target_folder / "config.json", tmp_path)
    with pytest.raises(ConfigError, match="mask_token_id=None: give an id below 2048 of a token"):
        complete_section(section, spec_of(tmp_path))
    completed.config, target = str(tmp_path / "draft.json"), spec_of(tmp_path).config
    for name in ("block_size", "mask_token_id"):
        (tmp_path / "draft.json").write_text(json.dumps({name: 7, "num_hidden_layers": 2}))
        with pytest.raises(ConfigError, match=f"{name}=7, but it must be"):
            draft_config(completed, target, 3)
    (tmp_path / "draft.json").write_text('{"num_hidden_layers": 2}')
    assert draft_config(completed, target, 3).num_hidden_layers == 2


def test_more_processes_than_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ConfigError, match=r"nproc_per_node=4 is more than the 2 GPUs that torch"):
        checked("launch.nproc_per_node=4")


def test_target_without_a_tokenizer(target_folder, tmp_path):
    for file in ("config.json", "model.safetensors"):
        (tmp_path / file).symlink_to(target_folder / file)
    given = f"model=hf model.path={tmp_path} data=tiny data.max_length=128 draft.vocab_size=300"
    with pytest.raises(ConfigError, match="has no tokenizer"):
        checked(*given.split())


def test_yaml_values_against_type_hints():
    pair = tuple[float, float]
    fitting = [
        (1, float),
        ([1.0, 2], list[float]),
        (None, str | None),
        ("a", str),
        ([0, 1.5], pair),
    ]
    assert all(fits(value, hint) for value, hint in fitting)
    wrong = [(True, int), ("1", float), (1.5, int), ("x", list[int]), (["x"], list[int])]
    assert not any(fits(value, hint) for value, hint in [*wrong, (True, float), ("x", int | None)])


@pytest.mark.parametrize("hint", [Annotated[float, SHARE] | None, Annotated[list[float], SHARE]])
def test_bounds_are_inclusive_and_refuse_nan(hint):
    for value in (None, 0, 1, 0.5, [0, 1]):
        check_value("key", value, hint)
    for value in (-0.1, 1.1, float("nan"), [0.5, 2]):
        with pytest.raises(ConfigError, match="must be within 0 and 1"):
            check_value("key", value, hint)


def test_the_reference_of_all_keys_is_up_to_date():
    """docs/config.md is what dev/config_reference.py makes of conf/; each key has a meaning."""
    made = runpy.run_path(str(ROOT / "dev" / "config_reference.py"))["reference"]()
    written = (ROOT / "docs" / "config.md").read_text()
    assert made == written, "run python dev/config_reference.py"
    rows = [line for line in written.splitlines() if line.startswith("| `")]
    assert len(rows) > 100 and not [row for row in rows if row.endswith("|  |")]


@pytest.mark.parametrize("text, said", [("\n a\nb", "a"), ("", "ValueError"), ("a", "a")])
def test_the_first_line_of_what_a_library_says(text, said):
    assert first_line(ValueError(text)) == said
