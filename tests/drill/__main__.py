"""The drill by hand, from the project's folder:

python tests/drill kill COMMAND SEED NUMBER      one chain of kills again (train, cache, export, import, ...)
python tests/drill damage PLACE SEED NUMBER      one damage again (run, cache, export)
python tests/drill kills COMMAND COUNT [SEED]    many
python tests/drill damages PLACE COUNT [SEED]
"""

import pathlib
import sys
import tempfile

sys.path[0] = str(pathlib.Path(__file__).parent.parent)

from drill import damages  # noqa: E402
from drill import ground  # noqa: E402
from drill import kills  # noqa: E402

what, name, *numbers = sys.argv[1:]
scratch = pathlib.Path(tempfile.gettempdir(), "glmjax-drill")
ground.make(scratch)
module = kills if what.startswith("kill") else damages
if what in ("kill", "damage"):
  seed, number = map(int, numbers)
  table, wrong = module.run(name, 1, seed, scratch, scratch, first=number)
else:
  table, wrong = module.run(name, int(numbers[0]), int(numbers[1]) if numbers[1:] else 0, scratch, scratch)
print(table)
print(*wrong, f"in {scratch / 'case'}", sep="\n")
sys.exit(bool(wrong))
