import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from eagle3 import decode
from eagle3.data.packing import pack
from eagle3.data.supervision import serving
from eagle3.decode import Drafter, Greedy, Sample, generate, speculate
from eagle3.draft.attention import FlashCPU
from eagle3.draft.model import Draft, DraftConfig
from eagle3.loss import SoftTargetLoss, kl
from eagle3.target.hf import HFTarget
from eagle3.ttt import unroll

torch.set_num_threads(1)
CPU = torch.device("cpu")


def make_target(folder, model_class=LlamaForCausalLM, layers=4, vocab_size=64, hidden=64):
    torch.manual_seed(layers)
    config_class = {LlamaForCausalLM: LlamaConfig, Qwen3ForCausalLM: Qwen3Config}[model_class]
    config = config_class(
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=hidden // 4,
        vocab_size=vocab_size,
        initializer_range=0.15,
        bos_token_id=None,
        eos_token_id=None,
    )
    model_class(config).double().save_pretrained(folder)
    return HFTarget(str(folder), CPU, aux_layer_ids=[0, layers // 2, layers - 1], dtype="float64")


def make_draft(target, draft_vocab_size, seed=0):
    torch.manual_seed(seed)
    vocab_size, hidden = target.embedding.shape
    kept = torch.randperm(vocab_size)[:draft_vocab_size].sort().values
    t2d = torch.zeros(vocab_size, dtype=torch.bool).index_fill_(0, kept, True)
    config = DraftConfig(
        hidden, 2 * hidden, 4, 2, hidden // 4, vocab_size, draft_vocab_size, hidden, 512, initializer_range=0.15
    )
    return Draft(config, FlashCPU, t2d, kept - torch.arange(draft_vocab_size)).double()


def batch_of(texts, prompt_length, draft, ttt_steps):
    documents = [(i, ids, torch.arange(len(ids)) >= prompt_length) for i, ids in enumerate(texts)]
    return pack(documents, draft.t2d, ttt_steps, serving)


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return make_target(tmp_path_factory.mktemp("target"))


@pytest.fixture(scope="module")
def prompts():
    return list(torch.randint(64, (4, 6), generator=torch.Generator().manual_seed(3)))


@pytest.fixture(scope="module")
def trained(target, prompts):
    """A draft over three quarters of the vocabulary, fitted to what the target answers to `prompts`."""
    draft = make_draft(target, 48)
    texts = [torch.cat([p, torch.tensor(generate(target, p, 48).ids)]) for p in prompts]
    batch = batch_of(texts, 6, draft, 4)
    features = target(batch)
    optimizer = torch.optim.AdamW(draft.parameters(), lr=3e-3)
    loss = SoftTargetLoss(kl)
    for _ in range(60):
        hidden = unroll(draft, target.embedding, features.aux_hidden_states, batch)
        output = loss(draft, hidden, features, batch, target.head[draft.t2d])
        (output.loss / batch.normaliser).backward()
        optimizer.step()
        optimizer.zero_grad()
    return draft


class Forced(Greedy):
    """Drafts the tokens of a text, whatever the scores."""

    def __init__(self, draft_ids):
        self.draft_ids = iter(draft_ids)

    def draw(self, scores):
        return next(self.draft_ids)[None]


def teacher_forced(draft, embedding, aux, batch, ttt_steps):
    """Logits of `unroll` by (row, step)."""
    outputs = draft.logits(unroll(draft, embedding, aux, batch)).split(batch.row_counts)
    return {(int(row), k): x for k in range(ttt_steps) for row, x in zip(batch.rows, outputs[k], strict=False)}


def test_chain_equals_unroll(target):
    """Every round of every row, over rows read in uneven pieces and slots soiled by earlier drafts."""
    draft, length, steps = make_draft(target, 48), 40, 6
    draft_ids = torch.randint(48, (length,), generator=torch.Generator().manual_seed(1))
    text = draft.target_ids[draft_ids]
    aux = torch.randn(length, 3 * 64, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    expected = teacher_forced(draft, target.embedding, aux, batch_of([text], 0, draft, steps), steps)

    with torch.inference_mode():
        drafter, compared = Drafter(draft, target.embedding, length + steps), 0
        for size in (1, 5, 2, 1, 7, 4, 3, 8):
            before = drafter.length
            drafter.read(aux[before : before + size], text[before + 1 : before + size + 1])
            row = drafter.length - 1
            drafted, scores = drafter.chain(steps, Forced(draft_ids[row + 2 :]))
            assert drafted.tolist() == text[row + 2 : row + 2 + steps].tolist()
            for step in range(steps):
                if (row, step) in expected:
                    torch.testing.assert_close(scores[step][0], expected[row, step], rtol=1e-10, atol=1e-10)
                    compared += 1
    assert compared > 40


def test_emitted_equals_anchor_walk(target, trained, prompts):
    """The rounds of decoding are those that one teacher-forced unroll of the answer predicts."""
    steps, rounds = 4, 0
    for prompt in prompts:
        generation = speculate(target, trained, prompt, steps, 40)
        text = torch.cat([prompt, torch.tensor(generation.ids)])
        batch = batch_of([text], 0, trained, steps)
        aux, _ = target.states(text, batch.position_ids)
        logits = teacher_forced(trained, target.embedding, aux, batch, steps)
        row, emitted, accepted = len(prompt) - 1, [], []
        while row + 2 < len(text):
            count = 0
            while count < steps and row + count + 2 < len(text):
                drafted = trained.target_ids[logits[row, count].argmax()]
                if drafted != text[row + count + 2]:
                    break
                count += 1
            emitted.append(min(count + 1, len(text) - row - 2))
            accepted.append(count)
            row += count + 1
        assert emitted == generation.emitted and accepted == generation.accepted
        rounds += len(emitted)
    assert rounds < 0.6 * 39 * len(prompts), "the draft should be good enough for long runs"


@pytest.mark.parametrize("model_class", [LlamaForCausalLM, Qwen3ForCausalLM])
@pytest.mark.parametrize("layers", [2, 8])
def test_greedy_is_lossless_with_a_random_draft(tmp_path, model_class, layers):
    target = make_target(tmp_path, model_class, layers)
    prompt = torch.randint(64, (9,), generator=torch.Generator().manual_seed(layers))
    expected = generate(target, prompt, 30)
    ids = expected.ids
    for length in range(len(ids) - 1):  # the cache adds nothing to what the model says without one
        _, last = target.states(
            torch.cat([prompt, torch.tensor(ids[:length], dtype=torch.long)]), torch.arange(9 + length)
        )
        assert int(target.lm_head(last[-1:]).argmax()) == ids[length]
    generation = speculate(target, make_draft(target, 40), prompt, 3, 30)
    assert generation.ids == ids and sum(generation.emitted) == len(ids) - 1
    assert expected.emitted == [1] * 29 and expected.acceptance_length == 1


@pytest.mark.parametrize("draft_length", range(1, 9))
def test_greedy_is_lossless_with_a_trained_draft(target, trained, prompts, draft_length):
    """Whatever the draft length and wherever `max_new_tokens` cuts, also inside an accepted run."""
    answer = generate(target, prompts[0], 32).ids
    whole = speculate(target, trained, prompts[0], draft_length, 32)
    cut_inside = 0
    for max_new_tokens in (1, 2, 7, 11, 16, 32):
        generation = speculate(target, trained, prompts[0], draft_length, max_new_tokens)
        assert generation.ids == answer[:max_new_tokens]
        assert sum(generation.emitted) == max_new_tokens - 1
        cut_inside += generation.emitted != whole.emitted[: len(generation.emitted)]
    assert 2 <= max(whole.emitted) <= draft_length + 1
    assert cut_inside > 0 or draft_length == 1


def test_prompt_of_one_token(target, trained):
    prompt = torch.tensor([7])
    assert speculate(target, trained, prompt, 4, 20).ids == generate(target, prompt, 20).ids


def test_end_of_sequence_inside_an_accepted_run(target, trained, prompts, monkeypatch):
    whole = speculate(target, trained, prompts[1], 5, 40)
    starts = [1 + sum(whole.emitted[:r]) for r in range(len(whole.emitted))]
    place = next(
        i
        for start, count in zip(starts, whole.emitted, strict=True)
        for i in range(start, start + count - 1)
        if whole.ids.index(whole.ids[i]) == i
    )
    monkeypatch.setattr(target.model.generation_config, "eos_token_id", whole.ids[place])
    generation = speculate(target, trained, prompts[1], 5, 40)
    assert generation.ids == whole.ids[: place + 1] == generate(target, prompts[1], 40).ids
    assert sum(generation.emitted) == place

    monkeypatch.setattr(target.model.generation_config, "eos_token_id", [whole.ids[0], 63])
    generation = speculate(target, trained, prompts[1], 5, 40)
    assert generation.ids == whole.ids[:1] and generation.emitted == []


def test_draft_in_another_dtype_and_training_afterwards(target, trained, prompts):
    """fp32 weights beside an fp64 target; and decoding leaves nothing behind that autograd refuses."""
    draft = make_draft(target, 48)
    expected = speculate(target, draft, prompts[0], 3, 12)
    assert speculate(target, draft.float(), prompts[0], 3, 12).ids == expected.ids
    assert draft.lm_head.weight.dtype == torch.float32
    batch = batch_of([prompts[0].repeat(2)], 1, draft, 3)
    aux, _ = target.states(batch.input_ids, batch.position_ids)
    unroll(draft, target.embedding, aux, batch).sum().backward()


class AlwaysAccept(Sample):
    def verify(self, drafted, draft_scores, target_scores, target_ids):
        return torch.cat([drafted, self.draw(target_scores[-1:])])


class NoResidual(Sample):
    """Rejects as it should, then draws from p instead of max(p - q, 0)."""

    def verify(self, drafted, draft_scores, target_scores, target_ids):
        committed = super().verify(drafted, draft_scores, target_scores, target_ids)
        return torch.cat([committed[:-1], self.draw(target_scores[len(committed) - 1][None])])


class Markov:
    """A target whose next token depends on the newest one alone, so that distributions can be written down."""

    def __init__(self, vocab_size, hidden):
        random = torch.Generator().manual_seed(0)
        self.embedding, self.head = torch.randn(2, vocab_size, hidden, generator=random, dtype=torch.float64) * 0.6
        self.eos_token_ids = set()

    def states(self, input_ids, position_ids, cache=None):
        last = self.embedding[input_ids]
        return last.repeat(1, 3), last

    def lm_head(self, last):
        return last @ self.head.T


@pytest.fixture(scope="module")
def small():
    """A target of 24 tokens, a draft of 16 of them, and the distribution [24, 24] of answer tokens 1 and 2."""
    target, prompt = Markov(24, 16), torch.tensor([3, 11, 5])
    following = (target.lm_head(target.embedding) / 0.7).softmax(-1)
    return target, make_draft(target, 16), prompt, (following[prompt[-1]] @ following)[:, None] * following


def chi_square(counts, probabilities):
    """p-value of counts under probabilities (both flat); cells that expect less than 5 are merged."""
    expected = probabilities * counts.sum()
    rare = expected < 5
    merge = [torch.cat([x[~rare], x[rare].sum()[None]]) for x in (counts.double(), expected)]
    statistic = ((merge[0] - merge[1]) ** 2 / merge[1]).sum()
    return float(torch.special.gammaincc((len(merge[0]) - 1) / torch.tensor(2.0).double(), statistic / 2))


def p_value(small, runs, seed):
    """Of answer tokens 1 and 2 over `runs` sampled answers."""
    target, draft, prompt, probabilities = small
    generator = torch.Generator().manual_seed(seed)
    counts = torch.zeros(24, 24)
    for _ in range(runs):
        ids = speculate(target, draft, prompt, 2, 3, temperature=0.7, generator=generator).ids
        counts[ids[1], ids[2]] += 1
    return chi_square(counts.flatten(), probabilities.flatten())


def test_samples_are_distributed_as_the_target(small):
    assert p_value(small, 2000, seed=0) > 0.01


@pytest.mark.parametrize("broken, runs", [(AlwaysAccept, 300), (NoResidual, 1200)])
def test_chi_square_notices_a_broken_rule(small, monkeypatch, broken, runs):
    monkeypatch.setattr(decode, "Sample", broken)
    assert p_value(small, runs, seed=0) < 1e-6


def test_sampling_is_reproducible_and_survives_equal_distributions(target, trained, prompts):
    runs = [
        speculate(target, trained, prompts[2], 4, 24, 1.0, torch.Generator().manual_seed(seed)).ids
        for seed in (1, 1, 2)
    ]
    assert runs[0] == runs[1] != runs[2]
    same = torch.full((2, 4), 0.25)
    rule = Sample(1.0, torch.Generator().manual_seed(0))
    committed = rule.verify(torch.tensor([2]), [same[:1]], same, torch.arange(4))
    assert committed[0] == 2 and len(committed) == 2
