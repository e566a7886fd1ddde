"""What is read from a compiled program's text."""

import jax
import jax.numpy as jnp
import pytest

from glmjax.parallel import hlo

LOOP = """%cond (p: (s32[], s32[])) -> pred[] {
  %c = s32[]{:T(128)} constant(6)
  %i = s32[] get-tuple-element(%p), index=1
  ROOT %lt = pred[]{:T(512)} compare(%i, %c), direction=LT
}

%body (q: (s32[], s32[])) -> (s32[], s32[]) {
  %other = s32[] get-tuple-element(%q), index=0
  %j = s32[] get-tuple-element(%q), index=1
  %s = s32[] constant(4)
  %next = s32[] add(%j, %s)
  ROOT %made = (s32[], s32[]) tuple(%other, %next)
}

ENTRY %main (a: s32[]) -> s32[] {
  %w = (s32[], s32[]) while(%t), condition=%cond, body=%body
}
"""


@pytest.mark.parametrize(
  "text, trips", [(LOOP, 2), (LOOP.replace("LT", "NE"), None), (LOOP.replace("add(", "sub("), 6)]
)
def test_loops_that_count_to_a_constant(text, trips):
  """Where XLA noted nothing; by ones, where what the body adds cannot be told."""
  program = hlo.read(text)
  assert program.trips(program.computations[program.entry]["w"]) == trips


def test_what_xla_noted_counts():
  noted = LOOP.replace("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"5"}}')
  assert hlo.read(noted).trips(hlo.read(noted).computations["main"]["w"]) == 5


def test_arrays():
  text = """ENTRY %main (a: s32[]) -> s32[] {
  ROOT %r = (bf16[4,8]{1,0:T(8,128)(2,1)S(1)}, /*=1*/pred[3]{0}, s4[5]{0:S(5)}, token[]) f(%x, %y), m={op_name="g"}
}
"""
  instruction = hlo.read(text).computations["main"]["r"]
  assert [(array.dtype, array.shape, array.bytes) for array in instruction.arrays] == [
    ("bf16", (4, 8), 64),
    ("pred", (3,), 3),
    ("s4", (5,), 5),
    ("token", (), 0),
  ]
  assert [array.on_device for array in instruction.arrays] == [False, True, False, True]
  assert [array.on_host for array in instruction.arrays] == [False, False, True, False]
  assert (instruction.operation, instruction.operands, instruction.source) == ("f", ("x", "y"), "g")


def test_every_instruction_of_a_program_is_read():
  compiled = (
    jax.jit(lambda x: jax.lax.fori_loop(0, 7, lambda i, y: jnp.sin(y @ x), x)).lower(jnp.ones((8, 8))).compile()
  )
  program = hlo.read(compiled.as_text())
  lines = [line for line in compiled.as_text().splitlines() if " = " in line]
  assert sum(map(len, program.computations.values())) == len(lines)
  loops = [i for c in program.computations.values() for i in c.values() if i.operation == "while"]
  assert [program.trips(loop) for loop in loops] == [7]
  everything = {name for c in program.computations.values() for i in c.values() for name in i.called}
  assert everything <= program.computations.keys()
