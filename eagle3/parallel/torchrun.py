"""torchrun with run.py's exit codes: the first failure's, 130 after Ctrl-C, 143 after SIGTERM.

`python -m torch.distributed.run` shows its own traceback and leaves with 1 in all these cases.
"""

import logging
import sys

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

logging.disable(logging.ERROR)
try:
    run.run(run.parse_args(None))
except SignalException as stopped:
    sys.exit(128 + stopped.sigval)
except ChildFailedError as error:
    rank, failure = error.get_first_failure()
    if failure.exitcode < 0:
        print(f"error: process {rank} was killed by {failure.signal_name()}", file=sys.stderr)
    elif rank > 0:
        told = failure.message["message"] if isinstance(failure.message, dict) else "it failed"
        more = f"logs/rank_{rank}.log in the run's folder has more"
        print(f"error: process {rank}: {told} ({more})", file=sys.stderr)
    sys.exit(failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode)
