// The two ways through a product, as templates over a kernel's operations K. Each set_*.cc includes this file in the
// region that is compiled for its instructions; everything is local to that file, so that the linker never takes one
// set's code for another's.
//
// K has: Vector, Accumulator, Element (of a packed row), Sum (float, or int32_t in the fast mode);
//   kInputs, kWeightBytes: inputs of a step, and the bytes that they take in a row of weights
//   kVectors: vectors of a step, both of weights and of rows
//   kOffset: what is added to every code in `load` (whoever sums bytes takes it off again)
//   kOutputs: outputs of a tile of unpacked weights
//   load(bytes, Vector[kVectors]): unpacks a step of weights
//   arrange(natural, packed): puts kInputs elements where `load` has their weights
//   zero(), add(accumulator, weight, x), sum(accumulators[4], sums[4])

namespace {

using glmjax::cpu::kMostFewRows;
using glmjax::cpu::kTileOutputs;
using glmjax::cpu::kTileRows;
using glmjax::cpu::Kernel;
using glmjax::cpu::Product;

constexpr int64_t kBlockBytes = 16384;  // of four packed rows; they stay in the first cache while weights pass by

template <typename K>
constexpr int64_t kStepVectorsBytes = K::kVectors * static_cast<int64_t>(sizeof(typename K::Vector));

inline void fetch(const float* x, int64_t count, float* to, float) {
  for (int64_t i = 0; i < count; ++i) to[i] = x[i];
}
inline void fetch(const uint16_t* x, int64_t count, float* to, float) {
  for (int64_t i = 0; i < count; ++i) to[i] = glmjax::cpu::from_bits(static_cast<uint32_t>(x[i]) << 16);
}
inline void fetch(const uint16_t* x, int64_t count, uint16_t* to, float) {
  for (int64_t i = 0; i < count; ++i) to[i] = x[i];
}
// Rounds x * inverse to the nearest byte: adding 1.5 * 2^23 leaves the integer in the low bits.
inline void fetch(const float* x, int64_t count, int8_t* to, float inverse) {
  for (int64_t i = 0; i < count; ++i) {
    to[i] = static_cast<int8_t>(glmjax::cpu::to_bits(x[i] * inverse + 12582912.0f));
  }
}
inline void fetch(const uint16_t* x, int64_t count, int8_t* to, float inverse) {
  for (int64_t i = 0; i < count; ++i) {
    const float value = glmjax::cpu::from_bits(static_cast<uint32_t>(x[i]) << 16);
    to[i] = static_cast<int8_t>(glmjax::cpu::to_bits(value * inverse + 12582912.0f));
  }
}

inline uint32_t largest_bits(const float* x, int64_t count) {
  uint32_t largest = 0;
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t bits = glmjax::cpu::to_bits(x[i]) & 0x7fffffff;
    largest = bits > largest ? bits : largest;
  }
  return largest;
}
inline uint32_t largest_bits(const uint16_t* x, int64_t count) {
  uint16_t largest = 0;
  for (int64_t i = 0; i < count; ++i) {
    const uint16_t bits = x[i] & 0x7fff;
    largest = bits > largest ? bits : largest;
  }
  return static_cast<uint32_t>(largest) << 16;
}

