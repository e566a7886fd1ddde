"""The study command: what its runs have in common, and how many of them are done."""

import argparse
from typing import Any


def settings(options: argparse.Namespace) -> dict[str, Any]:
  """Returns what `glmjax train` is to be called with for every point."""
  from glmjax.cli import commands
  from glmjax.study import run  # loads NumPy

  return {"settings": run.Settings(options.gin_file, options.gin, commands.targets())}


def show(figures: dict[str, Any]) -> None:
  """Prints how far the study is, and where its report is."""
  elsewhere = f", {figures['elsewhere']:,} being done by other processes" if figures["elsewhere"] else ""
  print(f"{figures['done']:,} of {figures['points']:,} points done, {figures['diverged']:,} diverged{elsewhere}")
  for name, why in figures["failed"].items():
    print(f"failed: {name}: {why}")
  if figures["done"]:
    print(figures["report"])


def status(figures: dict[str, Any]) -> int:
  """Returns 1 where a run failed that should not have, 0 otherwise: divergence is a result."""
  return 1 if figures["failed"] else 0
