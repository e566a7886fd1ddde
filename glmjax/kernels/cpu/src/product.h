// What one product is, and what an instruction set offers to compute it. No header of XLA's is needed here.
//
//   out[r, o] = sum over groups g of scale[g, o] * (sum over inputs i of g of x[r, i] * weight[o, i])
//
// A group's inputs are summed in segments of a kernel's length, and every such sum has one order, whatever the number
// of rows: each input adds to a lane of one vector that depends on its place alone, step after step, and the lanes are
// added last, as a tree; segments are added one after another. So a row's result does not depend on the others.

#pragma once

#include <cstdint>

namespace glmjax::cpu {

// What weights are stored as. INT4 has two codes in a byte, two's complement, the even input in the high half.
enum WeightKind : int { kInt4, kInt8, kBfloat16, kFloat32, kWeightKinds };

// What rows are packed as, for the kernels: bytes in the fast mode.
enum ActivationKind : int { kBytes, kBfloats, kFloats, kActivationKinds };

constexpr int64_t kTileOutputs = 4;       // outputs whose weights are read side by side
constexpr int64_t kSegmentBytes = 4096;   // of an output's weights that are summed at a time
constexpr int64_t kMostStepInputs = 128;  // of any kernel
constexpr int64_t kPanelRows = 512;       // rows packed at a time

struct Kernel;

// One product of up to kPanelRows rows.
struct Product {
  int64_t rows, inputs, outputs, groups;
  const int32_t* row_index;  // [rows], where each is in x and out: rows of zeros are left out
  const void* x;           // [..., inputs], float32 or bfloat16
  bool x_is_bfloat16;
  const uint8_t* weights;  // [outputs, row_bytes]
  int64_t row_bytes;
  const void* scale;       // [groups, outputs], float32 or float16; null: all are 1
  bool scale_is_half;
  float* out;              // [..., outputs]

  // Rows as the kernel reads them: [segments, rows, steps, kernel->step_bytes], zeros behind a group's end.
  uint8_t* activations;
  float* row_scales;       // [rows]; of the fast mode
  int32_t* sums;           // [rows, segments], of a segment's bytes; of the fast mode
  const Kernel* kernel;

  int64_t group_inputs() const { return inputs / groups; }
  int64_t group_bytes() const { return row_bytes / groups; }
  int64_t segments() const;
  int64_t steps() const;         // of a group
  int64_t packed_bytes() const;  // of a row
};

// How an instruction set multiplies one kind of packed rows with one kind of weights.
struct Kernel {
  int64_t step_inputs;     // inputs of a step
  int64_t step_bytes;      // bytes of a step in a packed row
  int64_t segment_inputs;  // a whole number of steps
  void (*pack)(const Product&, int64_t first_row, int64_t last_row);
  void (*multiply)(const Product&, int64_t first_output, int64_t last_output);  // of all rows, packed before
};

inline int64_t Product::segments() const {
  return groups * ((group_inputs() + kernel->segment_inputs - 1) / kernel->segment_inputs);
}
inline int64_t Product::steps() const { return (group_inputs() + kernel->step_inputs - 1) / kernel->step_inputs; }
inline int64_t Product::packed_bytes() const { return groups * steps() * kernel->step_bytes; }

// Kernels of an instruction set; null where there is none.
using Table = const Kernel* [kActivationKinds][kWeightKinds];

extern const Table kGeneric;
extern const Table kAvx2, kAvx512, kAvx512Vnni, kAvx512Bf16;
extern const Table kNeon;

// Returns the kernel of the named set, or of the best one that this machine has for an empty name; null for a set that
// it has not. A set takes what it does not have from those below it: so rows of bfloat16 are packed as floats where
// bfloat16 cannot be multiplied.
const Kernel* choose(const char* isa, WeightKind weights, bool x_is_bfloat16, bool fast);

// Names of the sets that this machine has, the best first; null at the end.
const char* const* sets();

}  // namespace glmjax::cpu