// Packs x[inputs] of one row; in the fast mode it becomes bytes, codes of a scale that is the largest magnitude / 127.
// A row that is not finite gets the scale NaN; one whose largest magnitude is below 2^-119 counts as zeros.
template <typename K, typename X>
void pack_row(const Product& p, int64_t row) {
  using Element = typename K::Element;
  const X* x = static_cast<const X*>(p.x) + row * p.inputs;
  Element* to = reinterpret_cast<Element*>(p.activations + row * p.packed_bytes());
  float inverse = 0;
  if (sizeof(Element) == 1) {
    const uint32_t bits = largest_bits(x, p.inputs);
    const bool finite = bits < 0x7f800000, counts = finite && bits >= 0x04000000;
    const float largest = glmjax::cpu::from_bits(bits);
    inverse = counts ? 127 / largest : 0;
    p.row_scales[row] = counts ? largest / 127 : finite ? 0 : glmjax::cpu::from_bits(0x7fc00000);
  }
  const bool skip = sizeof(Element) == 1 && inverse == 0;
  for (int64_t g = 0; g < p.groups; ++g, x += p.group_inputs()) {
    int32_t sum = 0;
    for (int64_t first = 0; first < p.group_inputs(); first += K::kInputs, to += K::kInputs) {
      alignas(64) Element natural[K::kInputs];
      const int64_t left = p.group_inputs() - first;
      if (left >= K::kInputs && !skip) {
        fetch(x + first, K::kInputs, natural, inverse);
      } else {
        for (int64_t i = 0; i < K::kInputs; ++i) natural[i] = 0;
        if (!skip) fetch(x + first, left, natural, inverse);
      }
      if (sizeof(Element) == 1) {
        for (int64_t i = 0; i < K::kInputs; ++i) sum += natural[i];
      }
      K::arrange(natural, to);
    }
    if (sizeof(Element) == 1) p.sums[row * p.groups + g] = sum;
  }
}

// Packs rows [first, last); those past the product's end become zeros.
template <typename K>
void pack(const Product& p, int64_t first, int64_t last) {
  for (int64_t row = first; row < last; ++row) {
    if (row >= p.rows) {
      __builtin_memset(p.activations + row * p.packed_bytes(), 0, p.packed_bytes());
      p.row_scales[row] = 0;
      for (int64_t g = 0; g < p.groups; ++g) p.sums[row * p.groups + g] = 0;
    } else if (p.x_is_bfloat16) {
      pack_row<K, uint16_t>(p, row);
    } else if constexpr (sizeof(typename K::Element) != sizeof(uint16_t)) {  // rows of floats never become bfloat16
      pack_row<K, float>(p, row);
    }
  }
}

// Unpacks a step of weights of which `bytes` are there; the rest is zeros.
template <typename K>
__attribute__((noinline)) void load_part(const uint8_t* weights, int64_t bytes, typename K::Vector* to) {
  alignas(64) uint8_t part[K::kWeightBytes] = {};
  for (int64_t i = 0; i < bytes; ++i) part[i] = weights[i];
  K::load(part, to);
}

inline float scale_of(const Product& p, int64_t group, int64_t output) {
  if (!p.scale) return 1;
  const int64_t at = group * p.outputs + output;
  return p.scale_is_half ? glmjax::cpu::float16_to_float(static_cast<const uint16_t*>(p.scale)[at])
                         : static_cast<const float*>(p.scale)[at];
}

// Takes the offset of the codes off a sum.
template <typename K>
inline float corrected(float sum, const Product&, int64_t, int64_t) {
  return sum;
}
template <typename K>
inline float corrected(int32_t sum, const Product& p, int64_t row, int64_t group) {
  const uint32_t offset = static_cast<uint32_t>(K::kOffset) * static_cast<uint32_t>(p.sums[row * p.groups + group]);
  return static_cast<float>(static_cast<int32_t>(static_cast<uint32_t>(sum) - offset));
}

template <typename K>
inline float scaled(float total, const Product& p, int64_t row) {
  return sizeof(typename K::Element) == 1 ? total * p.row_scales[row] : total;
}

