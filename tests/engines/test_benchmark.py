"""benchmark=vllm and sglang as a user runs them, on the embedded target.

The answers and the acceptance are those of the built-in benchmark.
"""

import json
import os

import pytest
from conftest import run_command

from engines.conftest import CPU_ENVIRONMENT, SGLANG_ON_CPU, VLLM_ON_CPU, interpreter


@pytest.fixture
def benchmark(trained_draft, tmp_path):
    """benchmark(runner, configs, *overrides): rows for four held-out prompts, the protocol."""

    def benchmark(runner, configs, *overrides):
        given = [
            "stages=[benchmark]", f"benchmark={runner}", f"benchmark.configs={configs}",
            "benchmark.suites=[heldout:4]", "benchmark.max_new_tokens=32",
            f"draft_path={trained_draft}", f"cache_dir={trained_draft.parents[1] / 'cache'}",
            f"hydra.run.dir={tmp_path / runner}", *overrides,
        ]  # fmt: skip
        done = run_command(*given, env=os.environ | CPU_ENVIRONMENT, timeout=1800)
        assert done.returncode == 0, done.stderr[-3000:]
        result = json.loads((tmp_path / runner / "benchmark.json").read_text())
        return result["suites"]["heldout"], result["protocol"]

    return benchmark


CHAINS = [[1, 3, 1, 4], [2, 3, 1, 4]]
MORE = [*CHAINS, [1, 4, 3, 10]]
ENGINES = [("vllm", CHAINS, VLLM_ON_CPU), ("sglang", MORE, SGLANG_ON_CPU)]


@pytest.mark.parametrize(("engine", "configs", "options"), ENGINES)
def test_an_engine_measures_what_the_built_in_benchmark_measures(
    benchmark, engine, configs, options
):
    expected, _ = benchmark("builtin", configs)
    quoted = ",".join(f'"{option}"' for option in options)
    given = [f"benchmark.python={interpreter(engine)}", f"benchmark.server_args=[{quoted}]"]
    rows, protocol = benchmark(engine, configs, *given)
    for row, own in zip(rows, expected, strict=True):
        assert row["config"] == own["config"] and row["lossless"] is own["lossless"] is True
        assert row["acceptance_length"] == pytest.approx(own["acceptance_length"])
        assert row["acceptance_length"] > 1.2, "a draft that is never right shows nothing"
        assert row["tokens_per_second"] > 0 and row["baseline_tokens_per_second"] > 0
    assert protocol["runner"] == engine
    if engine == "vllm":
        by_position = pytest.approx(expected[0]["accepted_by_position"])
        assert rows[0]["accepted_by_position"] == by_position and protocol["dtype"] == "float32"
    else:
        assert protocol["drafting"] == "chain and tree"
