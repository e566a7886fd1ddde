// Kernels for x86 with AVX512-BF16 (Cooper Lake, Sapphire Rapids, Zen 4 and later): rows of bfloat16 as they are, by
// vdpbf16ps, which takes pairs to a float32 sum. Every code of 4 and 8 bits is a bfloat16 exactly.

#if defined(__x86_64__)

#include <immintrin.h>

#include "numbers.h"
#include "product.h"
#include "target.h"

TARGET_BEGIN("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma")
#include "tile.h"

#include "sums_avx512.h"

namespace {

struct BfloatRows {
  using Vector = __m512i;
  using Accumulator = __m512;
  using Element = uint16_t;
  using Sum = float;
  static constexpr int kWeightBytes = 64, kOffset = 0, kRows = 6;
  static Accumulator zero() { return _mm512_setzero_ps(); }
  // As an instruction, for GCC 12 makes copies of the accumulator around the intrinsic.
  static Accumulator add(Accumulator a, Vector weight, Vector x) {
    asm("vdpbf16ps %2, %1, %0" : "+v"(a) : "v"(weight), "vm"(x));
    return a;
  }
  static void sum(const Accumulator a[4], Sum sums[4]) { _mm_storeu_ps(sums, sum_floats(a)); }
};

// A code is an entry of a table; the permutation reads the low five bits of each lane, so that it is there twice.
struct Int4Bfloats : BfloatRows {
  static constexpr int kInputs = 128, kVectors = 4;
  static void load(const uint8_t* bytes, Vector w[kVectors]) {
    alignas(64) static const uint16_t kCodes[32] = {
        0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0, 0xc100, 0xc0e0, 0xc0c0,
        0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80, 0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0,
        0x40c0, 0x40e0, 0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80};
    const __m512i table = _mm512_load_si512(kCodes), codes = _mm512_loadu_si512(bytes);
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) w[k] = _mm512_permutexvar_epi16(_mm512_srli_epi16(codes, 4 * k), table);
  }
  static void arrange(const uint16_t* natural, uint16_t* packed) { arrange_nibbles<4, kInputs>(natural, packed); }
};

struct Int8Bfloats : BfloatRows {
  static constexpr int kInputs = 64, kVectors = 2;
  static __m512 floats(const uint8_t* bytes) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes))));
  }
  static void load(const uint8_t* bytes, Vector w[kVectors]) {
#pragma GCC unroll 2
    for (int k = 0; k < 2; ++k) {
      w[k] = (__m512i)_mm512_cvtne2ps_pbh(floats(bytes + 32 * k + 16), floats(bytes + 32 * k));
    }
  }
  static void arrange(const uint16_t* natural, uint16_t* packed) { arrange_naturally<kInputs>(natural, packed); }
};

struct Bfloat16Bfloats : BfloatRows {
  static constexpr int kInputs = 32, kVectors = 1;
  static void load(const uint8_t* bytes, Vector w[kVectors]) { w[0] = _mm512_loadu_si512(bytes); }
  static void arrange(const uint16_t* natural, uint16_t* packed) { arrange_naturally<kInputs>(natural, packed); }
};

}  // namespace
TARGET_END

namespace {

const Kernel int4_bfloats = kernel_of<Int4Bfloats>(), int8_bfloats = kernel_of<Int8Bfloats>();
const Kernel bfloat16_bfloats = kernel_of<Bfloat16Bfloats>();

}  // namespace

namespace glmjax::cpu {

const Table kAvx512Bf16 = {
    {nullptr, nullptr, nullptr, nullptr},
    {&int4_bfloats, &int8_bfloats, &bfloat16_bfloats, nullptr},
    {nullptr, nullptr, nullptr, nullptr},
};

}  // namespace glmjax::cpu

#endif