// Computes ROWS rows of four outputs from packed weights: sums[r, o] over one group. Lines at `ahead` are prefetched,
// as many as are read.
template <typename K, int ROWS>
inline void dot(const uint8_t* const weights[kTileOutputs], const uint8_t* const x[ROWS], int64_t bytes,
                const uint8_t* ahead, typename K::Sum sums[ROWS][kTileOutputs]) {
  using Vector = typename K::Vector;
  typename K::Accumulator accumulators[ROWS][kTileOutputs];
  for (int r = 0; r < ROWS; ++r) {
    for (int o = 0; o < kTileOutputs; ++o) accumulators[r][o] = K::zero();
  }
  const int64_t steps = bytes / K::kWeightBytes, rest = bytes % K::kWeightBytes;
  for (int64_t s = 0; s < steps; ++s) {
#pragma GCC unroll 4
    for (int o = 0; o < kTileOutputs; ++o) {
      Vector w[K::kVectors];
      K::load(weights[o] + s * K::kWeightBytes, w);
#pragma GCC unroll 8
      for (int v = 0; v < K::kVectors; ++v) {
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; ++r) {
          const Vector* at = reinterpret_cast<const Vector*>(x[r]) + s * K::kVectors + v;
          accumulators[r][o] = K::add(accumulators[r][o], w[v], *at);
        }
      }
    }
    if (ahead) {
#pragma GCC unroll 4
      for (int64_t line = 0; line < kTileOutputs * K::kWeightBytes; line += 64) {
        __builtin_prefetch(ahead + s * kTileOutputs * K::kWeightBytes + line);
      }
    }
  }
  if (rest) {
#pragma GCC unroll 4
    for (int o = 0; o < kTileOutputs; ++o) {
      Vector w[K::kVectors];
      load_part<K>(weights[o] + steps * K::kWeightBytes, rest, w);
#pragma GCC unroll 1
      for (int v = 0; v < K::kVectors; ++v) {
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; ++r) {
          const Vector* at = reinterpret_cast<const Vector*>(x[r]) + steps * K::kVectors + v;
          accumulators[r][o] = K::add(accumulators[r][o], w[v], *at);
        }
      }
    }
  }
  for (int r = 0; r < ROWS; ++r) K::sum(accumulators[r], sums[r]);
}

// Computes out[row .. row + ROWS, output .. output + 4].
template <typename K, int ROWS>
void few_rows(const Product& p, int64_t row, int64_t output, bool prefetch) {
  const uint8_t* weights[kTileOutputs];
  const uint8_t* x[ROWS];
  float totals[ROWS][kTileOutputs] = {};
  const int64_t there = p.outputs - output < kTileOutputs ? p.outputs - output : kTileOutputs;
  for (int64_t g = 0; g < p.groups; ++g) {
    for (int64_t o = 0; o < kTileOutputs; ++o) {  // behind the end, the last output once more
      weights[o] = p.weights + (output + (o < there ? o : there - 1)) * p.row_bytes + g * p.group_bytes();
    }
    for (int r = 0; r < ROWS; ++r) {
      x[r] = p.activations + (row + r) * p.packed_bytes() + g * p.steps() * p.kernel->step_bytes;
    }
    const uint8_t* ahead = p.weights + (output + kTileOutputs) * p.row_bytes + g * kTileOutputs * p.group_bytes();
    typename K::Sum sums[ROWS][kTileOutputs];
    dot<K, ROWS>(weights, x, p.group_bytes(), prefetch ? ahead : nullptr, sums);
    for (int r = 0; r < ROWS; ++r) {
      for (int64_t o = 0; o < there; ++o) {
        totals[r][o] += corrected<K>(sums[r][o], p, row + r, g) * scale_of(p, g, output + o);
      }
    }
  }
  for (int r = 0; r < ROWS; ++r) {
    for (int64_t o = 0; o < there; ++o) p.out[(row + r) * p.outputs + output + o] = scaled<K>(totals[r][o], p, row + r);
  }
}

