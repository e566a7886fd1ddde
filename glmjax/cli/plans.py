"""The plan command: what is set before JAX is loaded, and the table for people."""

import argparse
import os
from typing import Any

GIB = 1 << 30


def prepare(options: argparse.Namespace) -> dict[str, Any]:
  """Compiling for devices elsewhere must not start those that are here; JAX reads these when it is imported."""
  del options
  os.environ["JAX_PLATFORMS"] = "cpu"
  os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
  return {}


def show(plan: dict[str, Any]) -> None:
  """The plan as a table."""
  gib = lambda size: f"{size / GIB:,.2f} GiB"
  mesh = " x ".join(f"{axis}={size}" for axis, size in plan["mesh"].items() if size > 1) or "one device"
  room = "fits, with %s to spare" if plan["fits"] else "does NOT fit: %s too much"
  rows = [("target", f"{plan['target']}: {plan['devices']:,} x {plan['device']}; {mesh}"),
          ("memory of a device", f"{gib(plan['peak_bytes_per_device'])} of {gib(plan['usable_memory_bytes'])} usable: "
           + room % gib(abs(plan["headroom_bytes"])))]
  rows += [(f"  {name.replace('_', ' ')}", gib(size)) for name, size in plan["memory"].items()]
  rows += [("step, at best", f"{plan['step_seconds']:.4g} s"),
           ("  products", f"{plan['compute_seconds']:.4g} s, "
            f"{plan['hardware_flops'] / plan['devices']:.3g} FLOPs a device"),
           ("  memory traffic", f"{plan['memory_seconds']:.4g} s"),
           ("  exchanges waited for", f"{plan['waited_exchange_seconds']:.4g} s"),
           ("  exchanges beside it", f"{plan['overlapped_exchange_seconds']:.4g} s")]
  rows += [(f"  {c['kind']} over {', '.join(c['axes']) or 'nothing'}",
            f"{gib(c['bytes'])} a device in {c['times']:,}, {c['seconds']:.3g} s") for c in plan["collectives"][:8]]
  rows += [("tokens a second", f"{plan['tokens_per_second']:,.4g}"),
           ("MFU, HFU at most", f"{plan['mfu']:.1%}, {plan['hfu']:.1%}"),
           ("tokens a day", f"{plan['tokens_per_day']:.3g}")]
  if "days" in plan:
    energy = plan["megawatt_hours"]
    rows.append(("the whole training", f"{plan['days']:.1f} days" + (f", {energy:,.0f} MWh" if energy else "")))
  rows.append(("compiled in", f"{plan['compile_seconds']} s, {gib(plan['compile_host_bytes'])} of this machine"))
  if not plan["fits"]:
    rows.append(("what would help", "more devices along tensor or fsdp, a smaller micro_batch, full remat, fewer bits"))
  width = max(len(name) for name, _ in rows)
  for name, value in rows:
    print(f"{name:{width}}  {value}")
