// The way through a product, as templates over a kernel's operations K. Each set_*.cc includes this file in the region
// that is compiled for its instructions; everything is local to that file, so that the linker never takes one set's
// code for another's.
//
// Weights become vectors in registers, anew for each tile of rows: that costs less than writing them to a scratch and
// reading them again, whatever the number of rows, as long as rows and weights come from a cache.
//
// K has: Vector, Accumulator, Element (of a packed row), Sum (float, or int32_t in the fast mode);
//   kInputs, kWeightBytes: inputs of a step, and the bytes that they take in a row of weights
//   kVectors: vectors of a step, both of weights and of rows
//   kOffset: what is added to every code in `load` (whoever sums bytes takes it off again)
//   kRows: rows of a tile, 4 to 6; what registers allow
//   load(bytes, Vector[kVectors]): unpacks a step of weights
//   arrange(natural, packed): puts kInputs elements where `load` has their weights
//   zero(), add(accumulator, weight, x), sum(accumulators[4], sums[4])

namespace {

using glmjax::cpu::Kernel;
using glmjax::cpu::kTileOutputs;
using glmjax::cpu::Product;

constexpr int64_t kPanelBytes = 262144;  // of packed rows, which stay in the second cache while weights pass by
constexpr int64_t kPageBytes = 4096, kPagesAhead = 32768;
constexpr int64_t kLongRowBytes = 8192;  // of weights: rows that the processor's own prefetching follows better

// Four outputs' weights of a segment stay in the first cache while rows pass by; of INT4 as many as of INT8.
template <typename K>
constexpr int64_t kSegmentInputs =
    glmjax::cpu::kSegmentBytes / (K::kWeightBytes < K::kInputs ? K::kInputs : K::kWeightBytes) * K::kInputs;

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

// What is summed at a time.
struct Segment {
  int64_t index;              // among all of a row
  int64_t group;
  int64_t start, inputs;      // its first input of a row, and how many there are
  int64_t first_step, steps;  // likewise in a packed row, which has whole steps
};

// Returns where a packed row's segment begins.
template <typename K>
inline uint8_t* packed(const Product& p, const Segment& segment, int64_t row) {
  return p.activations + (segment.first_step * p.rows + row * segment.steps) * p.kernel->step_bytes;
}

// Returns the segment behind another one of the same product; before the first one there is one of no inputs.
template <typename K>
inline Segment behind(const Product& p, Segment segment) {
  const int64_t start = segment.start + segment.inputs, group = start / p.group_inputs();
  const int64_t left = (group + 1) * p.group_inputs() - start;
  const int64_t inputs = left < kSegmentInputs<K> ? left : kSegmentInputs<K>;
  const int64_t steps = (inputs + K::kInputs - 1) / K::kInputs;
  return {segment.index + 1, group, start, inputs, segment.first_step + segment.steps, steps};
}

// Packs x[inputs] of one row; in the fast mode it becomes bytes, codes of a scale that is the largest magnitude / 127.
// A row that is not finite gets the scale NaN; one whose largest magnitude is below 2^-119 counts as zeros.
template <typename K, typename X>
void pack_row(const Product& p, int64_t row) {
  using Element = typename K::Element;
  const X* x = static_cast<const X*>(p.x) + p.row_index[row] * p.inputs;
  float inverse = 0;
  if (sizeof(Element) == 1) {
    const uint32_t bits = largest_bits(x, p.inputs);
    const bool finite = bits < 0x7f800000, counts = finite && bits >= 0x04000000;
    const float largest = glmjax::cpu::from_bits(bits);
    inverse = counts ? 127 / largest : 0;
    p.row_scales[row] = counts ? largest / 127 : finite ? 0 : glmjax::cpu::from_bits(0x7fc00000);
  }
  const bool skip = sizeof(Element) == 1 && inverse == 0;
  for (Segment segment = behind<K>(p, {-1}); segment.index < p.segments(); segment = behind<K>(p, segment)) {
    Element* to = reinterpret_cast<Element*>(packed<K>(p, segment, row));
    int32_t sum = 0;
    for (int64_t i = 0; i < segment.inputs; i += K::kInputs, to += K::kInputs) {
      alignas(64) Element natural[K::kInputs];
      const X* from = x + segment.start + i;
      if (segment.inputs - i >= K::kInputs && !skip) {
        fetch(from, K::kInputs, natural, inverse);
      } else {
        for (Element& element : natural) element = 0;
        if (!skip) fetch(from, segment.inputs - i, natural, inverse);
      }
      if (sizeof(Element) == 1) {
        for (const Element element : natural) sum += element;
      }
      K::arrange(natural, to);
    }
    if (sizeof(Element) == 1) p.sums[row * p.segments() + segment.index] = sum;
  }
}

// Packs rows [first, last).
template <typename K>
void pack(const Product& p, int64_t first, int64_t last) {
  for (int64_t row = first; row < last; ++row) {
    if (p.x_is_bfloat16) {
      pack_row<K, uint16_t>(p, row);
    } else if constexpr (sizeof(typename K::Element) != sizeof(uint16_t)) {  // rows of floats never become bfloat16
      pack_row<K, float>(p, row);
    }
  }
}

// Unpacks a whole step of an output's weights.
template <typename K>
struct Whole {
  const uint8_t* const* weights;
  int64_t at;

