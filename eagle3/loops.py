"""A model that repeats itself."""


def is_loop(ids):
    """True where `ids` (tokens) hold the same block of <= 48 tokens three times in a row, over >= 24 tokens in all."""
    for period in range(1, 49):
        matching = 0  # how many tokens in a row equal the one a period before
        needed = max(2 * period, 24 - period)
        for now, before in zip(ids[period:], ids):
            matching = matching + 1 if now == before else 0
            if matching >= needed:
                return True
    return False
