"""benchmark=vllm and sglang as a user runs them, on the embedded target.

The answers and the acceptance are those of the built-in benchmark.
"""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT

from engines.conftest import CPU_ENVIRONMENT, SGLANG_ON_CPU, VLLM_ON_CPU


@pytest.fixture(scope="module")
def benchmark(trained_draft, tmp_path_factory):
    """benchmark(runner, configs, *overrides): rows for four held-out prompts, the protocol."""

    def benchmark(
        runner: str, configs: list[list[int]], *overrides: str
    ) -> tuple[list[dict], dict]:
        folder = tmp_path_factory.mktemp(runner)
        command = [
            sys.executable, "run.py", "stages=[benchmark]", f"benchmark={runner}",
            f"benchmark.configs={configs}", "benchmark.suites=[heldout:4]",
            "benchmark.max_new_tokens=32", f"draft_path={trained_draft}",
            f"cache_dir={trained_draft.parents[1] / 'cache'}", f"hydra.run.dir={folder}",
            *overrides,
        ]  # fmt: skip
        environment = os.environ | CPU_ENVIRONMENT
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1800
        )
        assert done.returncode == 0, done.stderr[-3000:]
        result = json.loads((folder / "benchmark.json").read_text())
        return result["suites"]["heldout"], result["protocol"]

    return benchmark


def assert_same(rows: list[dict], expected: list[dict]) -> None:
    for row, own in zip(rows, expected, strict=True):
        assert row["config"] == own["config"] and row["lossless"] is own["lossless"] is True
        assert row["acceptance_length"] == pytest.approx(own["acceptance_length"])
        assert row["acceptance_length"] > 1.2, "a draft that is never right shows nothing"
        assert row["tokens_per_second"] > 0 and row["baseline_tokens_per_second"] > 0


def server_args(options: list[str]) -> str:
    return "benchmark.server_args=[" + ",".join(f'"{option}"' for option in options) + "]"


def test_vllm_measures_what_the_built_in_benchmark_measures(benchmark, vllm_python):
    configs = [[1, 3, 1, 4], [2, 3, 1, 4]]
    expected, _ = benchmark("builtin", configs)
    rows, protocol = benchmark(
        "vllm", configs, f"benchmark.python={vllm_python}", server_args(VLLM_ON_CPU)
    )
    assert_same(rows, expected)
    assert rows[0]["accepted_by_position"] == pytest.approx(expected[0]["accepted_by_position"])
    assert protocol["runner"] == "vllm" and protocol["dtype"] == "float32"


def test_sglang_measures_what_the_built_in_benchmark_measures(benchmark, sglang_python):
    configs = [[1, 3, 1, 4], [2, 3, 1, 4], [1, 4, 3, 10]]
    expected, _ = benchmark("builtin", configs)
    rows, protocol = benchmark(
        "sglang", configs, f"benchmark.python={sglang_python}", server_args(SGLANG_ON_CPU)
    )
    assert_same(rows, expected)
    assert protocol["runner"] == "sglang" and protocol["drafting"] == "chain and tree"
