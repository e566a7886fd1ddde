// Attention over a cache for x86 with AVX-512 (attend.h).

#if defined(__x86_64__)

#include <cstdint>

#include "attention.h"
#include "numbers.h"
#include "target.h"

TARGET_BEGIN("avx512f,avx512bw,avx512vl,avx512dq,fma")
#include "attend.h"

namespace glmjax::cpu {

void attend_avx512(const Attention& a, int64_t row, int64_t head, float* scores, float* floats) {
  attend(a, row, head, scores, floats);
}

}  // namespace glmjax::cpu
TARGET_END

#endif
