"""The plan command: what is set before JAX is loaded, and the table for people."""

import argparse
from typing import Any

from glmjax import errors
from glmjax.config import gin_files
from glmjax.cli import process
from glmjax.models import config as config_lib

GIB = 1 << 30


MODELS = {"6b": "models/chatglm_6b.gin", "10b": "models/glm_10b.gin", "130b": "models/glm_130b.gin"}  # of --fits


def prepare(options: argparse.Namespace) -> dict[str, Any]:
  """Keeps JAX from starting the devices that are here, as compiling is for others; JAX reads these when it is
  imported.
  """
  if options.tries is not None and not options.search:
    raise errors.InputError("--tries is of --search: give both")
  process.compile_only()
  return {}


def prepare_fits(options: argparse.Namespace) -> dict[str, Any]:
  """Returns what the table is of."""
  process.compile_only()
  given = {"bits": options.bits, "contexts": options.context, "batches": options.batch, "gpus": options.gpu}
  return {
    "models": {name: _shipped(MODELS[name]) for name in options.model or MODELS},
    **{name: list(dict.fromkeys(values)) for name, values in given.items() if values},
  }


def prepare_page(options: argparse.Namespace) -> dict[str, Any]:
  """Keeps JAX from starting the devices that are here: the page is arithmetic."""
  process.compile_only()
  return {}


def _shipped(name: str) -> config_lib.GLMConfig:
  """Returns the model of a gin file."""
  entry = f"{__name__}.model"
  gin_files.parse([name], [f"{entry}.given=%MODEL"], entry)
  return gin_files.configured(entry)()


def model(given: config_lib.GLMConfig) -> config_lib.GLMConfig:
  """Returns what a gin file binds."""
  return given


def show(plan: dict[str, Any]) -> None:
  """Prints the plan as a table."""
  if "candidates" in plan:
    _show_search(plan)
    return
  rows = lines(plan)
  width = max(len(name) for name, _ in rows)
  for name, value in rows:
    print(f"{name:{width}}  {value}")


def lines(plan: dict[str, Any]) -> list[tuple[str, str]]:
  """Returns what is said of a plan: names and figures."""

  def gib(size: float) -> str:
    return f"{size / GIB:,.2f} GiB"

  mesh = " x ".join(f"{axis}={size}" for axis, size in plan["mesh"].items() if size > 1) or "one device"
  room = "fits, with %s to spare" if plan["fits"] else "does NOT fit: %s too much"
  rows = [
    ("target", f"{plan['target']}: {plan['devices']:,} x {plan['device']}; {mesh}"),
    (
      "memory of a device",
      f"{gib(plan['peak_bytes_per_device'])} of {gib(plan['usable_memory_bytes'])} usable: "
      + room % gib(abs(plan["headroom_bytes"])),
    ),
  ]
  rows += [(f"  {name.replace('_', ' ')}", gib(size)) for name, size in plan["memory"].items()]
  if plan["host_bytes_per_device"]:
    rows.append(("memory of the host", f"{gib(plan['host_bytes_per_device'])} a device: its offloaded weights"))
  rows += [
    ("step, at best", f"{plan['step_seconds']:.4g} s"),
    ("  products", f"{plan['compute_seconds']:.4g} s, {plan['hardware_flops'] / plan['devices']:.3g} FLOPs a device"),
    ("  memory traffic", f"{plan['memory_seconds']:.4g} s"),
    ("  exchanges waited for", f"{plan['waited_exchange_seconds']:.4g} s"),
    ("  exchanges beside it", f"{plan['overlapped_exchange_seconds']:.4g} s"),
  ]
  if plan["host_bytes_moved"]:
    rows.append(
      ("  weights from the host", f"{plan['host_seconds']:.4g} s, {plan['host_bytes_moved']:,.0f} bytes a device")
    )
  rows += [
    (
      f"  {c['kind']} over {', '.join(c['axes']) or 'nothing'}",
      f"{gib(c['bytes'])} a device in {c['times']:,}, {c['seconds']:.3g} s",
    )
    for c in plan["collectives"][:8]
  ]
  rows += [
    ("tokens a second", f"{plan['tokens_per_second']:,.4g}"),
    ("MFU, HFU at most", f"{plan['mfu']:.1%}, {plan['hfu']:.1%}"),
    ("tokens a day", f"{plan['tokens_per_day']:.3g}"),
  ]
  if "days" in plan:
    energy = plan["megawatt_hours"]
    took = f"{plan['days']:.1f} days" if plan["days"] >= 2 else f"{24 * plan['days']:.3g} hours"
    if energy is not None:
      took += f", {energy:,.0f} MWh" if energy >= 1 else f", {1000 * energy:,.0f} kWh"
    rows.append(("the whole budget", took))
  rows.append(("compiled in", f"{plan['compile_seconds']} s, {gib(plan['compile_host_bytes'])} of this machine"))
  if not plan["fits"]:
    rows += _advice(plan["advice"])
  return rows


