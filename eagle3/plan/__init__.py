"""`plan=true`: tokens, disk, memory and hours of a run, before anything runs and without loading
weights.
"""

from eagle3.plan.estimate import make
from eagle3.plan.results import Plan
from eagle3.plan.table import show

__all__ = ["Plan", "make", "show"]
