"""Protocols: how a suite is put to the target."""

from dataclasses import dataclass, replace

from eagle3.benchmark.suites import Question
from eagle3.data.chat import Chat, with_system


@dataclass(frozen=True)
class Setup:
    """Through the chat template, or else a plain text behind `shots` solved questions.

    An answer ends before a text of `stop`.
    """

    max_new_tokens: int
    system_prompt: str | None = None
    shots: int = 0
    stop: tuple[str, ...] = ()


SETUPS: dict[str, dict[str, Setup]] = {
    # The plain question, behind the system prompt that the draft was trained with.
    "chat": {"": Setup(1024)},
    # What SpecForge's benchmarks of 2025 ask, whose numbers SpecBundle publishes. GSM8K is a raw
    # completion behind the first five rows of its own test split. Its acceptance length divides all
    # tokens by the rounds; ours leaves out the first token, so it is lower by less than a percent.
    "specforge": {
        "": Setup(2048),
        "mtbench": Setup(2048, "llama2"),
        "gsm8k": Setup(512, shots=5, stop=("Question", "Assistant:", "<|separator|>")),
        "humaneval": Setup(1024),
    },
    # EAGLE's evaluation of Llama-3 chat models. Its scripts name 1024 new tokens, but do not hand
    # them to the decoder, which then ends at 512: benchmark.max_new_tokens=512 does what they do.
    "eagle": {"": Setup(1024, "llama2")},
}
"""By protocol and suite; "" is every other suite."""


def setup_of(protocol: str, suite: str, asked: str | None, trained_with: str | None) -> Setup:
    """`asked` is benchmark.system_prompt; `trained_with` is data.system_prompt."""
    setup = SETUPS[protocol].get(suite, SETUPS[protocol][""])
    if protocol != "chat":
        return setup
    return replace(setup, system_prompt=trained_with if asked is None else asked)


@dataclass
class Task:
    """A suite and how it is asked; `examples` are shown with their solutions, for shots."""

    name: str
    setup: Setup
    questions: list[Question]
    examples: list[Question]

    def prompt_ids(self, question: Question, answers: list[str], chat: Chat) -> list[int]:
        """What the target reads for the turn behind `answers`, its own to the turns before."""
        if question.input_ids is not None:
            return question.input_ids
        if self.setup.shots:
            shown = [f"{plain_text(example)} {example.reference}\n\n" for example in self.examples]
            return chat.tokenizer("".join(shown) + plain_text(question)).input_ids
        messages = with_system(question.messages, self.setup.system_prompt)
        for answer, turn in zip(answers, question.later, strict=False):
            answered = {"role": "assistant", "content": answer.strip()}
            messages = [*messages, answered, {"role": "user", "content": turn}]
        return chat.encode_prompt(messages)


def plain_text(question: Question) -> str:
    return f"Question: {question.messages[0]['content']}\nAnswer:"
