"""A few answers as they were drafted, round by round, for whoever reads the report."""

from typing import Any

from eagle3.data.chat import Chat
from eagle3.data.view import split_tokens
from eagle3.engines.engine import Answer

SAMPLES = 2  # of a suite
MAX_TOKENS = 300  # of an answer
PROMPT_LETTERS = 600  # of a question, its end


def samples(configs: list[list[int]], trials: dict, chat: Chat) -> dict[str, list[dict[str, Any]]]:
    """By suite, its first answers under the first config that drafts; none without their rounds."""
    drafting = [config for config in configs if config[1] > 0 and tuple(config) in trials]
    suites = trials[tuple(drafting[0])] if drafting else {}
    shown: dict[str, list[dict[str, Any]]] = {suite: [] for suite in suites}
    for suite, some in suites.items():
        for trial in some[:SAMPLES]:
            answer, messages = trial.answers[0], trial.question.messages
            if answer.emitted:
                asked = messages[-1]["content"] if messages else chat.decode(trial.prompts[0])
                facts = {"config": drafting[0], "prompt": asked.strip()[-PROMPT_LETTERS:]}
                facts |= {"num_tokens": len(answer.ids), "rounds": rounds(answer, chat)}
                shown[suite].append(facts)
    return shown


def rounds(answer: Answer, chat: Chat) -> list[dict[str, Any]]:
    """The texts of each whole round's `accepted` drafts and of the `target`'s own token behind them
    (None where the answer ends with a draft), up to MAX_TOKENS. The first round is the prefill.
    """
    texts: list[str] = []
    for piece in split_tokens(chat.tokenizer, answer.ids, [1] * len(answer.ids)):
        # A character of several tokens stands at the last of them, so that none is split.
        texts += [""] * (len(piece.ids) - 1) + [piece.text]
    # Only the last round can be cut short of the target's token.
    ends_with_draft = sum(answer.accepted_at) > len(answer.ids) - 1 - answer.rounds
    found, stop = [], 0
    for count in [1, *answer.emitted]:
        start, stop = stop, stop + count
        if stop > MAX_TOKENS:
            break
        own = stop - 1 if stop < len(texts) or not ends_with_draft else stop
        target = texts[own] if own < stop else None
        found.append({"accepted": texts[start:own], "target": target})
    return found
