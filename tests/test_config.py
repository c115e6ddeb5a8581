"""Every mistake on the command line is one sentence with exit code 2, before anything loads."""

import itertools
import json
import subprocess
import sys

import pytest
from conftest import ROOT, spec_of
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from eagle3 import config as configuration
from eagle3.checks import check, fits
from eagle3.draft.initial import derive_config, read_config
from eagle3.errors import ConfigError
from eagle3.mistakes import explain

CONF = ROOT / "conf"
COMPOSITION_MISTAKES = {
    "trian.epochs=3": "trian.epochs is no key of the config; did you mean train.epochs?",
    "optimizer.lrr=3": "optimizer.lrr is no key of the config; did you mean optimizer.lr?",
    "modl=hf": "modl is no key of the config; did you mean model?",
    "model=lama3-8b": "llama3-8b, qwen3-30b-a3b, qwen3-32b, qwen3-8b, tiny; did you mean llama3-8b?",
    "loss/mask=servin": "loss/mask=servin is unknown; allowed: serving, shifted; did you mean serving?",
    "train.epochs=abc": "train.epochs=abc must be of type integer",
    "train.deterministic=7x": "train.deterministic=7x must be of type bool",
    "stages=train": "stages=train has the wrong type; write a list as 'stages=[train]'",
    "train.resume=conf": "train.resume=conf must be a run with a checkpoint",
    "model=hf": "model.path has no value; set model.path=...",
    "+data.sources.a.path=a/b": "+data.sources.a.path is no source yet: write '+data.sources={a: {path: ...}}'",
    "data.sources={a:{path:a/b}}": "data.sources is new to the config: put + before it, as +data.sources=...",
    "data.chat_template_kwargs.enable_thinking=false": "put + before it, as +data.chat_template_kwargs.enable_thinking",
    "+loss.gama=0.5": "loss.gama is unknown to eagle3.loss.SoftTargetLoss",
}
VALUE_MISTAKES = {
    "train.epochs=0": "train.epochs=0 must be at least 1",
    "draft.ttt_steps=17": "draft.ttt_steps=17 must be at most 16",
    "optimizer.lr=abc": "optimizer.lr=abc is a str, but torch.optim.AdamW takes float",
    "optimizer.lr=-1": "optimizer.lr=-1 must be within 1e-12 and 1000",
    "optimizer._target_=os.system": "os.system must start with one of eagle3., torch., transformers.",
    "optimizer._target_=torch.optim.Adan": "optimizer._target_=torch.optim.Adan cannot be imported",
    "loss.gamma=high": "loss.gamma=high is a str, but eagle3.loss.SoftTargetLoss takes float",
    "stages=[prepar]": "prepare, generate, capture, train, export, benchmark; did you mean prepare?",
    "model.dtype=float23": "model.dtype=float23 is not one of auto, float32, bfloat16, float16; did you mean float32?",
    "model.aux_layer_ids=[1,2]": "model.aux_layer_ids=[1, 2] must be three different layers of 0..9, low to high",
    "model.aux_layer_ids=[1,2,10]": "must be three different layers of 0..9",
    "draft.vocab_size=2049": "draft.vocab_size=2049 must be at most the target's vocabulary of 2048",
    "data.max_length=4096": "data.max_length=4096 must be at most train.tokens_per_step=",
    "data.path=no.jsonl": "data.path=no.jsonl does not exist",
    "draft_path=nowhere": "draft_path=nowhere does not exist",
    "model.path=./nowhere": "model.path=nowhere is not a folder",
    "parallel.ulysses=2": "parallel.ulysses x parallel.ring = 2 must divide launch.nproc_per_node",
    "benchmark.configs=[[4,7,10]]": "benchmark.configs=[4, 7, 10] must be four numbers",
    "benchmark.configs=[[4,3,1,5]]": "benchmark.configs=[4, 3, 1, 5] is none of [batch, 0, 0, 0]",
    "benchmark.protocol=specforg": "benchmark.protocol=specforg is unknown; allowed: chat, specforge, eagle; did you",
    "benchmark.suites=[heldou:3]": "benchmark.suites=heldou:3 is unknown",
    "benchmark.suites=[]": "benchmark.suites is empty; name at least one",
    "stages=[]": "stages is empty; name at least one",
    "loss.gamma=-3": "loss.gamma=-3 must be within 0 and 1",
    "loss.chunk_rows=0": "loss.chunk_rows=0 must be within 1",
    "optimizer.betas=[0.9,2]": "optimizer.betas=[0.9, 2] must be within 0 and 1",
    "scheduler.warmup_ratio=5": "scheduler.warmup_ratio=5 must be within 0 and 1",
    "benchmark.temperature=-1": "benchmark.temperature=-1 must be within 0",
    "train.max_grad_norm=0": "train.max_grad_norm=0.0 must be at least",
    "draft.config=run.py": "draft.config=run.py is not a JSON object with the draft's shape",
    "data.path=conf/nowhere.json": "data.path=conf/nowhere.json does not exist; give a local file or folder, a hub id",
    "data.path=null": "data.path and data.sources exclude each other; set one of them",
    "+data.sources={a:{path:a/b}}": "data.path and data.sources exclude each other; set one of them",
    "data.chat_template=lama3": "data.chat_template=lama3 is none of auto, chatml,",
    "hidden_states.max_disk=lots": "hidden_states.max_disk=lots is no size; write it as 500GB or 1.5TB",
    "hidden_states.dtype=fp8": "hidden_states.dtype=fp8 is not one of fp32, bf16, int8",
    "regenerate.concurrency=0": "regenerate.concurrency=0 must be within 1 and 100000",
    "data.num_proc=0": "data.num_proc=0 must be at least 1",
    "stages=[prepare,regenerate]": "stages: regenerate must come before prepare, which reads what it writes",
    "benchmark.max_new_token=8": "is no key of the config; did you mean benchmark.max_new_tokens?",
}


