// Kernels for x86 with AVX-512 F, BW, VL and DQ (Skylake-X and later): rows of floats. Sums of bytes are AVX2's, or
// need VNNI (set_avx512_vnni.cc).

#if defined(__x86_64__)

#include <immintrin.h>

#include "numbers.h"
#include "product.h"
#include "target.h"

TARGET_BEGIN("avx512f,avx512bw,avx512vl,avx512dq,fma")
#include "tile.h"

#include "sums_avx512.h"

namespace {

struct FloatRows {
  using Vector = __m512;
  using Accumulator = __m512;
  using Element = float;
  using Sum = float;
  static constexpr int kWeightBytes = 64, kOffset = 0, kRows = 6;
  static Accumulator zero() { return _mm512_setzero_ps(); }
  static Accumulator add(Accumulator a, Vector weight, Vector x) { return _mm512_fmadd_ps(weight, x, a); }
  static void sum(const Accumulator a[4], Sum sums[4]) { _mm_storeu_ps(sums, sum_floats(a)); }
};

// A code is an entry of a table of sixteen floats; the permutation reads the low four bits of each lane.
struct Int4Floats : FloatRows {
  static constexpr int kInputs = 128, kVectors = 8;
  static void load(const uint8_t* bytes, Vector w[kVectors]) {
    const __m512 table = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1);
    const __m512i codes = _mm512_loadu_si512(bytes);
#pragma GCC unroll 8
    for (int k = 0; k < 8; ++k) w[k] = _mm512_permutexvar_ps(_mm512_srli_epi32(codes, 4 * k), table);
  }
  static void arrange(const float* natural, float* packed) { arrange_nibbles<8, kInputs>(natural, packed); }
};

struct Int8Floats : FloatRows {
  static constexpr int kInputs = 64, kVectors = 4;
  static void load(const uint8_t* bytes, Vector w[kVectors]) {
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) {
      const __m128i codes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes + 16 * k));
      w[k] = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(codes));
    }
  }
  static void arrange(const float* natural, float* packed) { arrange_naturally<kInputs>(natural, packed); }
};

struct Bfloat16Floats : FloatRows {
  static constexpr int kInputs = 32, kVectors = 2;
  static void load(const uint8_t* bytes, Vector w[kVectors]) {
#pragma GCC unroll 2
    for (int k = 0; k < 2; ++k) {
      const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes + 32 * k));
      w[k] = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
    }
  }
  static void arrange(const float* natural, float* packed) { arrange_naturally<kInputs>(natural, packed); }
};

struct Float32Floats : FloatRows {
  static constexpr int kInputs = 16, kVectors = 1;
  static void load(const uint8_t* bytes, Vector w[kVectors]) { w[0] = _mm512_loadu_ps(bytes); }
  static void arrange(const float* natural, float* packed) { arrange_naturally<kInputs>(natural, packed); }
};

}  // namespace
TARGET_END

namespace {

const Kernel int4_floats = kernel_of<Int4Floats>(), int8_floats = kernel_of<Int8Floats>();
const Kernel bfloat16_floats = kernel_of<Bfloat16Floats>(), float32_floats = kernel_of<Float32Floats>();

}  // namespace

namespace glmjax::cpu {

const Table kAvx512 = {
    {nullptr, nullptr, nullptr, nullptr},
    {nullptr, nullptr, nullptr, nullptr},
    {&int4_floats, &int8_floats, &bfloat16_floats, &float32_floats},
};

}  // namespace glmjax::cpu

#endif
