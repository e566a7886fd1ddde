"""PEFT's side of tests/thudm/peft_test.py, in its own environment: python peft_side.py load|make FOLDER SIZES OUT.

`load` reads an adapter of ours beside modules of the original's names, `make` makes one of random numbers and saves it;
both write what each module adds to its weight, [outputs, inputs], as OUT.npz. SIZES are JSON: layers, and of each
module of a layer by its name [inputs, outputs].
"""

import json
import sys

import numpy as np
import peft
import torch
from torch import nn


class Model(nn.Module):
  """Modules of the original's names, `transformer.layers.0.attention.query_key_value`; it computes nothing."""

  def __init__(self, layers: int, modules: dict[str, list[int]]) -> None:
    super().__init__()
    self.transformer = nn.Module()
    self.transformer.layers = nn.ModuleList()
    for _ in range(layers):
      layer = nn.Module()
      for name, (inputs, outputs) in modules.items():
        parent, own = name.split(".")
        if not hasattr(layer, parent):
          setattr(layer, parent, nn.Module())
        setattr(getattr(layer, parent), own, nn.Linear(inputs, outputs))
      self.transformer.layers.append(layer)

  def prepare_inputs_for_generation(self) -> None:
    """Is asked for by PEFT's class of causal models."""


def main() -> None:
  """Loads or makes an adapter."""
  mode, folder, sizes, out = sys.argv[1:]
  sizes = json.loads(sizes)
  model = Model(sizes["layers"], sizes["modules"])
  if mode == "load":
    model = peft.PeftModel.from_pretrained(model, folder)
  else:
    names = [name.split(".")[1] for name in sizes["modules"]]
    model = peft.get_peft_model(
      model, peft.LoraConfig(r=3, lora_alpha=5, target_modules=names, task_type="CAUSAL_LM", lora_dropout=0.1)
    )
    torch.manual_seed(0)
    for name, weight in model.named_parameters():
      if "lora_" in name:
        nn.init.normal_(weight)
    model.save_pretrained(folder)
  layers = {name: module for name, module in model.named_modules() if hasattr(module, "get_delta_weight")}
  np.savez(out, **{name: module.get_delta_weight("default").detach().numpy() for name, module in layers.items()})


if __name__ == "__main__":
  main()
