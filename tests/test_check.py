"""Drafts of every format and with every defect: each defect is found and its engines named; a sound
one has none.
"""

import json
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, spec_of
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from safetensors.torch import load_file, save_file

from eagle3 import checks
from eagle3.benchmark.check import Decoded, candidates, embedding, judge
from eagle3.data.vocab import vocab_tensors
from eagle3.decode.speculate import Generation
from eagle3.draft.flash import Auto
from eagle3.draft.initial import derive_config
from eagle3.draft.model import Draft
from eagle3.errors import ConfigError, RunError
from eagle3.export.folder import locate
from eagle3.export.formats import read_any
from eagle3.export.rules import NOTE, WARNING, WRONG, find_all
from eagle3.export.write import MadeFor, read_draft, write_draft, write_speculators
from eagle3.hydra_errors import explain
from eagle3.parallel.ranks import launch
from eagle3.runs.resume import load_config
from eagle3.target.weights import load_weights

LAYERS = [1, 3, 4]
EVERY = {"sglang", "vllm", "trtllm", "official"}


@pytest.fixture(scope="module")
def target(target_folder):
    return spec_of(target_folder).config


@pytest.fixture(scope="module")
def sound(target, target_folder, tmp_path_factory):
    """A folder with `portable` and `speculators`, as this project exports them."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("sound")
    t2d, d2t = vocab_tensors(torch.randperm(2048)[:300].sort().values.numpy(), 2048)
    draft = Draft(derive_config(target, 300), Auto, t2d, d2t)
    write_draft(draft, folder / "portable", target, LAYERS, MadeFor(str(target_folder), 3))
    write_speculators(draft, folder / "speculators", target, LAYERS, MadeFor(str(target_folder), 3))
    return folder


@pytest.fixture
def folder(sound, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(sound, tmp_path / "drafts")


def edit(draft, config=None, tensors=None):
    """Change config.json and the tensors of a draft in place; a value None removes a key of the
    config.
    """
    values = json.loads((draft / "config.json").read_text())
    for name, value in (config or {}).items():
        values.pop(name, None)
        if value is not None:
            values[name] = None if value == "null" else value
    (draft / "config.json").write_text(json.dumps(values))
    named = load_file(draft / "model.safetensors")
    if tensors:
        named = tensors(named) or named
        save_file(
            {name: tensor.contiguous() for name, tensor in named.items()},
            draft / "model.safetensors",
        )


def found(draft, target, severity=None):
    findings = find_all(read_any(draft), target)
    return [f for f in findings if severity is None or f.severity == severity]


def test_a_sound_draft_gives_no_finding(folder, target):
    assert found(folder / "portable", target) == []


def test_the_speculators_form_is_only_noted(folder, target):
    (note,) = found(folder / "speculators", target)
    assert note.severity == NOTE and "vllm" not in note.engines


def drop(name):
    return lambda t: t.pop(name) is None


def put(name, value):
    return lambda t: t.update({name: value(t)})


def rename(old, new):
    return lambda t: {name.replace(old, new, 1): tensor for name, tensor in t.items()}


def absolute(t):
    return t["d2t"] + torch.arange(300)


DEFECTS = {
    "missing": ({}, drop("norm.weight"), EVERY, "norm.weight is missing"),
    "missing lm_head": ({}, drop("lm_head.weight"), EVERY, "lm_head.weight is missing"),
    "unknown": ({}, put("extra.weight", lambda t: torch.zeros(2)), EVERY, "extra.weight is no tensor"),
    "misshapen": ({}, put("fc.weight", lambda t: torch.ones(64, 64)), EVERY, r"fc.weight has shape \[64, 64\]"),
    "not finite": ({}, put("norm.weight", lambda t: t["norm.weight"] * float("nan")), EVERY, "not finite"),
    "zeros": ({}, put("fc.weight", lambda t: torch.zeros(64, 192)), EVERY, "all zeros"),
    "prefix": ({}, rename("", "model."), {"vllm", "trtllm", "official"}, "begin with model"),
    "layers.0": ({}, rename("midlayer", "layers.0"), {"official"}, r"names such as layers\.0"),
    "absolute d2t": ({}, put("d2t", absolute), EVERY, "d2t holds the target's ids themselves"),
    "absolute, no t2d": ({}, lambda t: t.update(d2t=absolute(t)) or t.pop("t2d") is None, EVERY, "ids themselves"),
    "d2t out of range": ({}, put("d2t", lambda t: t["d2t"] + 1000), EVERY, "ids outside 0..2047"),
    "d2t twice": ({}, put("d2t", lambda t: -torch.arange(300)), EVERY, "299 ids twice"),
    "d2t of floats": ({}, put("d2t", lambda t: t["d2t"].float()), EVERY, "d2t is float32"),
    "d2t too short": ({}, put("d2t", lambda t: t["d2t"][:9]), EVERY, r"d2t is int64 \[9\]"),
    "no d2t": ({}, drop("d2t"), EVERY, "d2t is missing"),
    "t2d of another": ({}, put("t2d", lambda t: t["t2d"].roll(1)), EVERY, "t2d marks other tokens"),
    "no need of d2t": ({"draft_vocab_size": 2048}, None, {"vllm"}, "the vocabularies are the same"),
    "too large": ({"draft_vocab_size": 4096}, None, EVERY, "draft_vocab_size=4096 is more"),
    "no draft_vocab_size": ({"draft_vocab_size": None}, None, EVERY - {"vllm"}, "lacks draft_vocab_size"),
    "no hidden_size": ({"hidden_size": None}, None, EVERY, "lacks hidden_size"),
    "another vocabulary": ({"vocab_size": 999}, None, EVERY, "vocab_size is 999, but the target has 2048"),
    "another target": ({"target_hidden_size": 32}, None, EVERY, "hidden states of 32 numbers"),
    "null": ({"target_hidden_size": "null"}, None, EVERY - {"official"}, "target_hidden_size is null"),
    "head_dim": ({"head_dim": 32}, None, {"official"}, "head_dim is 32"),
    "more layers": ({"num_hidden_layers": 2}, None, {"official"}, "num_hidden_layers is 2"),
    "activation": ({"hidden_act": "gelu"}, None, EVERY - {"official"}, "hidden_act is gelu"),
    "no architecture": ({"architectures": None}, None, EVERY - {"official"}, "names no architectures"),
    "llama": ({"architectures": ["LlamaForCausalLM"]}, None, {"sglang"}, "architectures is LlamaForCausalLM"),
    "model_type": ({"model_type": "qwen3"}, None, EVERY - {"official"}, "model_type is qwen3"),
    "SGLang's ids only": ({"eagle_aux_hidden_state_layer_ids": None}, None, {"vllm"}, r"gets \[0, 2, 3\]"),
    "vLLM's ids only": (
        {"eagle_config": None, "eagle_aux_hidden_state_layer_ids": [1, 4, 6]}, None, {"sglang"},
        r"outputs of layers \[0, 3, 5\], but gets \[1, 3, 4\]: SGLang",
    ),
    "ids for neither": (
        {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [2, 4, 5]}}, None, {"vllm"}, r"gets \[1, 3, 4\]: vLLM",
    ),
    "built-in ids": (
        {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [0, 3, 5]},
         "eagle_aux_hidden_state_layer_ids": [1, 4, 6]}, None, {"official"}, "built in",
    ),
    "too few ids": ({"eagle_config": {"eagle_aux_hidden_state_layer_ids": [3]}}, None, EVERY, "must be three of 0..7"),
    "too high ids": (
        {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 3, 8]}}, None, EVERY, "must be three of 0..7",
    ),
    "positions": ({"max_position_embeddings": 256}, None, {"sglang"}, "max_position_embeddings is 256"),
    "residual": ({"norm_before_residual": True}, None, EVERY - {"vllm"}, "norm_before_residual is true"),
    "fc_norm flag": ({"fc_norm": True}, None, EVERY - {"official"}, "fc_norm.0.weight is missing"),
    "fc_norm tensor": ({}, put("fc_norm.0.weight", lambda t: torch.ones(64)), EVERY, "does not say fc_norm"),
    "fc_norm": ({"fc_norm": True}, put("aux_norm_low.weight", lambda t: torch.ones(64)), {"official"}, "not compute"),
    "norm_output": ({"norm_output": True}, None, {"official"}, "norm_output is true"),
    "tied": ({"tie_word_embeddings": True}, None, {"sglang"}, "tie_word_embeddings is true"),
}  # fmt: skip


@pytest.mark.parametrize("name", DEFECTS)
def test_every_defect_is_found(folder, target, name):
    config, tensors, engines, words = DEFECTS[name]
    edit(folder / "portable", config, tensors)
    wrong = found(folder / "portable", target, WRONG)
    named = [f for f in wrong if re.search(words, f.sentence)]
    assert named and set(named[0].engines) == engines


@pytest.mark.parametrize(
    ("config", "tensors", "severity", "words"),
    [
        ({"rope_theta": 5e5}, None, WARNING, "rope_theta is 500000, while the target's is 10000"),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 8}},
            None,
            WARNING,
            "type llama3 stops the official code",
        ),
        ({"target_hidden_size": 64}, None, WARNING, "target_hidden_size equals hidden_size"),
        (
            {"eagle_config": None, "eagle_aux_hidden_state_layer_ids": None},
            None,
            NOTE,
            r"its default, \[1, 3, 4\]",
        ),
        ({}, lambda t: t.pop("t2d") is None, NOTE, "t2d is missing"),
        (
            {},
            lambda t: {n: x.float() if x.is_floating_point() else x for n, x in t.items()},
            NOTE,
            "are float32",
        ),
    ],
)
def test_what_is_only_worth_a_word(folder, target, config, tensors, severity, words):
    edit(folder / "portable", config, tensors)
    (finding,) = found(folder / "portable", target)
    assert finding.severity == severity
    assert re.search(words, finding.sentence)


@pytest.mark.parametrize(
    ("config", "severity", "words"),
    [
        ({"norm_before_residual": True}, WRONG, "only vLLM computes"),
        ({"norm_before_residual": None}, WARNING, "vLLM takes for true"),
        ({"speculators_config": None}, WRONG, "lacks speculators_config.proposal_methods"),
        ({"draft_vocab_size": None}, WRONG, "lacks draft_vocab_size"),
        ({"speculators_model_type": "eagle"}, WRONG, "is no EAGLE3"),
        ({"eagle_aux_hidden_state_layer_ids": [1, 3, 4]}, WRONG, r"outputs of layers \[0, 2, 3\]"),
    ],
)
def test_defects_of_the_speculators_form(folder, target, config, severity, words):
    edit(folder / "speculators", config)
    named = found(folder / "speculators", target, severity)
    assert any(re.search(words, finding.sentence) for finding in named)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"hidden_size": "64"}, "hidden_size='64' in config.json must be a whole number above 0"),
        ({"num_attention_heads": 0}, "num_attention_heads=0 in config.json"),
        (
            {"eagle_aux_hidden_state_layer_ids": 3},
            "eagle_aux_hidden_state_layer_ids=3 must be a list",
        ),
    ],
)
def test_what_is_no_config_is_refused(folder, config, words):
    edit(folder / "portable", config)
    with pytest.raises(RunError, match=re.escape(words)):
        read_any(folder / "portable")
    (folder / "portable").rename(folder / "draft")
    with pytest.raises(RunError, match="the draft is its folder draft/"):
        read_any(folder)


def test_a_pickle_is_read_without_running_it(folder, target):
    draft = folder / "portable"
    torch.save(load_file(draft / "model.safetensors"), draft / "pytorch_model.bin")
    (draft / "model.safetensors").unlink()
    (note,) = found(draft, target)
    assert note.severity == NOTE and "pickle" in note.sentence

    class Evil:
        def __reduce__(self):
            return print, ("code ran",)

    torch.save({"fc.weight": Evil()}, draft / "pytorch_model.bin")
    with pytest.raises(RunError, match="would run code"):
        read_any(draft)


def test_sharded_weights_are_read(folder, target):
    draft = folder / "portable"
    tensors = load_file(draft / "model.safetensors")
    (draft / "model.safetensors").unlink()
    halves = {"a.safetensors": sorted(tensors)[:5], "b.safetensors": sorted(tensors)[5:]}
    for shard, held in halves.items():
        save_file({name: tensors[name] for name in held}, draft / shard)
    index = {"weight_map": {name: shard for shard, held in halves.items() for name in held}}
    (draft / "model.safetensors.index.json").write_text(json.dumps(index))
    assert found(draft, target) == []


def test_a_shipped_embedding_is_compared_with_the_targets(folder, target, target_folder):
    draft = folder / "portable"
    weights = load_weights(spec_of(target_folder, dtype="auto"), torch.device("cpu"))
    run = SimpleNamespace(load_weights=lambda: weights)
    assert list(embedding(read_any(draft), run)) == []
    shipped = weights.embedding.bfloat16()
    edit(draft, tensors=put("embed_tokens.weight", lambda t: shipped))
    (copy,) = embedding(read_any(draft), run)
    assert copy.severity == NOTE and "copy" in copy.sentence
    edit(draft, tensors=put("embed_tokens.weight", lambda t: shipped.roll(1, 0)))
    (other,) = embedding(read_any(draft), run)
    assert other.severity == WRONG and "differs" in other.sentence and set(other.engines) == EVERY
    edit(draft, {"target_hidden_size": 32}, drop("embed_tokens.weight"))
    (own,) = embedding(read_any(draft), run)
    assert own.severity == WRONG and "of its own" in own.sentence


def test_every_form_reads_as_the_same_draft(folder, target):
    portable = read_draft(folder / "portable", Auto, target, LAYERS)
    other = read_draft(folder / "speculators", Auto, target, LAYERS)
    assert other.config == portable.config
    for name, tensor in portable.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name])
    edit(folder / "speculators", {"norm_before_residual": None})
    with pytest.raises(RunError, match="norm_before_residual=true"):
        read_draft(folder / "speculators", Auto, target, LAYERS)
    edit(folder / "portable", {"rope_scaling": {"rope_type": "llama3", "factor": 8}})
    with pytest.raises(RunError, match="rope_scaling="):
        read_draft(folder / "portable", Auto, target, LAYERS)


def test_hub_ids(tmp_path, monkeypatch):
    """A local folder wins; what is not there and cannot be fetched is one sentence."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "some" / "draft").mkdir(parents=True)
    assert str(locate("some/draft")) == "some/draft"
    with pytest.raises(
        RunError, match=r"^draft_path=nobody/nothing is no folder and the hub cannot be reached"
    ):
        locate("nobody/nothing")


