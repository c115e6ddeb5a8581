"""Protocols: how a suite is put to the target. A protocol is a function; `PROTOCOLS` names them.

`system_prompt` is benchmark.system_prompt; `trained_with` is data.system_prompt, which prepared
prompts hold already.
"""

from collections.abc import Callable
from dataclasses import dataclass

from eagle3.benchmark.suites import Question
from eagle3.data.chat import Chat, with_system
from eagle3.errors import ConfigError


@dataclass(frozen=True)
class Manner:
    """How one suite is asked: through the target's chat template behind `system_prompt`, or, with
    `shots` > 0, as a plain text behind so many solved questions. An answer ends before a text of
    `stop`.
    """

    max_new_tokens: int
    system_prompt: str | None = None
    shots: int = 0
    stop: tuple[str, ...] = ()


def chat(suite: str, system_prompt: str | None, trained_with: str | None) -> Manner:
    """The target's own template and the plain question, behind the system prompt that the draft was
    trained with.
    """
    return Manner(1024, trained_with if system_prompt is None else system_prompt)


SPECFORGE = {
    "mtbench": Manner(2048, "llama2"),
    "gsm8k": Manner(512, shots=5, stop=("Question", "Assistant:", "<|separator|>")),
    "humaneval": Manner(1024),
}


def specforge(suite: str, system_prompt: str | None, trained_with: str | None) -> Manner:
    """What SpecForge's benchmarks of 2025 ask, whose numbers SpecBundle publishes.

    GSM8K is a raw completion behind the first five rows of its own test split, which are asked as
    well. Its acceptance length divides all tokens by the rounds; ours leaves out the first token,
    so it is lower by less than a percent.
    """
    refuse(system_prompt, "specforge")
    return SPECFORGE.get(suite, Manner(2048))


def eagle(suite: str, system_prompt: str | None, trained_with: str | None) -> Manner:
    """EAGLE's evaluation of Llama-3 chat models: zero-shot, every suite behind the same system
    prompt.

    Its scripts name 1024 new tokens, but do not hand them to the decoder, which then ends at 512;
    benchmark.max_new_tokens=512 does what they do.
    """
    refuse(system_prompt, "eagle")
    return Manner(1024, "llama2")


PROTOCOLS: dict[str, Callable[[str, str | None, str | None], Manner]] = {
    "chat": chat,
    "specforge": specforge,
    "eagle": eagle,
}


def refuse(system_prompt: str | None, protocol: str) -> None:
    """Raises ConfigError for a system prompt beside a protocol that has its own."""
    if system_prompt is not None:
        raise ConfigError(
            f"benchmark.system_prompt={system_prompt} does not go with benchmark.protocol={protocol}, which sets the "
            "system prompt itself; leave one of them out"
        )


def prompt_ids(
    question: Question, answers: list[str], manner: Manner, solved: list[Question], chat: Chat
) -> list[int]:
    """What the target reads for the turn behind `answers`, its own answers to the turns before.

    `solved` are the questions shown with their solutions where the manner asks for shots. A
    question that comes tokenised is what it is.
    """
    if question.input_ids is not None:
        return question.input_ids
    if manner.shots:
        shown = "".join(f"{raw(shot)} {shot.reference}\n\n" for shot in solved)
        return chat.tokenizer(shown + raw(question)).input_ids
    messages = with_system(question.messages, manner.system_prompt)
    for answer, turn in zip(answers, question.later, strict=False):
        said = {"role": "assistant", "content": answer.strip()}
        messages = [*messages, said, {"role": "user", "content": turn}]
    return chat.encode_prompt(messages)


def raw(question: Question) -> str:
    return f"Question: {question.messages[0]['content']}\nAnswer:"
