// Kernels for x86 with AVX2 and FMA (Haswell, Zen and later). Sums of bytes by vpmaddubsw, without saturation: INT4 as
// 0 to 15 times a byte, INT8 as magnitudes times bytes that take the code's sign.

#if defined(__x86_64__)

#include <immintrin.h>

#include "numbers.h"
#include "product.h"
#include "target.h"

TARGET_BEGIN("avx2,fma")
#include "tile.h"

namespace {

struct FloatRows {
  using Vector = __m256;
  using Accumulator = __m256;
  using Element = float;
  using Sum = float;
  static constexpr int kWeightBytes = 32, kOffset = 0, kRows = 4;
  static Accumulator zero() { return _mm256_setzero_ps(); }
  static Accumulator add(Accumulator a, Vector weight, Vector x) { return _mm256_fmadd_ps(weight, x, a); }
  static void sum(const Accumulator a[4], Sum sums[4]) {
    const __m256 all = _mm256_hadd_ps(_mm256_hadd_ps(a[0], a[1]), _mm256_hadd_ps(a[2], a[3]));
    _mm_storeu_ps(sums, _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1)));
  }
};

struct Int4Floats : FloatRows {
  static constexpr int kInputs = 64, kVectors = 8;
  static void load(const uint8_t* bytes, Vector w[kVectors]) {
    const __m256i codes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes));
#pragma GCC unroll 8
    for (int k = 0; k < 8; ++k) {
      w[k] = _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(codes, 28 - 4 * k), 28));
    }
  }
  static void arrange(const float* natural, float* packed) { arrange_nibbles<8, kInputs>(natural, packed); }
};

struct Int8Floats : FloatRows {
  static constexpr int kInputs = 32, kVectors = 4;
  static void load(const uint8_t* bytes, Vector w[kVectors]) {
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) {
      const __m128i codes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes + 8 * k));
      w[k] = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(codes));
    }
  }
  static void arrange(const float* natural, float* packed) { arrange_naturally<kInputs>(natural, packed); }
};

struct Bfloat16Floats : FloatRows {
  static constexpr int kInputs = 16, kVectors = 2;
  static void load(const uint8_t* bytes, Vector w[kVectors]) {
#pragma GCC unroll 2
    for (int k = 0; k < 2; ++k) {
      const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes + 16 * k));
      w[k] = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
    }
  }
  static void arrange(const float* natural, float* packed) { arrange_naturally<kInputs>(natural, packed); }
};

struct Float32Floats : FloatRows {
  static constexpr int kInputs = 8, kVectors = 1;
  static void load(const uint8_t* bytes, Vector w[kVectors]) {
    w[0] = _mm256_loadu_ps(reinterpret_cast<const float*>(bytes));
  }
  static void arrange(const float* natural, float* packed) { arrange_naturally<kInputs>(natural, packed); }
};

struct ByteRows {
  using Vector = __m256i;
  using Accumulator = __m256i;
  using Element = int8_t;
  using Sum = int32_t;
  static constexpr int kWeightBytes = 32, kRows = 4;
  static Accumulator zero() { return _mm256_setzero_si256(); }
  static void sum(const Accumulator a[4], Sum sums[4]) {
    const __m256i all = _mm256_hadd_epi32(_mm256_hadd_epi32(a[0], a[1]), _mm256_hadd_epi32(a[2], a[3]));
    const __m128i four = _mm_add_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(sums), four);
  }
};

struct Int4Bytes : ByteRows {
  static constexpr int kInputs = 64, kVectors = 2, kOffset = 8;
  static void load(const uint8_t* bytes, Vector w[kVectors]) {
    const __m256i low = _mm256_set1_epi8(15);
    const __m256i codes =
        _mm256_xor_si256(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes)), _mm256_set1_epi8(-0x78));
    w[0] = _mm256_and_si256(codes, low);
    w[1] = _mm256_and_si256(_mm256_srli_epi16(codes, 4), low);
  }
  static Accumulator add(Accumulator a, Vector weight, Vector x) {
    return _mm256_add_epi32(a, _mm256_madd_epi16(_mm256_maddubs_epi16(weight, x), _mm256_set1_epi16(1)));
  }
  static void arrange(const int8_t* natural, int8_t* packed) { arrange_nibbles<2, kInputs>(natural, packed); }
};

struct Int8Bytes : ByteRows {
  static constexpr int kInputs = 32, kVectors = 1, kOffset = 0;
  static void load(const uint8_t* bytes, Vector w[kVectors]) {
    w[0] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes));
  }
  static Accumulator add(Accumulator a, Vector weight, Vector x) {
    const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(weight), _mm256_sign_epi8(x, weight));
    return _mm256_add_epi32(a, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }
  static void arrange(const int8_t* natural, int8_t* packed) { arrange_naturally<kInputs>(natural, packed); }
};

}  // namespace
TARGET_END

namespace {

const Kernel int4_bytes = kernel_of<Int4Bytes>(), int8_bytes = kernel_of<Int8Bytes>();
const Kernel int4_floats = kernel_of<Int4Floats>(), int8_floats = kernel_of<Int8Floats>();
const Kernel bfloat16_floats = kernel_of<Bfloat16Floats>(), float32_floats = kernel_of<Float32Floats>();

}  // namespace

namespace glmjax::cpu {

const Table kAvx2 = {
    {&int4_bytes, &int8_bytes, nullptr, nullptr},
    {nullptr, nullptr, nullptr, nullptr},
    {&int4_floats, &int8_floats, &bfloat16_floats, &float32_floats},
};

}  // namespace glmjax::cpu

#endif
