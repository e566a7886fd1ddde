// Attention over a cache for x86 with AVX2 (attend.h).

#if defined(__x86_64__)

#include <cstdint>

#include "attention.h"
#include "numbers.h"
#include "target.h"

TARGET_BEGIN("avx2,fma")
#include "attend.h"

namespace glmjax::cpu {

void attend_avx2(const Attention& a, int64_t row, int64_t head, float* scores, float* floats) {
  attend(a, row, head, scores, floats);
}

}  // namespace glmjax::cpu
TARGET_END

#endif