def test_what_acceptance_lengths_give_away(folder, target):
    assert not list(judge(Decoded(4, 64, 5, {"1,3,4": 2.7})))
    (none,) = judge(Decoded(4, 64, 5, {"1,3,4": 1.0, "0,2,3": 1.0}))
    assert none.severity == WRONG and "exactly 1.0" in none.sentence
    (little,) = judge(Decoded(4, 64, 5, {"1,3,4": 1.1}))
    assert little.severity == WARNING
    (layers,) = judge(Decoded(4, 64, 5, {"2,4,5": 1.04, "1,3,4": 2.77}))
    assert layers.severity == WRONG and "fed by layers 1,3,4 it accepts 2.77" in layers.sentence
    edit(folder / "portable", {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [2, 4, 5]}})
    assert candidates(read_any(folder / "portable"), target) == [[2, 4, 5], [1, 3, 4]]


def run_check(draft, target_path, run_dir, *more):
    """`python run.py 'stages=[check]'` in this process."""
    given = [
        "stages=[check]",
        f"draft_path={draft}",
        "model=hf",
        f"model.path={target_path}",
        "model.dtype=float32",
    ]
    given += [
        "check.num_prompts=1",
        "check.max_new_tokens=24",
        "launch.threads=1",
        "name=check",
        *more,
    ]
    run_dir.mkdir()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = load_config(compose("run", overrides=given), run_dir, given)
    checks.check(config)
    return launch(config, run_dir, given)


