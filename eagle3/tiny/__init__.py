"""The embedded default: a small target, its tokenizer and its conversations."""