  inline void operator()(int output, typename K::Vector* to) const { K::load(weights[output] + at, to); }
};

// Unpacks a step of which `bytes` are there; the rest is zeros.
template <typename K>
struct Part {
  const uint8_t* const* weights;
  int64_t at, bytes;

  __attribute__((noinline)) void operator()(int output, typename K::Vector* to) const {
    alignas(64) uint8_t part[K::kWeightBytes] = {};
    for (int64_t i = 0; i < bytes; ++i) part[i] = weights[output][at + i];
    K::load(part, to);
  }
};

inline float scale_of(const Product& p, int64_t group, int64_t output) {
  if (!p.scale) return 1;
  const int64_t at = group * p.outputs + output;
  return p.scale_is_half ? glmjax::cpu::float16_to_float(static_cast<const uint16_t*>(p.scale)[at])
                         : static_cast<const float*>(p.scale)[at];
}

// Takes the offset of the codes off a sum over a segment.
inline float corrected(float sum, int64_t, const Product&, int64_t, int64_t) { return sum; }
inline float corrected(int32_t sum, int64_t offset, const Product& p, int64_t row, int64_t segment) {
  const uint32_t more = static_cast<uint32_t>(offset) * static_cast<uint32_t>(p.sums[row * p.segments() + segment]);
  return static_cast<float>(static_cast<int32_t>(static_cast<uint32_t>(sum) - more));
}

// Adds a step of four outputs' weights times ROWS rows to the accumulators. `load(o, w)` unpacks the weights of one.
// Where they are one vector, those of all four are there first, so that each vector of a row is read once.
template <typename K, int ROWS, typename Load>
inline void add_step(Load load, const uint8_t* const x[ROWS], int64_t step,
                     typename K::Accumulator accumulators[ROWS][kTileOutputs]) {
  using Vector = typename K::Vector;
  Vector w[K::kVectors == 1 ? kTileOutputs : K::kVectors];
  if constexpr (K::kVectors == 1) {
#pragma GCC unroll 4
    for (int o = 0; o < kTileOutputs; ++o) load(o, w + o);
#pragma GCC unroll 6
    for (int r = 0; r < ROWS; ++r) {
      const Vector row = reinterpret_cast<const Vector*>(x[r])[step];
#pragma GCC unroll 4
      for (int o = 0; o < kTileOutputs; ++o) accumulators[r][o] = K::add(accumulators[r][o], w[o], row);
    }
  } else {
#pragma GCC unroll 4
    for (int o = 0; o < kTileOutputs; ++o) {
      load(o, w);
#pragma GCC unroll 8
      for (int v = 0; v < K::kVectors; ++v) {
#pragma GCC unroll 6
        for (int r = 0; r < ROWS; ++r) {
          const Vector* at = reinterpret_cast<const Vector*>(x[r]) + step * K::kVectors + v;
          accumulators[r][o] = K::add(accumulators[r][o], w[v], *at);
        }
      }
    }
  }
}

// Computes ROWS rows of four outputs over a segment: sums[r, o]. Lines at `ahead` are prefetched, as many as are read.
template <typename K, int ROWS>
inline void dot(const uint8_t* const weights[kTileOutputs], const uint8_t* const x[ROWS], int64_t bytes,
                const uint8_t* ahead, typename K::Sum sums[ROWS][kTileOutputs]) {
  typename K::Accumulator accumulators[ROWS][kTileOutputs];
  for (int r = 0; r < ROWS; ++r) {
    for (int o = 0; o < kTileOutputs; ++o) accumulators[r][o] = K::zero();
  }
  const int64_t steps = bytes / K::kWeightBytes, rest = bytes % K::kWeightBytes;
  for (int64_t s = 0; s < steps; ++s) {
    add_step<K, ROWS>(Whole<K>{weights, s * K::kWeightBytes}, x, s, accumulators);
    if (ahead) {
#pragma GCC unroll 4
      for (int64_t line = 0; line < kTileOutputs * K::kWeightBytes; line += 64) {
        __builtin_prefetch(ahead + s * kTileOutputs * K::kWeightBytes + line, 0, 2);
      }
    }
  }
  if (rest) add_step<K, ROWS>(Part<K>{weights, steps * K::kWeightBytes, rest}, x, steps, accumulators);
#pragma GCC unroll 6
  for (int r = 0; r < ROWS; ++r) K::sum(accumulators[r], sums[r]);
}

// Adds a segment to out[row .. row + ROWS, output .. output + 4]; the first is written, the last completes them.
template <typename K, int ROWS>
void add_tile(const Product& p, const Segment& segment, int64_t row, int64_t output, bool prefetch) {
  const uint8_t* weights[kTileOutputs];
  const uint8_t* x[ROWS];
  const int64_t there = p.outputs - output < kTileOutputs ? p.outputs - output : kTileOutputs;
  const int64_t start = segment.start * K::kWeightBytes / K::kInputs;
  for (int64_t o = 0; o < kTileOutputs; ++o) {  // behind the end, the last output once more
    weights[o] = p.weights + (output + (o < there ? o : there - 1)) * p.row_bytes + start;
  }
  for (int64_t r = 0; r < ROWS; ++r) x[r] = packed<K>(p, segment, row + r);
  const bool begins = segment.index == 0, ends = segment.index == p.segments() - 1;
  const int64_t bytes = segment.inputs * K::kWeightBytes / K::kInputs;
  const uint8_t* ahead = p.weights + (output + kTileOutputs) * p.row_bytes + start * kTileOutputs;
  if (prefetch) {  // lines of pages further on, so that the translation of their addresses is there in time
    const uint8_t* pages = ahead + kPagesAhead;
    for (int64_t at = 0; at < kTileOutputs * bytes; at += kPageBytes) __builtin_prefetch(pages + at, 0, 2);
  }
  typename K::Sum sums[ROWS][kTileOutputs];
  dot<K, ROWS>(weights, x, bytes, prefetch && p.row_bytes < kLongRowBytes ? ahead : nullptr, sums);
  for (int64_t o = 0; o < there; ++o) {
    const float scale = scale_of(p, segment.group, output + o);
    for (int64_t r = 0; r < ROWS; ++r) {
      float* out = p.out + p.row_index[row + r] * p.outputs + output + o;
      float total = corrected(sums[r][o], K::kOffset, p, row + r, segment.index) * scale;
      if (!begins) total += *out;
      if (sizeof(typename K::Element) == 1 && ends) total *= p.row_scales[row + r];
      *out = total;
    }
  }
}

// Adds a segment to rows [row, end) of four outputs, K::kRows at a time.
template <typename K>
inline void add_rows(const Product& p, const Segment& segment, int64_t row, int64_t end, int64_t output,
                     bool prefetch) {
  for (; end - row >= K::kRows; row += K::kRows, prefetch = false) {
    add_tile<K, K::kRows>(p, segment, row, output, prefetch);
  }
  switch (end - row) {
    case 1: return add_tile<K, 1>(p, segment, row, output, prefetch);
    case 2: return add_tile<K, 2>(p, segment, row, output, prefetch);
    case 3: return add_tile<K, 3>(p, segment, row, output, prefetch);
    case 4:
      if constexpr (K::kRows > 4) return add_tile<K, 4>(p, segment, row, output, prefetch);
      break;
    case 5:
      if constexpr (K::kRows > 5) return add_tile<K, 5>(p, segment, row, output, prefetch);
  }
}

// Computes out[:, first .. last]. Few rows: output after output, so that weights are read as they lie in memory. Many:
// panel after panel of rows, segment after segment, each with all the outputs, whose weights stay in the second cache.
template <typename K>
void multiply(const Product& p, int64_t first, int64_t last) {
  const Segment longest = behind<K>(p, {-1});
  const bool few = p.rows * p.packed_bytes() <= kPanelBytes || p.rows <= K::kRows;
  const int64_t fitting = kPanelBytes / (longest.steps * p.kernel->step_bytes) / K::kRows * K::kRows;
  const int64_t panel = few ? p.rows : fitting < K::kRows ? K::kRows : fitting;
  const int64_t block = few ? kTileOutputs : last - first;
  for (int64_t row = 0; row < p.rows; row += panel) {
    const int64_t end = p.rows - row < panel ? p.rows : row + panel;
    for (int64_t begin = first; begin < last; begin += block) {
      for (Segment segment = longest; segment.index < p.segments(); segment = behind<K>(p, segment)) {
        for (int64_t output = begin; output < last && output < begin + block; output += kTileOutputs) {
          add_rows<K>(p, segment, row, end, output, few);
        }
      }
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
  return {K::kInputs, static_cast<int64_t>(K::kInputs * sizeof(typename K::Element)), kSegmentInputs<K>, pack<K>,
          multiply<K>};
}

}  // namespace
