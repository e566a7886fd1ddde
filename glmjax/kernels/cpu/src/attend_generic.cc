// Attention over a cache for any machine (attend.h).

#include <cstdint>

#include "attention.h"
#include "numbers.h"

#include "attend.h"

namespace glmjax::cpu {

void attend_generic(const Attention& a, int64_t row, int64_t head, float* scores, float* floats) {
  attend(a, row, head, scores, floats);
}

}  // namespace glmjax::cpu