def composed(*overrides):
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("run", overrides=["name=x", *overrides], return_hydra_config=False)


@pytest.mark.parametrize("override", VALUE_MISTAKES | COMPOSITION_MISTAKES)
def test_mistakes_are_one_sentence(override, tmp_path):
    with pytest.raises(Exception) as raised:
        config = configuration.typed(composed(override), tmp_path, [override])
        assert not override.startswith("train.resume"), (
            "the resolver of hydra.run.dir is tested through the command"
        )
        check(config)
    message, exit_code = explain(raised.value, CONF)
    assert (VALUE_MISTAKES | COMPOSITION_MISTAKES)[override] in message
    assert exit_code == 2 and "\n" not in message


@pytest.mark.parametrize(
    "override", ["train.epochs=0", "trian.epochs=3", "train.resume=/nowhere", "model=hf"]
)
def test_the_command_exits_with_2_and_one_line(override, tmp_path):
    command = [sys.executable, str(ROOT / "run.py"), override, f"hydra.run.dir={tmp_path}"][
        : 3 if "resume" in override else 4
    ]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1 and result.stderr.startswith("error: "), result.stderr


def test_tracebacks_on_request(tmp_path):
    command = [sys.executable, str(ROOT / "run.py"), "train.epochs=0", f"hydra.run.dir={tmp_path}"]
    result = subprocess.run(
        command,
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={"HYDRA_FULL_ERROR": "1", "PATH": "/usr/bin:/bin"},
    )
    assert "Traceback" in result.stderr and "ConfigError" in result.stderr


def groups():
    for path in sorted(CONF.glob("*/**/*.yaml")):
        yield f"{path.parent.relative_to(CONF)}={path.stem}"


