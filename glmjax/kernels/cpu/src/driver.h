// Runs a product on a pool of threads: XLA's, or a test's.
//
// Work is claimed in chunks by an atomic counter, the caller works too, and nobody waits for a task that has not
// started: where all of the pool's threads are busy with such calls, or wait themselves, the caller does all alone.
// Tasks that start after the last chunk was claimed find nothing, in state that they own a share of.

#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

#include "attention.h"
#include "product.h"

namespace glmjax::cpu {

constexpr int64_t kAloneBytes = 65536;   // weights (times quarters of rows) below which the caller works alone
constexpr int64_t kChunkBytes = 131072;  // of weights that one claim takes; of one segment, where rows are many
constexpr int64_t kFewRows = 8;

// While it lives, denormals count as zeros and rounding is to the nearest, on whatever thread; as XLA has it.
class FloatMode {
 public:
#if defined(__x86_64__)
  FloatMode() : before_(_mm_getcsr()) { _mm_setcsr(0x9fc0); }
  ~FloatMode() { _mm_setcsr(before_); }

 private:
  unsigned before_;
#elif defined(__aarch64__)
  FloatMode() {
    asm volatile("mrs %0, fpcr" : "=r"(before_));
    asm volatile("msr fpcr, %0" : : "r"(uint64_t{1} << 24));
  }
  ~FloatMode() { asm volatile("msr fpcr, %0" : : "r"(before_)); }

 private:
  uint64_t before_;
#endif
};

// Waits until so many are counted.
inline void wait(const std::atomic<int64_t>& count, int64_t enough) {
  for (int tries = 0; count.load(std::memory_order_acquire) < enough; ++tries) {
    if (tries > 256) {
      std::this_thread::yield();
    } else {
#if defined(__x86_64__)
      _mm_pause();
#endif
    }
  }
}

class Call {
 public:
  Call(const Product& product, int64_t threads) : product_(product) {
    const int64_t shared = product.outputs / (4 * threads);  // so that the threads end at about the same time
    const int64_t bytes = product.rows > kFewRows ? std::min(product.row_bytes, kSegmentBytes) : product.row_bytes;
    const int64_t outputs = std::min(kChunkBytes / bytes, shared);
    outputs_ = std::max<int64_t>(outputs / kTileOutputs, 1) * kTileOutputs;
    chunks_ = (product.outputs + outputs_ - 1) / outputs_;
    rows_ = std::max<int64_t>(1, product.rows / (4 * threads));
    row_chunks_ = (product.rows + rows_ - 1) / rows_;
  }

  int64_t chunks() const { return chunks_; }

  // Packs rows, then multiplies, as long as there are chunks to claim.
  void work() {
    const FloatMode mode;
    for (int64_t c; (c = claimed_rows_.fetch_add(1)) < row_chunks_;) {
      product_.kernel->pack(product_, c * rows_, std::min((c + 1) * rows_, product_.rows));
      packed_rows_.fetch_add(1, std::memory_order_release);
    }
    wait(packed_rows_, row_chunks_);
    for (int64_t c; (c = claimed_.fetch_add(1)) < chunks_;) {
      product_.kernel->multiply(product_, c * outputs_, std::min((c + 1) * outputs_, product_.outputs));
      done_.fetch_add(1, std::memory_order_release);
    }
  }

  // Waits for the chunks that others have claimed and are working on.
  void finish() { wait(done_, chunks_); }

 private:
  const Product product_;
  int64_t outputs_, chunks_, rows_, row_chunks_;
  std::atomic<int64_t> claimed_rows_{0}, packed_rows_{0}, claimed_{0}, done_{0};
};

// Computes a product of up to kPanelRows rows. Pool has num_threads() and Schedule(f&&).
template <typename Pool>
void run_panel(const Product& product, Pool& pool) {
  const bool alone = product.outputs * product.row_bytes * std::max<int64_t>(product.rows / 4, 1) < kAloneBytes;
  const int64_t threads = alone ? 1 : std::max<int64_t>(pool.num_threads(), 1);
  const auto call = std::make_shared<Call>(product, threads);
  for (int64_t t = 1; t < std::min(threads, call->chunks()); ++t) pool.Schedule([call] { call->work(); });
  call->work();
  call->finish();
}

// Attention (attention.h): heads of rows are claimed.
class AttentionCall {
 public:
  AttentionCall(const Attention& attention, AttendHead attend)
      : attention_(attention), attend_(attend), chunks_(attention.rows * attention.heads) {}

