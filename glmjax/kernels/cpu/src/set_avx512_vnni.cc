// Kernels for x86 with AVX512-VNNI (Cascade Lake, Ice Lake, Zen 4 and later): sums of bytes by vpdpbusd, whose first
// factor is unsigned: codes are made so by an offset.

#if defined(__x86_64__)

#include <immintrin.h>

#include "numbers.h"
#include "product.h"
#include "target.h"

TARGET_BEGIN("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,fma")
#include "tile.h"

#include "sums_avx512.h"

namespace {

struct ByteRows {
  using Vector = __m512i;
  using Accumulator = __m512i;
  using Element = int8_t;
  using Sum = int32_t;
  static constexpr int kWeightBytes = 64, kRows = 4;
  static Accumulator zero() { return _mm512_setzero_si512(); }
  // As an instruction, for GCC 12 makes copies of the accumulator around the intrinsic: a quarter of the speed.
  static Accumulator add(Accumulator a, Vector weight, Vector x) {
    asm("vpdpbusd %2, %1, %0" : "+v"(a) : "v"(weight), "vm"(x));
    return a;
  }
  static void sum(const Accumulator a[4], Sum sums[4]) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(sums), sum_words(a));
  }
};

struct Int4Bytes : ByteRows {
  static constexpr int kInputs = 128, kVectors = 2, kOffset = 8;
  static void load(const uint8_t* bytes, Vector w[kVectors]) {
    const __m512i low = _mm512_set1_epi8(15);
    const __m512i codes = _mm512_xor_si512(_mm512_loadu_si512(bytes), _mm512_set1_epi8(-0x78));
    w[0] = _mm512_and_si512(codes, low);
    w[1] = _mm512_and_si512(_mm512_srli_epi16(codes, 4), low);
  }
  static void arrange(const int8_t* natural, int8_t* packed) { arrange_nibbles<2, kInputs>(natural, packed); }
};

struct Int8Bytes : ByteRows {
  static constexpr int kInputs = 64, kVectors = 1, kOffset = 128;
  static void load(const uint8_t* bytes, Vector w[kVectors]) {
    w[0] = _mm512_xor_si512(_mm512_loadu_si512(bytes), _mm512_set1_epi8(-128));
  }
  static void arrange(const int8_t* natural, int8_t* packed) { arrange_naturally<kInputs>(natural, packed); }
};

}  // namespace
TARGET_END

namespace {

const Kernel int4_bytes = kernel_of<Int4Bytes>(), int8_bytes = kernel_of<Int8Bytes>();

}  // namespace

namespace glmjax::cpu {

const Table kAvx512Vnni = {
    {&int4_bytes, &int8_bytes, nullptr, nullptr},
    {nullptr, nullptr, nullptr, nullptr},
    {nullptr, nullptr, nullptr, nullptr},
};

}  // namespace glmjax::cpu

#endif