def test_the_stage_decodes_and_ends_with_a_line_for_each_thing_wrong(
    folder, target_folder, tmp_path
):
    """The draft is untrained, so its acceptance is exactly 1."""
    edit(folder / "portable", {"max_position_embeddings": 256})
    with pytest.raises(RunError) as caught:
        run_check(folder / "portable", target_folder, tmp_path / "run")
    message, exit_code = explain(caught.value, ROOT / "conf")
    errors = f"error: {message}".splitlines()
    assert (
        exit_code == 1 and len(errors) == 2 and all(line.startswith("error: ") for line in errors)
    )
    assert "SGLang: max_position_embeddings" in errors[0] and "exactly 1.0" in errors[1]
    content = json.loads((tmp_path / "run" / "check.json").read_text())
    assert (
        content["decoded"]["acceptance_length"]["1,3,4"] == 1.0
        and content["layers"]["vllm"] == LAYERS
    )
    assert [f["severity"] for f in content["findings"]] == [WRONG, WRONG]


def test_without_the_targets_weights_only_the_files_are_judged(
    folder, target_folder, tmp_path, capsys
):
    (tmp_path / "bare").mkdir()
    shutil.copy(target_folder / "config.json", tmp_path / "bare")
    edit(folder / "portable", {"max_position_embeddings": 256})
    run_check(
        folder / "portable", tmp_path / "bare", tmp_path / "run", "check.engines=[vllm,official]"
    )
    assert "no prompt was decoded" in capsys.readouterr().out