// Computes out[:, first .. last] tile by tile, all rows together for each four outputs.
template <typename K>
void few(const Product& p, int64_t first, int64_t last) {
  for (int64_t output = first; output < last; output += kTileOutputs) {
    for (int64_t row = 0; row < p.rows; row += kTileRows) {
      switch (p.rows - row) {
        case 1: few_rows<K, 1>(p, row, output, row == 0); break;
        case 2: few_rows<K, 2>(p, row, output, row == 0); break;
        case 3: few_rows<K, 3>(p, row, output, row == 0); break;
        default: few_rows<K, 4>(p, row, output, row == 0);
      }
    }
  }
}

// Adds `count` vectors of weights, K::kOutputs side by side, times those of four rows to accumulators in memory.
template <typename K>
inline void multiply_tile(const typename K::Vector* weights, const uint8_t* const x[kTileRows], int64_t count,
                          typename K::Accumulator (*accumulators)[kTileRows]) {
  using Vector = typename K::Vector;
  typename K::Accumulator a[K::kOutputs][kTileRows];
  for (int o = 0; o < K::kOutputs; ++o) {
    for (int r = 0; r < kTileRows; ++r) a[o][r] = accumulators[o][r];
  }
  const Vector* rows[kTileRows];
  for (int r = 0; r < kTileRows; ++r) rows[r] = reinterpret_cast<const Vector*>(x[r]);
  for (int64_t i = 0; i < count; ++i) {
#pragma GCC unroll 4
    for (int r = 0; r < kTileRows; ++r) {
      const Vector row = rows[r][i];
#pragma GCC unroll 8
      for (int o = 0; o < K::kOutputs; ++o) a[o][r] = K::add(a[o][r], weights[i * K::kOutputs + o], row);
    }
  }
  for (int o = 0; o < K::kOutputs; ++o) {
    for (int r = 0; r < kTileRows; ++r) accumulators[o][r] = a[o][r];
  }
}

// Unpacks one group of `outputs` rows of weights: to[tile, step, vector, K::kOutputs]; behind the end, zeros.
template <typename K>
void unpack(const Product& p, int64_t first, int64_t outputs, int64_t group, typename K::Vector* to) {
  using Vector = typename K::Vector;
  const int64_t steps = p.steps(), full = p.group_bytes() / K::kWeightBytes, rest = p.group_bytes() % K::kWeightBytes;
  for (int64_t o = 0; o < outputs; ++o) {
    const uint8_t* weights = p.weights + (first + o) * p.row_bytes + group * p.group_bytes();
    Vector* at = to + o / K::kOutputs * steps * K::kVectors * K::kOutputs + o % K::kOutputs;
    for (int64_t s = 0; s < steps; ++s) {
      Vector w[K::kVectors];
      if (s < full) {
        K::load(weights + s * K::kWeightBytes, w);
      } else {
        load_part<K>(weights + s * K::kWeightBytes, rest, w);
      }
      for (int v = 0; v < K::kVectors; ++v, at += K::kOutputs) *at = w[v];
    }
  }
  const int64_t filled = outputs % K::kOutputs;
  if (!filled) return;
  uint8_t nothing[K::kWeightBytes] = {};
  Vector zeros[K::kVectors];
  K::load(nothing, zeros);
  Vector* tile = to + outputs / K::kOutputs * steps * K::kVectors * K::kOutputs;
  for (int64_t i = 0; i < steps * K::kVectors; ++i) {
    for (int64_t o = filled; o < K::kOutputs; ++o) tile[i * K::kOutputs + o] = zeros[0];
  }
}