@pytest.mark.parametrize("option", groups())
def test_every_option_composes_and_binds(option, tmp_path):
    """Each file of conf/ is reachable, typed and bound to a signature; hub models are not fetched."""
    overrides = [option]
    if option.startswith("model="):
        overrides += ["draft.vocab_size=1000"]
        if option == "model=hf":
            overrides += ["model.path=x/y"]
    if option == "target=sglang":  # which is not installed here, and has another benchmark
        overrides += [
            "target.url=http://127.0.0.1:30000",
            "target.server_args=[--max-total-tokens,8192]",
            "stages=[prepare,generate,train]",
        ]
    if option.startswith(
        "experiment="
    ):  # engines are not installed here, and the stand-in has two key/value heads
        overrides += ["target=hf", "benchmark=builtin", "parallel=ddp", "parallel.ulysses=1"]
    if option == "parallel=usp":
        overrides += ["parallel.ulysses=2", "launch.nproc_per_node=4"]
    if option == "data=jsonl":
        overrides += ["data.path=run.py"]
    if option in ("benchmark=sglang", "benchmark=vllm"):  # which are not installed here
        overrides += ["benchmark.url=http://127.0.0.1:1", "benchmark.alone_url=http://127.0.0.1:2"]
    config = configuration.typed(composed(*overrides), tmp_path, overrides)
    config.model.path, config.draft.vocab_size = composed().model.path, 1000
    config.data.max_length = min(config.data.max_length, 2048)  # what the stand-in takes
    check(config)


def test_an_experiment_may_set_what_the_root_sets(tmp_path):
    """run.yaml comes before the groups, so that a recipe can name its stages and its seed."""
    (tmp_path / "experiment").mkdir()
    recipe = "# @package _global_\nstages: [prepare]\nseed: 7\ntrain: {epochs: 9}\n"
    (tmp_path / "experiment" / "mine.yaml").write_text(recipe)
    mine = composed(f"hydra.searchpath=[file://{tmp_path}]", "experiment=mine")
    assert (mine.stages, mine.seed, mine.train.epochs) == (["prepare"], 7, 9)


@pytest.mark.parametrize("arguments", [["--help"], ["--cfg", "job"]])
def test_help_and_config_are_printed(arguments):
    result = subprocess.run(
        [sys.executable, str(ROOT / "run.py"), *arguments], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0 and "ttt_steps: 5" in result.stdout and not result.stderr
    if arguments == ["--help"]:
        assert "loss/mask: serving, shifted" in result.stdout


def test_draft_config_files(target_folder, tmp_path):
    shape = {
        "intermediate_size": 96,
        "max_position_embeddings": 2048,
        "num_hidden_layers": 1,
        "architectures": ["x"],
    }
    (tmp_path / "draft.json").write_text(json.dumps(shape))
    derived = derive_config(spec_of(target_folder).config, 300)
    read = read_config(str(tmp_path / "draft.json"), derived)
    assert read.intermediate_size == 96 and read.max_position_embeddings == 512, (
        "positions are the target's"
    )
    for name, value in {"hidden_act": "gelu", "draft_vocab_size": 299, "hidden_size": 32}.items():
        (tmp_path / "draft.json").write_text(json.dumps({name: value}))
        with pytest.raises(ConfigError, match=f"{name}={value}, but it must be"):
            read_config(str(tmp_path / "draft.json"), derived)


def test_target_without_a_tokenizer(target_folder, tmp_path):
    for file in ("config.json", "model.safetensors"):
        (tmp_path / file).symlink_to(target_folder / file)
    config = configuration.typed(composed("model=hf", f"model.path={tmp_path}"), tmp_path, [])
    with pytest.raises(ConfigError, match="has no tokenizer"):
        check(config)


def test_yaml_values_against_type_hints():
    cases = [
        (1, float),
        ([1.0, 2], list[float]),
        (None, str | None),
        ("a", str),
        ([0.9, 0.99], tuple[float, float]),
    ]
    assert all(fits(value, hint) for value, hint in cases)
    wrong = [
        (True, int),
        ("1", float),
        (1.5, int),
        ("x", list[int]),
        (["x"], list[int]),
        (True, float),
    ]
    assert not any(fits(value, hint) for value, hint in wrong)


def test_every_section_of_the_reference_exists():
    """A typed field without a place in conf/ would be a key that --help does not show."""
    keys = set(configuration.flat(composed()))
    typed = set(configuration.flat(configuration.OmegaConf.structured(configuration.RunConfig), ""))
    missing = {key for key in typed if not any(k == key or k.startswith(f"{key}.") for k in keys)}
    assert not missing, sorted(itertools.islice(missing, 5))
