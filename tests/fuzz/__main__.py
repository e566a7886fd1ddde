"""`python tests/fuzz KIND SEED NUMBER` runs one input of the fuzz test again, and shows it and all that was said."""

import pathlib
import sys
import tempfile

sys.path[0] = str(pathlib.Path(__file__).parent.parent)

import forked  # noqa: E402
from fuzz import cases  # noqa: E402
from fuzz import runner  # noqa: E402

kind, seed, number = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
scratch = pathlib.Path(tempfile.gettempdir(), "glmjax-fuzz")
world = runner.make_world(scratch)
case = cases.number_of(kind, seed, number, world)
print(case.about)
for name, content in case.files.items():
  print(f"{name}: {len(content)} bytes, {content[:200]!r}")
with forked.Server(scratch) as server:
  [result] = runner.run(kind, seed, [number], world, scratch, server)
print((scratch / "stdout").read_text(errors="replace")[-2_000:], result["err"], sep="\n")
print(f"{result['problem'] or 'as it should be'}; status {result['status']}")
print(f"cd {scratch / 'case'} && glmjax {' '.join(map(repr, case.argv))}"[:1_000])
sys.exit(result["problem"] is not None)
