"""The tokenizer of the tiny target: 2,048 byte-level BPE tokens and a chat template like Llama 3's."""

import json

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

VOCAB_SIZE = 2048
SPECIALS = [
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|pad|>",
]
# Indentation, words, single digits, underscores, punctuation: a name is cut the same way wherever
# it stands, so that the model can copy it.
PIECES = Regex(r" {2,}| ?\p{L}+|\p{N}|_+| ?[^\s\p{L}\p{N}_]+\n*|\n+|\s")
TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {%- if message['role'] == 'assistant' %}
        {%- generation %}{{- message['content'] | trim + '<|eot_id|>' }}{% endgeneration %}
    {%- else %}
        {{- message['content'] | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""


def train_tokenizer(rows):
    """Conversations -> tokenizer, trained on their text."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(PIECES, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIALS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    # the roles are one token each, the rest of the template is special
    texts = [m["role"] + "\n\n" + m["content"] for row in rows for m in row["messages"]]
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>",
        pad_token="<|pad|>",
        additional_special_tokens=[
            s for s in SPECIALS if s not in ("<|begin_of_text|>", "<|eot_id|>", "<|pad|>")
        ],
        model_max_length=2048,
        chat_template=TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def save_tokenizer(tokenizer, folder):
    """Writes the tokenizer so that transformers 4, which the serving engines use, reads it too."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    for key in ("backend", "is_local", "local_files_only"):
        config.pop(key, None)
    config["additional_special_tokens"] = config.pop("extra_special_tokens")
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(config, indent=2) + "\n")


def encode(tokenizer, messages):
    """-> (input_ids, 1 for assistant content and its end-of-turn token)."""
    encoded = tokenizer.apply_chat_template(
        messages, return_dict=True, return_assistant_tokens_mask=True, return_tensors=None
    )
    return encoded["input_ids"], encoded["assistant_masks"]