  int64_t chunks() const { return chunks_; }

  void work() {
    const FloatMode mode;
    std::unique_ptr<float[]> room;
    const int64_t scores = attention_.slots + 32;
    for (int64_t c; (c = claimed_.fetch_add(1)) < chunks_;) {
      if (!room) room.reset(new float[scores + 2 * attention_.width + 64]);
      attend_(attention_, c / attention_.heads, c % attention_.heads, room.get(), room.get() + scores);
      done_.fetch_add(1, std::memory_order_release);
    }
  }

  void finish() { wait(done_, chunks_); }

 private:
  const Attention attention_;
  const AttendHead attend_;
  const int64_t chunks_;
  std::atomic<int64_t> claimed_{0}, done_{0};
};

template <typename Pool>
void run(const Attention& attention, AttendHead attend, Pool& pool) {
  int64_t seen = 0;
  for (int64_t row = 0; row < attention.rows; ++row) seen += std::max(attention.end[row], 0);
  const bool alone = seen * attention.heads * attention.width < kAloneBytes;
  const int64_t threads = alone ? 1 : std::max<int64_t>(pool.num_threads(), 1);
  const auto call = std::make_shared<AttentionCall>(attention, attend);
  for (int64_t t = 1; t < std::min(threads, call->chunks()); ++t) pool.Schedule([call] { call->work(); });
  call->work();
  call->finish();
}

template <typename Word>
inline bool is_zeros(const void* x, int64_t count) {
  const Word* words = static_cast<const Word*>(x);
  Word all = 0;
  for (int64_t i = 0; i < count; ++i) all |= words[i];
  return static_cast<Word>(all << 1) == 0;  // of either sign
}

// Computes a product of any number of rows, a panel after another in the same scratch. What rows of zeros give, zeros, is
// written at once: so those that nobody needs cost nothing.
template <typename Pool>
void run(const Product& product, Pool& pool) {
  int32_t* index = const_cast<int32_t*>(product.row_index);
  for (int64_t first = 0; first < product.rows; first += kPanelRows) {
    Product panel = product;
    panel.rows = 0;
    for (int64_t row = first; row < std::min(first + kPanelRows, product.rows); ++row) {
      const bool zeros =
          product.x_is_bfloat16
              ? is_zeros<uint16_t>(static_cast<const uint16_t*>(product.x) + row * product.inputs, product.inputs)
              : is_zeros<uint32_t>(static_cast<const uint32_t*>(product.x) + row * product.inputs, product.inputs);
      if (zeros) {
        std::fill_n(product.out + row * product.outputs, product.outputs, 0.0f);
      } else {
        index[panel.rows++] = static_cast<int32_t>(row);
      }
    }
    if (panel.rows) run_panel(panel, pool);
  }
}

// Returns the bytes of scratch that a product needs, whichever kernel computes it: rows of up to four bytes an input,
// groups padded to whole steps, their scales and sums, and what aligns them.
inline int64_t scratch_bytes(int64_t rows, int64_t inputs, int64_t groups, bool fast) {
  const int64_t steps = (inputs / groups + kMostStepInputs - 1) / kMostStepInputs;
  return 64 + std::min(rows, kPanelRows) * (groups * steps * (kMostStepInputs * (fast ? 1 : 4) + 4) + 8);
}

// Lays the packed rows, their places, scales and sums into the scratch.
inline void place_scratch(Product& product, uint8_t* scratch) {
  const int64_t rows = std::min(product.rows, kPanelRows);
  product.activations = scratch + (64 - reinterpret_cast<uintptr_t>(scratch) % 64) % 64;
  product.row_scales = reinterpret_cast<float*>(product.activations + rows * product.packed_bytes());
  product.row_index = reinterpret_cast<int32_t*>(product.row_scales + rows);
  product.sums = const_cast<int32_t*>(product.row_index) + rows;
}

}  // namespace glmjax::cpu
