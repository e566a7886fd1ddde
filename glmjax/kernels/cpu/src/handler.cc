// What the library exports: XLA's handler of a product, and what Python asks about this machine (library.py).

#include <cstdint>
#include <string>
#include <string_view>

#include "driver.h"
#include "product.h"
#include "xla/ffi/api/c_api.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace glmjax::cpu {
namespace {

// Computes out = (x * weights) * scale, all of one product's shapes having been checked by product.py. `scratch` is a
// result only so that XLA finds room for it.
ffi::Error multiply(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer weights, ffi::AnyBuffer scale,
                    ffi::ResultBuffer<ffi::F32> out, ffi::ResultBuffer<ffi::U8> scratch, int64_t kind, bool fast,
                    std::string_view isa) {
  Product product{};
  product.rows = x.dimensions()[0];
  product.inputs = x.dimensions()[1];
  product.outputs = weights.dimensions()[0];
  product.x = x.untyped_data();
  product.x_is_bfloat16 = x.element_type() == ffi::BF16;
  product.weights = static_cast<const uint8_t*>(weights.untyped_data());
  const WeightKind weight_kind = static_cast<WeightKind>(kind);
  constexpr int64_t kBits[kWeightKinds] = {4, 8, 16, 32};
  product.row_bytes = product.inputs * kBits[weight_kind] / 8;
  product.groups = scale.dimensions()[0];
  if (product.groups) product.scale = scale.untyped_data();
  product.groups = product.groups ? product.groups : 1;
  product.scale_is_half = scale.element_type() == ffi::F16;
  product.out = out->typed_data();
  product.kernel = choose(std::string(isa).c_str(), weight_kind, product.x_is_bfloat16, fast);
  if (!product.kernel) {
    const std::string words = "this machine does not have GLMJAX_CPU_ISA=" + std::string(isa);
    return ffi::Error(ffi::ErrorCode::kInvalidArgument, words);
  }
  if (static_cast<int64_t>(scratch->size_bytes()) <
      scratch_bytes(product.rows, product.inputs, product.groups, fast)) {
    return ffi::Error(ffi::ErrorCode::kInvalidArgument, "the scratch is too small");
  }
  place_scratch(product, scratch->typed_data());
  run(product, pool);
  return ffi::Error::Success();
}

}  // namespace
}  // namespace glmjax::cpu

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT XLA_FFI_Error* glmjax_cpu_product(XLA_FFI_CallFrame* call_frame);
XLA_FFI_DEFINE_HANDLER_SYMBOL(glmjax_cpu_product, glmjax::cpu::multiply,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::U8>>()
                                  .Attr<int64_t>("kind")
                                  .Attr<bool>("fast")
                                  .Attr<std::string_view>("isa"));

// The number of what the handler takes; library.py has the same. Another one with every change of arguments.
EXPORT int glmjax_cpu_interface() { return 1; }

// The version of XLA's interface that the library was built for.
EXPORT int glmjax_cpu_ffi_major() { return XLA_FFI_API_MAJOR; }
EXPORT int glmjax_cpu_ffi_minor() { return XLA_FFI_API_MINOR; }

// The instruction sets of this machine, the best first; null at the end.
EXPORT const char* const* glmjax_cpu_sets() { return glmjax::cpu::sets(); }

// The sum of so many words: what reading memory takes.
EXPORT uint64_t glmjax_cpu_sum_words(const uint64_t* words, int64_t count) {
  uint64_t sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += words[i];
  return sum;
}
