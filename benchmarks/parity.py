"""Parity with the original code: every case group of tests/golden, and the worst error of each comparison.

  python benchmarks/parity.py --out=parity.md

Runs the golden tests, which make the comparisons, and prints a table of what they compared. With the
environment variable GLMJAX_GOLDEN_DIR it reads the cases there instead. Status 1 if any test fails.
"""

import argparse
import os
import pathlib
import sys
from typing import Any

import pytest

ROOT = pathlib.Path(__file__).parent.parent
# Tests that assert identity: what they compare.
IDENTICAL = {
  "quantize/qarray_test.py": {"test_golden": ("quantization", "codes (but one that wraps there), scales")},
  "data/spans_golden_test.py": {
    "test_mask_sample": ("pretraining_samples", "[MASK] samples"),
    "test_gmask_row": ("pretraining_samples", "[gMASK] rows"),
    "test_packed_mask_row": ("pretraining_samples", "packed [MASK] rows"),
    "test_instruction_sample": ("pretraining_samples", "instruction samples"),
    "test_glm10b_sample": ("glm_blank_infilling", "samples of given spans"),
    "test_placing_spans": ("glm_blank_infilling", "spans of given random numbers"),
    "test_glm10b_batches": ("glm_blank_infilling", "whole batches, seeds included"),
    "test_separator_is_the_interval": ("glm_blank_infilling", "attention masks"),
  },
}
HEADER = "| case group | what | comparisons | worst error | allowed |\n|---|---|---:|---:|---|"


class Identical:
  """A pytest plugin that notes what comes of the tests in IDENTICAL."""

  def __init__(self) -> None:
    self.rows: list[tuple[str, str, float, str]] = []

  @pytest.hookimpl
  def pytest_runtest_logreport(self, report: Any) -> None:
    file, _, test = report.nodeid.removeprefix("tests/").partition("::")
    row = IDENTICAL.get(file, {}).get(test.split("[")[0])
    if row and report.when == "call":
      self.rows.append((*row, 0.0 if report.passed else float("inf"), "identical"))


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--out", help="Markdown file to write the table to as well")
  options = parser.parse_args()
  out = options.out and pathlib.Path(options.out).absolute()
  os.chdir(ROOT)
  plugin = Identical()
  wanted = [f"tests/{file}::{test}" for file, tests in IDENTICAL.items() for test in tests]
  status = pytest.main(["-q", "-p", "no:cacheprovider", "tests/golden_test.py", *wanted], plugins=[plugin])
  import golden_models  # pytest has put tests/ on the path

  rows = [(c.group, c.what, c.error, c.tolerance) for c in golden_models.COMPARISONS] + plugin.rows
  text = table(rows)
  print(text)
  if out:
    temporary = out.with_name(f".{out.name}.{os.getpid()}")
    temporary.write_text(text + "\n", encoding="utf-8")
    os.replace(temporary, out)
  return int(status != 0)


def table(rows: list[tuple[str, str, float, str]]) -> str:
  """Returns one line for each group and thing compared, groups together."""
  found: dict[tuple[str, str, str], list[float]] = {}
  for group, what, error, tolerance in rows:
    found.setdefault((group, what, tolerance), []).append(error)
  order = list(dict.fromkeys(group for group, _, _ in found))
  lines = [
    f"| {group} | {what} | {len(errors)} | {max(errors):.1e} | {tolerance} |".replace("0.0e+00", "0")
    for (group, what, tolerance), errors in sorted(found.items(), key=lambda item: order.index(item[0][0]))
  ]
  return "\n".join([HEADER, *lines])


if __name__ == "__main__":
  sys.exit(main())