// Computes out[:, first .. last]: weights unpacked once, then four rows at a time.
template <typename K>
void many(const Product& p, int64_t first, int64_t last) {
  using Vector = typename K::Vector;
  using Accumulator = typename K::Accumulator;
  const int64_t outputs = last - first, tiles = (outputs + K::kOutputs - 1) / K::kOutputs, groups = p.groups;
  const int64_t count = p.steps() * K::kVectors;  // vectors of a group of one row
  const int64_t padded = tiles * K::kOutputs;
  const int64_t vectors = groups * count * padded, accumulating = padded * kTileRows;
  uint8_t* scratch = glmjax::cpu::thread_scratch(vectors * sizeof(Vector) + accumulating * sizeof(Accumulator) +
                                                 (accumulating + groups * padded) * sizeof(float));
  Vector* weights = reinterpret_cast<Vector*>(scratch);
  auto* accumulators = reinterpret_cast<Accumulator(*)[kTileRows]>(weights + vectors);
  float* totals = reinterpret_cast<float*>(accumulators + padded);  // [padded, kTileRows]
  float* scales = totals + accumulating;                            // [groups, padded]
  for (int64_t g = 0; g < groups; ++g) {
    unpack<K>(p, first, outputs, g, weights + g * count * padded);
    for (int64_t o = 0; o < padded; ++o) scales[g * padded + o] = o < outputs ? scale_of(p, g, first + o) : 0;
  }
  constexpr int64_t kBlock = kBlockBytes / (kTileRows * static_cast<int64_t>(sizeof(Vector)));
  for (int64_t row = 0; row < p.rows; row += kTileRows) {
    for (int64_t i = 0; i < accumulating; ++i) totals[i] = 0;
    for (int64_t g = 0; g < groups; ++g) {
      for (int64_t o = 0; o < padded; ++o) {
        for (int r = 0; r < kTileRows; ++r) accumulators[o][r] = K::zero();
      }
      for (int64_t i = 0; i < count; i += kBlock) {
        const uint8_t* x[kTileRows];
        for (int r = 0; r < kTileRows; ++r) {
          x[r] = p.activations + (row + r) * p.packed_bytes() + (g * count + i) * static_cast<int64_t>(sizeof(Vector));
        }
        for (int64_t t = 0; t < tiles; ++t) {
          multiply_tile<K>(weights + g * count * padded + (t * count + i) * K::kOutputs, x,
                           count - i < kBlock ? count - i : kBlock, accumulators + t * K::kOutputs);
        }
      }
      for (int64_t o = 0; o < padded; ++o) {
        typename K::Sum sums[kTileRows];
        K::sum(accumulators[o], sums);
        for (int r = 0; r < kTileRows; ++r) {
          totals[o * kTileRows + r] += corrected<K>(sums[r], p, row + r, g) * scales[g * padded + o];
        }
      }
    }
    for (int r = 0; r < kTileRows && row + r < p.rows; ++r) {
      float* out = p.out + (row + r) * p.outputs + first;
      for (int64_t o = 0; o < outputs; ++o) out[o] = scaled<K>(totals[o * kTileRows + r], p, row + r);
    }
  }
}

// Elements of a step for codes that are read as the nibbles of wide lanes, the lowest first: nibble k of lane d is
// input LANE_NIBBLES * d + (k ^ 1), for the even input is in a byte's high half.
template <int LANE_NIBBLES, int INPUTS, typename Element>
inline void arrange_nibbles(const Element* natural, Element* packed) {
  constexpr int kLanes = INPUTS / LANE_NIBBLES;
  for (int k = 0; k < LANE_NIBBLES; ++k) {
    for (int d = 0; d < kLanes; ++d) packed[k * kLanes + d] = natural[LANE_NIBBLES * d + (k ^ 1)];
  }
}

template <int INPUTS, typename Element>
inline void arrange_naturally(const Element* natural, Element* packed) {
  for (int i = 0; i < INPUTS; ++i) packed[i] = natural[i];
}

template <typename K>
constexpr Kernel kernel_of() {
  static_assert(K::kInputs <= glmjax::cpu::kMostStepInputs && K::kInputs * sizeof(typename K::Element) ==
                K::kVectors * sizeof(typename K::Vector), "a step's rows fill its vectors");
  return {K::kInputs, static_cast<int64_t>(K::kInputs * sizeof(typename K::Element)), kStepVectorsBytes<K>,
          pack<K>, few<K>, many<K>};
}

}  // namespace
