from functools import partial
from itertools import product

import pytest
import torch
from conftest import fit, soft_target_loss, spec_of
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaForCausalLM, MistralForCausalLM, Qwen3ForCausalLM

from eagle3.batch import Document, pack, serving
from eagle3.decode.drafter import Drafter
from eagle3.decode.speculate import Sampling, accept_matching, generate, speculate
from eagle3.decode.tree import Candidates, Tree
from eagle3.decode.tree import chain as drafted_chain
from eagle3.draft.block import DFlashConfig, DSparkConfig
from eagle3.draft.flash import FlashCPU
from eagle3.draft.model import EAGLE3, DraftConfig
from eagle3.draft.ttt import unroll
from eagle3.errors import ConfigError
from eagle3.evaluate import evaluate, pack_answers
from eagle3.loss import FrozenWeights
from eagle3.target.hf import HFTarget

CPU = torch.device("cpu")


def make_target(folder, model_class=LlamaForCausalLM, layers=4, attention="auto", **special):
    torch.manual_seed(layers)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": layers}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    tokens = {"vocab_size": 64, "bos_token_id": None, "eos_token_id": None}
    more = shape | heads | tokens | special
    config = model_class.config_class(initializer_range=0.15, **more)
    model_class(config).double().save_pretrained(folder)
    spec = spec_of(folder, [0, layers // 2, layers - 1], dtype="float64")
    return HFTarget(spec, CPU, attention=attention)


def alone(target, prompt, max_new_tokens):
    return generate(target, [prompt], max_new_tokens)[0]


def chain(target, draft, prompt, steps, max_new_tokens, rule=None):
    return speculate(target, draft, [prompt], steps, 1, steps + 1, max_new_tokens, rule)[0]


def tree_of(topk, verify_tokens, target, draft, prompt, steps, max_new_tokens, rule=None):
    tree = steps, topk, verify_tokens
    return speculate(target, draft, [prompt], *tree, max_new_tokens, rule)[0]


def make_draft(target, draft_vocab_size, seed=0, **variant):
    torch.manual_seed(seed)
    vocab_size, hidden = target.embedding.shape
    kept = torch.randperm(vocab_size)[:draft_vocab_size].sort().values
    t2d = torch.zeros(vocab_size, dtype=torch.bool).index_fill_(0, kept, True)
    sizes = hidden, 2 * hidden, 4, 2, hidden // 4, vocab_size, draft_vocab_size, hidden, 512
    config = DraftConfig(*sizes, initializer_range=0.15, **variant)
    draft = EAGLE3(config, FlashCPU, t2d, kept - torch.arange(draft_vocab_size)).double()
    for name, parameter in draft.named_parameters():
        if "norm" in name and variant:  # as if trained: else they would hardly matter
            parameter.data += 0.5 * torch.randn_like(parameter)
    return draft


def make_block(target, kind):
    """A draft of chains of four tokens."""
    torch.manual_seed(0)
    vocab_size, hidden = target.embedding.shape
    sizes = hidden, 2 * hidden, 4, 2, hidden // 4, vocab_size, vocab_size, hidden, 512
    shape = {"num_hidden_layers": 1, "block_size": 4 + kind.drafts_from, "mask_token_id": 1}
    config = kind(*sizes, initializer_range=0.15, **shape)
    whole = torch.ones(vocab_size, dtype=torch.bool)
    return config.build(FlashCPU, whole, torch.zeros(vocab_size, dtype=torch.int64)).double()


def batch_of(texts, prompt_length, draft, ttt_steps):
    documents = [(i, ids, torch.arange(len(ids)) >= prompt_length) for i, ids in enumerate(texts)]
    return pack([Document(*d) for d in documents], draft.t2d, ttt_steps, serving)


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return make_target(tmp_path_factory.mktemp("target"))


@pytest.fixture(scope="module")
def prompts():
    return list(torch.randint(64, (4, 6), generator=torch.Generator().manual_seed(3)))


def fit_to_answers(draft, target, prompts):
    pairs = zip(prompts, generate(target, prompts, 48), strict=True)
    texts = [torch.cat([prompt, torch.tensor(answer.ids)]) for prompt, answer in pairs]
    batch = batch_of(texts, 6, draft, 4)
    batch.features = target(batch)
    fit(draft, target, batch, updates=60, lr=3e-3)
    return draft


@pytest.fixture(scope="module")
def trained(target, prompts):
    """A draft of three quarters of the vocabulary, fitted to the answers to `prompts`."""
    return fit_to_answers(make_draft(target, 48), target, prompts)


@pytest.fixture(scope="module", params=["EAGLE3", DFlashConfig, DSparkConfig])
def any_trained(target, prompts, trained, request):
    if request.param == "EAGLE3":
        return trained
    return fit_to_answers(make_block(target, request.param), target, prompts[:2])


def teacher_forced(draft, target, aux, batch, ttt_steps):
    """Logits of `unroll` by (row, step)."""
    hidden = draft.unroll(target.embedding, aux, batch)
    outputs = draft.logits(hidden, target.head).split(batch.row_counts)
    rows = batch.rows.tolist()
    return {(rows[i], k): x for k in range(ttt_steps) for i, x in enumerate(outputs[k])}


@pytest.mark.parametrize("steps", [4, 2])
@pytest.mark.runs
def test_emitted_equals_anchor_walk(target, any_trained, prompts, steps):
    """The rounds of decoding are those that one teacher-forced unroll of the answer predicts, for a
    block drafter of a block as short as it is decoded with.
    """
    draft, rounds, documents = any_trained, [], []
    prompts = prompts[:2]
    together = speculate(target, draft, prompts, steps, 1, steps + 1, 40)
    expected = generate(target, prompts, 40)
    for prompt, of_batch, answer in zip(prompts, together, expected, strict=True):
        generation = chain(target, draft, prompt, steps, 40)
        assert generation.ids == of_batch.ids == answer.ids
        assert generation.emitted == of_batch.emitted and generation.accepted == of_batch.accepted
        text = torch.cat([prompt, torch.tensor(generation.ids)])
        batch = batch_of([text], 0, draft, steps)
        aux, _ = target.states(text, batch.position_ids)
        logits = teacher_forced(draft, target, aux, batch, steps)
        row, emitted, accepted = len(prompt) - 1, [], []
        while row + 2 < len(text):
            count = 0
            while count < steps and row + count + 2 < len(text):
                drafted = draft.target_ids[logits[row, count].argmax()]
                if drafted != text[row + count + 2]:
                    break
                count += 1
            emitted.append(min(count + 1, len(text) - row - 2))
            accepted.append(count)
            row += count + 1
        assert emitted == generation.emitted and accepted == generation.accepted
        rounds.append(len(emitted))
        batch = batch_of([text], len(prompt), draft, steps)
        documents.append(Document(0, text, batch.loss_mask, target(batch)))
    assert sum(rounds) < 0.65 * 39 * len(prompts), "the draft should be good enough for long runs"
    packed = pack_answers(documents, draft.t2d, steps, 100)
    frozen = FrozenWeights(target.embedding, target.head[draft.target_ids])
    assert evaluate(draft, frozen, soft_target_loss(), {0.0: packed}, steps).rounds == rounds


@pytest.mark.parametrize("model_class, layers", [(LlamaForCausalLM, 2), (Qwen3ForCausalLM, 8)])
def test_greedy_is_lossless_with_a_random_draft(tmp_path, model_class, layers):
    target = make_target(tmp_path, model_class, layers)
    prompt = torch.randint(64, (9,), generator=torch.Generator().manual_seed(layers))
    expected = alone(target, prompt, 20)
    ids = expected.ids
    for length in range(len(ids) - 1):  # the cache adds nothing to what the model says without one
        text = torch.cat([prompt, torch.tensor(ids[:length], dtype=torch.long)])
        _, last = target.states(text, torch.arange(9 + length))
        assert int(target.lm_head(last[-1:]).argmax()) == ids[length]
    generation = chain(target, make_draft(target, 40), prompt, 3, 20)
    assert generation.ids == ids and sum(generation.emitted) == len(ids) - 1
    assert expected.emitted == [1] * 19


def test_draft_in_another_dtype_and_training_afterwards(target, trained, prompts):
    """fp32 weights beside an fp64 target; decoding leaves nothing that autograd refuses."""
    draft = make_draft(target, 48)
    expected = chain(target, draft, prompts[0], 3, 12)
    assert chain(target, draft.float(), prompts[0], 3, 12).ids == expected.ids
    assert draft.lm_head.weight.dtype == torch.float32
    batch = batch_of([prompts[0].repeat(2)], 1, draft, 3)
    aux, _ = target.states(batch.input_ids, batch.position_ids)
    unroll(draft, target.embedding, aux, batch).sum().backward()


class Markov:
    """A target whose next token depends on the newest alone: its distribution is known."""

    def __init__(self, vocab_size, hidden):
        random = torch.Generator().manual_seed(0)
        normal = torch.randn(2, vocab_size, hidden, generator=random, dtype=torch.float64)
        self.embedding, self.head = 0.6 * normal
        self.eos_token_ids = set()

    def states(self, input_ids, position_ids, cache=None, visible=None):
        last = self.embedding[input_ids]
        return torch.cat([last] * 3, dim=-1), last

    def lm_head(self, last):
        return last @ self.head.T


@pytest.mark.parametrize("topk, verify_tokens", [(1, 3), (3, 9)])
def test_samples_are_distributed_as_the_target(topk, verify_tokens):
    """Answer tokens 1 and 2 of 4000 sampled answers, of 24 x 24 (the draft knows 16 of these)."""
    target, prompt = Markov(24, 16), torch.tensor([3, 11, 5])
    following = (target.lm_head(target.embedding) / 0.7).softmax(-1)
    expected = 4000 * ((following[prompt[-1]] @ following)[:, None] * following).flatten()
    counts = torch.zeros(24, 24, dtype=torch.float64)
    draft, sampling = make_draft(target, 16), Sampling(0.7, torch.Generator().manual_seed(0))
    for answer in speculate(target, draft, [prompt] * 4000, 2, topk, verify_tokens, 3, sampling):
        counts[answer.ids[1], answer.ids[2]] += 1
    rare = expected < 5  # such cells are merged
    seen, said = (torch.cat([x[~rare], x[rare].sum()[None]]) for x in (counts.flatten(), expected))
    chi_square = ((seen - said) ** 2 / said).sum()
    freedom = torch.tensor((len(said) - 1) / 2).double()
    assert torch.special.gammaincc(freedom, chi_square / 2) > 0.01


def test_a_tree_followed_by_samples_gives_exactly_the_targets_distribution():
    """All that the target can say behind 6 nodes of a tree over 3 tokens, by probability."""
    paths = ([0], [0, 1], [0, 2], [0, 1, 3], [0, 2, 4], [0, 2, 5])
    tree = Tree(
        ids=torch.tensor([[0, 1, 2, 1, 0, 2]]),
        depths=torch.tensor([[0, 1, 1, 2, 2, 2]]),
        parents=torch.tensor([[0, 0, 0, 1, 2, 2]]),
        mask=torch.tensor([[[j in path for j in range(6)] for path in paths]]),
    )
    random = torch.Generator().manual_seed(0)
    following = torch.rand(3, 3, dtype=torch.float64, generator=random).softmax(-1)
    said = torch.cartesian_prod(*[torch.arange(3)] * 6)
    many = Tree(tree.ids.expand(len(said), -1), tree.depths, tree.parents, tree.mask)
    probabilities = following[tree.ids, said].prod(1)
    accepted = accept_matching(many, said)
    assert set(accepted.counts) == {1, 2, 3}
    joint = torch.zeros(3, 3, 3, dtype=torch.float64)
    for ids, path, count, probability in zip(
        accepted.ids, accepted.path, accepted.counts, probabilities
    ):
        assert tree.depths[0, path[:count]].tolist() == list(range(count))
        assert tree.ids[0, path[1:count]].tolist() == ids[: count - 1].tolist()
        first, rest = ids[0], following[ids[count - 1]]
        if count == 1:
            joint[first] += probability * rest[:, None] * following
        elif count == 2:
            joint[first, ids[1]] += probability * rest
        else:
            joint[first, ids[1], ids[2]] += probability
    expected = following[0][:, None, None] * following[:, :, None] * following[None]
    torch.testing.assert_close(joint, expected, rtol=1e-12, atol=1e-12)


def test_sampling_is_reproducible_and_survives_equal_distributions(target, trained, prompts):
    for sampled in (chain, partial(tree_of, 3, 8)):
        rules = [Sampling(1.0, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
        runs = [sampled(target, trained, prompts[2], 4, 24, rule).ids for rule in rules]
        assert runs[0] == runs[1] != runs[2]
    same = torch.full((1, 2, 4), 0.25).log()
    rule = Sampling(1.0, torch.Generator().manual_seed(0))
    drafted = drafted_chain(torch.tensor([[3, 2]]), [same[:, 0]])
    accepted = rule.verify(drafted, same, torch.arange(4))
    assert accepted.ids[0, 0] == 2 and accepted.counts == [2]


def slow_tree(draft, embedding, aux, text, steps, topk, verify_tokens):
    """Paths of the tree behind `text` [n + 1] with features [n,A]: an `unroll` for each node."""

    def children(path):
        # Rows at the end of a document have no later steps.
        whole = torch.cat([text, torch.tensor([*path, 0, 0])])
        batch = batch_of([whole], 0, draft, len(path) + 1)
        padded = torch.cat([aux, torch.zeros(len(whole) - len(aux), aux.shape[1], dtype=aux.dtype)])
        place = batch.rows[: batch.row_counts[len(path)]].tolist().index(len(aux) - 1)
        hidden = unroll(draft, embedding, padded, batch).split(batch.row_counts)[len(path)][place]
        scores = draft.logits(hidden[None], None)[0].log_softmax(-1)
        best = scores.argsort(descending=True)[:topk]
        return [(float(scores[i]), (*path, int(draft.target_ids[i]))) for i in best]

    drafted, frontier = [], [(0.0, ())]
    for _ in range(steps):
        level = []
        for total, parent in frontier:
            level += [(total + score, path) for score, path in children(parent)]
        drafted += level
        frontier = sorted(level, reverse=True)[:topk]
    return {path for _, path in sorted(drafted, reverse=True)[: verify_tokens - 1]}


EAGLE31 = {"num_aux_hidden_states": 5, "fc_norm": True, "norm_output": True}


@pytest.mark.parametrize(
    "steps, topk, verify_tokens, variant",
    [(3, 3, 10, {}), (2, 5, 31, {}), (3, 4, 2, {}), (5, 1, 6, {}), (3, 3, 10, EAGLE31)],
)
def test_tree_equals_a_slow_one(target, steps, topk, verify_tokens, variant):
    """Of a batch of texts of uneven lengths, over two rounds, so that slots are soiled."""
    draft, random = make_draft(target, 48, **variant), torch.Generator().manual_seed(steps)
    texts = [torch.randint(64, (n,), generator=random) for n in (9, 4, 12)]
    normal = partial(torch.randn, dtype=torch.float64, generator=random)
    aux = [normal(len(text) - 1, draft.config.aux_size) for text in texts]
    with torch.inference_mode():
        drafter = Drafter(draft, target, texts, 8, (steps, topk, verify_tokens))
        for counts, before in (([4, 1, 2], [0, 0, 0]), ([4, 2, 9], [4, 1, 2])):
            ends = [b + c for b, c in zip(before, counts, strict=True)]
            spans = [slice(b, e) for b, e in zip(before, ends, strict=True)]
            new_aux = [x[span] for x, span in zip(aux, spans, strict=True)]
            new_ids = [text[1:][span] for text, span in zip(texts, spans, strict=True)]
            padded = partial(pad_sequence, batch_first=True, padding_value=7)
            drafter.append(padded(new_aux), padded(new_ids), counts)
            newest = torch.stack([text[end] for text, end in zip(texts, ends, strict=True)])
            tree = drafter.propose(newest, Sampling())
            masks, depths, parent = (
                x.expand(3, *x.shape[1:]) for x in (tree.mask, tree.depths, tree.parents)
            )
            for i, end in enumerate(ends):
                read = aux[i][:end], texts[i][: end + 1]
                expected = slow_tree(draft, target.embedding, *read, steps, topk, verify_tokens)
                seen = [tree.ids[i, mask][1:].tolist() for mask in masks[i]]
                assert {tuple(path) for path in seen[1:]} == expected and seen[0] == []
                assert depths[i].tolist() == [len(path) for path in seen]
                parents = [seen[p] for p in parent[i][1:].tolist()]
                assert parents == [path[:-1] for path in seen[1:]]
                assert tree.ids[i, 0] == newest[i]


class Counted:
    """A target that counts its forward passes."""

    def __init__(self, target):
        self.target, self.passes = target, 0

    def __getattr__(self, name):
        return getattr(self.target, name)

    def states(self, *args, **options):
        self.passes += 1
        return self.target.states(*args, **options)


@pytest.mark.parametrize("steps, topk, verify_tokens", [(3, 1, 4), (1, 4, 5), (3, 48, 100)])
@pytest.mark.runs
def test_greedy_trees_and_batches_are_lossless(target, trained, steps, topk, verify_tokens):
    """Prompts of uneven lengths: answers and rounds of each alone, a pass of the target each."""
    random, counted = torch.Generator().manual_seed(5), Counted(target)
    prompts = [torch.randint(64, (n,), generator=random) for n in (6, 1, 11)]
    batch = speculate(counted, trained, prompts, steps, topk, verify_tokens, 20)
    assert counted.passes == 1 + max(len(answer.emitted) for answer in batch)
    for prompt, answer in zip(prompts, batch, strict=True):
        single = tree_of(topk, verify_tokens, target, trained, prompt, steps, 20)
        assert answer.ids == single.ids == alone(target, prompt, 20).ids
        assert answer.emitted == single.emitted and answer.accepted == single.accepted
        assert sum(answer.emitted) == 19 and answer.decode_seconds > 0
    plain = generate(target, prompts, 20)
    assert [answer.ids for answer in plain] == [answer.ids for answer in batch]


def test_a_tree_accepts_more_than_a_chain(target, trained, prompts):
    lengths = []
    for topk, verify_tokens in ((1, 5), (2, 8), (4, 24)):
        answers = speculate(target, trained, prompts, 4, topk, verify_tokens, 40)
        lengths.append(sum(sum(a.emitted) for a in answers) / sum(len(a.emitted) for a in answers))
    assert lengths[0] < lengths[1] < lengths[2] <= 5


def test_answers_of_a_batch_end_where_they_end_alone(target, trained, prompts, monkeypatch):
    """Each at its own end of sequence, one with its first token, and inside an accepted run."""
    whole = generate(target, prompts, 40)
    first, later = whole[1].ids[:9], whole[1].ids[9:]
    ends = [whole[0].ids[0], next(token for token in later if token not in first)]
    monkeypatch.setattr(target, "eos_token_ids", set(ends))
    expected = [alone(target, prompt, 40).ids for prompt in prompts]
    assert len({len(ids) for ids in expected}) > 2 and len(expected[0]) == 1
    for steps, topk, verify_tokens in ((4, 1, 5), (4, 4, 16), (6, 4, 30)):
        answers = speculate(target, trained, prompts, steps, topk, verify_tokens, 40)
        assert [answer.ids for answer in answers] == expected
        assert [sum(answer.emitted) for answer in answers] == [len(ids) - 1 for ids in expected]
        assert answers[0].emitted == [] and answers[0].decode_seconds < answers[1].decode_seconds
    for count, tree in product(range(1, 12), [(4, 1, 5), (4, 4, 16)]):
        answers = speculate(target, trained, prompts, *tree, count)
        assert [answer.ids for answer in answers] == [ids[:count] for ids in expected]
        assert [sum(a.emitted) + 1 for a in answers] == [len(ids[:count]) for ids in expected]


@pytest.mark.parametrize("attention", ["auto", "eager"])
@pytest.mark.parametrize("model_class", [MistralForCausalLM, Qwen3ForCausalLM])
def test_trees_and_batches_with_sliding_windows(tmp_path, model_class, attention):
    mixed = {"use_sliding_window": True, "max_window_layers": 2}
    special = mixed if model_class is Qwen3ForCausalLM else {}
    target = make_target(tmp_path, model_class, attention=attention, sliding_window=8, **special)
    prompts = [torch.randint(64, (n,), generator=torch.Generator().manual_seed(n)) for n in (12, 5)]
    expected = [alone(target, prompt, 20).ids for prompt in prompts]
    answers = speculate(target, make_draft(target, 40), prompts, 3, 4, 12, 20)
    assert [answer.ids for answer in answers] == expected
    text = torch.cat([prompts[0], torch.tensor(expected[0][:-1])])
    _, last = target.states(text, torch.arange(len(text)))
    assert target.lm_head(last)[11:].argmax(-1).tolist() == expected[0]


IMPOSSIBLE = [
    ((3, 49, 60), "topk in 1..48"),
    ((0, 4, 5), "steps must be at least 1"),
    ((2, 3, 14), r"verify_tokens must be in 2\.\.13"),
    ((2, 3, 1), r"verify_tokens must be in 2\.\.13"),
    ((3, 1, 3), "set verify_tokens=4"),
]


CHAINS_OF_FOUR = [((5, 1, 6), r"steps in 1\.\.4"), ((3, 2, 6), "topk must be 1"), IMPOSSIBLE[-1]]


@pytest.mark.parametrize("tree, message", CHAINS_OF_FOUR)
@pytest.mark.parametrize("kind", [DFlashConfig, DSparkConfig])
def test_a_block_drafter_refuses_what_is_no_chain_of_its_block(target, kind, tree, message):
    with pytest.raises(ConfigError, match=message):
        speculate(target, make_block(target, kind), [], *tree, 8)


@pytest.mark.parametrize("tree, message", IMPOSSIBLE)
def test_trees_that_cannot_be_are_refused(target, trained, prompts, tree, message):
    with pytest.raises(ConfigError, match=message):
        speculate(target, trained, prompts, *tree, 8)


def test_certain_drafts_keep_the_tree_closed():
    """Where children are as likely as their parents, the parents come first."""
    candidates = Candidates(1, 3, CPU)
    for certain, frontier in enumerate((1, 3, 3)):
        candidates.extend(200.0 * (torch.arange(4) == certain).expand(1, frontier, 4))
    tree = candidates.tree(torch.tensor([9]), torch.arange(4), 3)
    assert tree.ids.tolist() == [[9, 0, 1]] and tree.parents.tolist() == [[0, 0, 1]]
    assert tree.depths.tolist() == [[0, 1, 2]]
