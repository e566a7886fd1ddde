// Kernels in C++ alone, vectors of 16 bytes as compilers offer them, for machines without AVX2 or NEON.

#include "numbers.h"
#include "product.h"
#include "tile.h"

namespace {

typedef float Floats __attribute__((vector_size(16)));
typedef int32_t Words __attribute__((vector_size(16)));
typedef int16_t Shorts __attribute__((vector_size(16)));

template <typename T>
inline T read(const uint8_t* bytes) {
  T value;
  __builtin_memcpy(&value, bytes, sizeof value);
  return value;
}

// Sums of four accumulators' lanes, each (0 + 2) + (1 + 3).
template <typename V, typename Sum>
inline void add_lanes(const V a[4], Sum sums[4]) {
  for (int i = 0; i < 4; ++i) sums[i] = (a[i][0] + a[i][2]) + (a[i][1] + a[i][3]);
}

struct FloatRows {
  using Vector = Floats;
  using Accumulator = Floats;
  using Element = float;
  using Sum = float;
  static constexpr int kWeightBytes = 16, kOffset = 0, kRows = 4;
  static Accumulator zero() { return Floats{}; }
  static Accumulator add(Accumulator a, Vector weight, Vector x) { return a + weight * x; }
  static void sum(const Accumulator a[4], Sum sums[4]) { add_lanes(a, sums); }
};

struct Int4Floats : FloatRows {
  static constexpr int kInputs = 32, kVectors = 8;
  static void load(const uint8_t* bytes, Vector w[kVectors]) {
    const Words codes = read<Words>(bytes);
#pragma GCC unroll 8
    for (int k = 0; k < 8; ++k) w[k] = __builtin_convertvector((codes << (28 - 4 * k)) >> 28, Floats);
  }
  static void arrange(const float* natural, float* packed) { arrange_nibbles<8, kInputs>(natural, packed); }
};

struct Int8Floats : FloatRows {
  static constexpr int kInputs = 16, kVectors = 4;
  static void load(const uint8_t* bytes, Vector w[kVectors]) {
    const Words codes = read<Words>(bytes);
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) w[k] = __builtin_convertvector((codes << (24 - 8 * k)) >> 24, Floats);
  }
  static void arrange(const float* natural, float* packed) {
    for (int k = 0; k < 4; ++k) {
      for (int d = 0; d < 4; ++d) packed[4 * k + d] = natural[4 * d + k];
    }
  }
};

struct Bfloat16Floats : FloatRows {
  static constexpr int kInputs = 8, kVectors = 2;
  static void load(const uint8_t* bytes, Vector w[kVectors]) {
    const Words pairs = read<Words>(bytes);
    w[0] = (Floats)(pairs << 16);
    w[1] = (Floats)((pairs >> 16) << 16);
  }
  static void arrange(const float* natural, float* packed) {
    for (int k = 0; k < 2; ++k) {
      for (int d = 0; d < 4; ++d) packed[4 * k + d] = natural[2 * d + k];
    }
  }
};

struct Float32Floats : FloatRows {
  static constexpr int kInputs = 4, kVectors = 1;
  static void load(const uint8_t* bytes, Vector w[kVectors]) { w[0] = read<Floats>(bytes); }
  static void arrange(const float* natural, float* packed) { arrange_naturally<kInputs>(natural, packed); }
};

// Bytes as pairs in lanes of 16 bits: two products of a code and a byte of a row, at most 128 * 127 each, fit together.
struct ByteRows {
  using Vector = Shorts;
  using Accumulator = Words;
  using Element = int8_t;
  using Sum = int32_t;
  static constexpr int kWeightBytes = 16, kOffset = 0, kRows = 4;
  static Accumulator zero() { return Words{}; }
  static Accumulator add(Accumulator a, Vector weight, Vector x) {
    const Shorts low = ((weight << 8) >> 8) * ((x << 8) >> 8), high = (weight >> 8) * (x >> 8);
    const Words pairs = (Words)(low + high);
    return a + ((pairs << 16) >> 16) + (pairs >> 16);
  }
  static void sum(const Accumulator a[4], Sum sums[4]) { add_lanes(a, sums); }
};

struct Int4Bytes : ByteRows {
  static constexpr int kInputs = 32, kVectors = 2;
  static void load(const uint8_t* bytes, Vector w[kVectors]) {
    typedef int8_t Bytes __attribute__((vector_size(16)));
    const Bytes codes = read<Bytes>(bytes);
    w[0] = (Shorts)((Bytes)(codes << 4) >> 4);
    w[1] = (Shorts)(codes >> 4);
  }
  static void arrange(const int8_t* natural, int8_t* packed) { arrange_nibbles<2, kInputs>(natural, packed); }
};

struct Int8Bytes : ByteRows {
  static constexpr int kInputs = 16, kVectors = 1;
  static void load(const uint8_t* bytes, Vector w[kVectors]) { w[0] = read<Shorts>(bytes); }
  static void arrange(const int8_t* natural, int8_t* packed) { arrange_naturally<kInputs>(natural, packed); }
};

const Kernel int4_bytes = kernel_of<Int4Bytes>(), int8_bytes = kernel_of<Int8Bytes>();
const Kernel int4_floats = kernel_of<Int4Floats>(), int8_floats = kernel_of<Int8Floats>();
const Kernel bfloat16_floats = kernel_of<Bfloat16Floats>(), float32_floats = kernel_of<Float32Floats>();

}  // namespace

namespace glmjax::cpu {

const Table kGeneric = {
    {&int4_bytes, &int8_bytes, nullptr, nullptr},
    {nullptr, nullptr, nullptr, nullptr},
    {&int4_floats, &int8_floats, &bfloat16_floats, &float32_floats},
};

}  // namespace glmjax::cpu