def _advice(found: dict[str, Any]) -> list[tuple[str, str]]:
  rows = [("what would help", f"most of it is {found['largest_part'].replace('_', ' ')}; by arithmetic")]
  rows += [
    (f"  {change['change']}", f"about {change['peak_bytes_per_device'] / GIB:,.2f} GiB a device")
    for change in found["changes"]
  ]
  return rows if found["changes"] else [*rows, ("  nothing alone", "fewer layers, or devices with more memory")]


def _show_search(found: dict[str, Any]) -> None:
  """Prints the candidates of a search, best first, and what became of the others."""
  print(f"{found['target']}: {found['devices']:,} x {found['device']}")
  rows = [("mesh, micro-batch, remat", "GiB a device", "fits", "step, at best", "tokens/s", "MFU", "compiled in")]
  for c in found["candidates"]:
    if "error" in c:
      rows.append((c["name"], f"- ({c['error'][:90]})", *[""] * 5))
    else:
      rows.append(
        (
          c["name"],
          f"{c['peak_bytes_per_device'] / GIB:.2f}",
          "yes" if c["fits"] else "no",
          f"{c['step_seconds']:.4g} s",
          f"{c['tokens_per_second']:,.4g}",
          f"{c['mfu']:.1%}",
          f"{c['compile_seconds']} s",
        )
      )
  widths = [max(len(row[i]) for row in rows if not row[1].startswith("- (")) for i in range(7)]
  for row in rows:
    print("  ".join(f"{value:{width}}" for value, width in zip(row, widths)).rstrip())
  for reason, count in found["left_out"].items():
    print(f"not compiled: {count:,} that {reason}")


def show_fits(rows: list[dict[str, Any]]) -> None:
  """Prints how many of each GPU, and the GiB that each then holds, in Markdown."""
  gpus = list(dict.fromkeys(row["gpu"] for row in rows))
  lines: dict[tuple[str, int, int, int], dict[str, str]] = {}
  for row in rows:
    held = "" if row["count"] is None else f" ({row['peak_bytes_per_device'] / GIB:.1f})"
    line = lines.setdefault((row["model"], row["bits"], row["batch"], row["context"]), {})
    line[row["gpu"]] = f"{row['count'] or '-'}{held}"
  print("| model | bits | batch | context | " + " | ".join(gpus) + " |")
  print("|---|---|---|---|" + "---|" * len(gpus))
  for name, bits, batch, context in sorted(lines, key=lambda key: (int(key[0].rstrip("b")), -key[1], *key[2:])):
    counts = " | ".join(lines[name, bits, batch, context].get(gpu, "") for gpu in gpus)
    print(f"| {name} | {bits} | {batch} | {context:,} | {counts} |")
  for why in sorted({row["why"] for row in rows if row["count"] is None}):
    print(f"-: {why}")
