"""What counts as a right answer, and code that runs shut in."""

import json

import pytest
from conftest import ROOT

from eagle3.benchmark.scoring import ceval, gsm8k, humaneval, math500, passes

LINES = (ROOT / "tests/data/suites/humaneval.jsonl").read_text().splitlines()
ROWS = [json.loads(line) for line in LINES]
ANSWERS = [
    (gsm8k, "4*12=48, 48-30=18\n#### 18", "He bakes 48.\n#### 18", True),
    (gsm8k, "#### 18\nBut 17 was wrong.", "#### 17", True),  # the last number behind the marks
    (gsm8k, "It is $1,365.00 in all", "#### 1,365", True),
    (gsm8k, "That makes 8.5", "#### 8.50", True),
    (gsm8k, "minus -3", "#### -3", True),
    (gsm8k, "about 1365.5", "#### 1365", False),
    (gsm8k, "no number here", "#### 18", False),
    pytest.param(gsm8k, "9" * 5000, "#### 18", False, id="more digits than Python reads"),
    (gsm8k, "", "#### 18", False),
    (math500, r"so $\boxed{\frac{7}{8}}$", r"\frac{7}{8}", True),
    (math500, r"$\boxed{1}$, no: $\boxed{\dfrac78}$.", r"\frac{7}{8}", True),
    (math500, r"\boxed{0.875}", r"\frac{7}{8}", True),
    (math500, r"\boxed{-\frac{1}{2}}", "-0.5", True),
    (math500, r"\boxed{\left( 3, \frac{\pi}{2} \right)}", r"\left(3,\frac{\pi}{2}\right)", True),
    (math500, r"\boxed{\text{Evelyn}}", r"\text{Evelyn}", True),
    (math500, r"\boxed{120^\circ}", "120", True),
    (math500, r"\boxed{12\text{ cm}^2}", "12", True),
    (math500, r"\boxed{x = 3}", "3", True),
    (math500, r"\boxed{10,080}", "10080", True),
    (math500, r"\boxed{\$18.90}", "18.90", True),
    (math500, r"\boxed{25\%}", "25", True),
    (math500, "the answer is 3.", "3", True),
    (math500, r"\boxed{1e3000000}", "3", False),
    (math500, r"\boxed{(1,2)}", "(2,1)", False),
    (math500, r"\boxed{\frac{7}{9}}", r"\frac{7}{8}", False),
    (math500, r"\boxed{1,234}", "1234,5", False),
    (math500, r"\boxed{unclosed", "3", False),
    (math500, "", "3", False),
    (ceval, "C", "C", True),
    (ceval, "A 和 B 都不对，答案：C", "C", True),
    (ceval, "答案：**B**", "B", True),
    (ceval, "The correct answer is (D).", "D", True),
    (ceval, "应选择B，因为……", "B", True),
    (ceval, "Because A is wrong, answer: B", "A", False),
    (ceval, "水是 H2O，CO2 不是", "A", False),
    (ceval, "", "A", False),
]


@pytest.mark.parametrize("score, answer, reference, right", ANSWERS)
def test_scores(score, answer, reference, right):
    assert score(answer, reference) is right


@pytest.mark.runs
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["task_id"])
def test_humaneval_takes_whole_functions_and_continuations(row):
    solution = row["canonical_solution"]
    head = row["prompt"][row["prompt"].rindex("def ") :]
    assert humaneval(solution, row)
    assert humaneval(f"Here it is:\n```python\n{head}{solution}```\nIt works.", row)
    assert not humaneval(f"```python\n{head}    return None\n```", row)


def test_humaneval_keeps_what_stands_before_the_function(monkeypatch):
    ran = []
    monkeypatch.setattr("eagle3.benchmark.scoring.passes", ran.append)
    humaneval("```python\ndef unshift(word):\n    return word\n```\n", ROWS[1])
    (whole,) = ran
    assert whole.count("def shift(") == whole.count("def unshift(") == 1
    assert whole.endswith("check(unshift)\n")


@pytest.mark.runs
@pytest.mark.parametrize(
    "source",
    [
        "assert False",
        "not python",
        "x = bytearray(2 << 30)",
        "open('big', 'wb').write(bytes(4 << 20))",
        "import os; os.environ['HOME']",
        "import time\nwhile True: time.sleep(1)",
    ],
)
def test_what_does_not_pass(source, monkeypatch):
    if "while" in source:
        monkeypatch.setattr("eagle3.benchmark.scoring.SECONDS", 1)
    assert not passes(source)


@pytest.mark.runs
def test_what_passes():
    assert passes("import re, math, typing\nassert math.gcd(4, 6) == 2\nopen('a', 'w').write('b')")