def test_what_is_asked_wrongly_is_refused(folder, target_folder, tmp_path):
    with pytest.raises(ConfigError, match=r"check\.engines=ollama is unknown; allowed: sglang"):
        run_check(folder / "portable", target_folder, tmp_path / "1", "check.engines=[ollama]")
    with pytest.raises(
        ConfigError, match=r"draft_path=/no/where does not exist; give a local folder or a hub id"
    ):
        run_check("/no/where", target_folder, tmp_path / "2")
    with pytest.raises(ConfigError, match="needs a draft: set draft_path"):
        run_check("null", target_folder, tmp_path / "3")


def test_the_layers_a_draft_was_made_for_are_found_by_decoding(
    folder, target_folder, tmp_path, monkeypatch
):
    """A stand-in decoder accepts 3 tokens a round from layers 1, 3, 4, and none from those that
    config.json names.
    """

    def stand_in(target, draft, prompts, *tree_and_length):
        aux, _ = target.states(prompts[0], torch.arange(len(prompts[0])))
        assert aux.shape == (len(prompts[0]), 3 * 64)
        return [
            Generation([1], emitted=[3 if target.aux_layer_ids == LAYERS else 1] * 4)
            for _ in prompts
        ]

    monkeypatch.setattr("eagle3.benchmark.check.speculate", stand_in)
    given = {"eagle_aux_hidden_state_layer_ids": [2, 4, 5]}
    edit(
        folder / "portable", {"eagle_config": given, "eagle_aux_hidden_state_layer_ids": [3, 5, 6]}
    )
    words = r"fed by layers 1,3,4 it accepts 3\.00 tokens a round, by the named 2,4,5 only 1\.00"
    with pytest.raises(RunError, match=words):
        run_check(folder / "portable", target_folder, tmp_path / "run")
    content = json.loads((tmp_path / "run" / "check.json").read_text())
    assert content["decoded"]["acceptance_length"] == {"2,4,5": 1.0, "1,3,4": 3.0}
