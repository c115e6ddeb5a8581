"""The first 20 losses of the default run, which a change that moves no digit leaves as they are.

python dev/first_losses.py [overrides of run.py] > before.txt
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

COUNT = 20


def main() -> None:
    """Start the run as a user would, and stop it behind update 20: its schedule stays."""
    root = Path(__file__).parents[1]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "run.py", "train.log_every=1", f"hydra.run.dir={folder}"]
        command += ["stages=[prepare,generate,train]", *sys.argv[1:]]
        run = subprocess.Popen(command, cwd=root, stdout=subprocess.DEVNULL)
        metrics, lines = Path(folder, "metrics.jsonl"), []
        while len(lines) < COUNT and run.poll() is None:
            time.sleep(0.2)
            lines = metrics.read_text().splitlines() if metrics.exists() else []
        run.terminate()
        run.wait()
    for line in lines[:COUNT]:
        values = json.loads(line)
        print(values["step"], values["loss"])
    sys.exit(0 if len(lines) >= COUNT else 1)


if __name__ == "__main__":
    main()
