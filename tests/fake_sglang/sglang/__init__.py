"""A stand-in for SGLang in tests: the flags and addresses that we use, and the way it calls a
forward hook.
"""
