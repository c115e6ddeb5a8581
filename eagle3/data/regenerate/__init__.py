"""`stages=[regenerate]`: the target answers the prompts of a dataset again, so that a draft learns
its own words.
"""

from eagle3.data.regenerate.batches import builtin
from eagle3.data.regenerate.servers import server

__all__ = ["builtin", "server"]
