// Which of the kernels of a block a call takes; each is in an object of its own (csrc/freenet_block.cu).
#include "freenet_block.h"

namespace speedk {
namespace {

// f(product) with the way that this job's products are computed.
template <class F> int with_product(const FreenetBlock& job, F f) {
  if (job.M == 0) return 0;
  switch (job.dtype) {
    case Dtype::bfloat16: return f(std::integral_constant<Product, Product::bfloat16>());
    case Dtype::float16: return f(std::integral_constant<Product, Product::float16>());
    case Dtype::float32:
      return job.tf32 ? f(std::integral_constant<Product, Product::tf32>())
                      : f(std::integral_constant<Product, Product::float32>());
    default: return kInvalidValue;
  }
}

}  // namespace

int freenet_block_cuda(const FreenetBlock& job, void* out, void* stream) {
  return with_product(job, [&](auto product) { return block_forward<product()>(job, out, stream); });
}

int freenet_block_backward_cuda(const FreenetBlock& job, const void* d_out, void* d_features, void* d_state,
                                void* factors, int64_t size, float* sums, bool more, void* stream) {
  const int64_t bytes = size * (job.dtype == Dtype::float32 ? 4 : 2);
  const auto factor = [&](int i) { return static_cast<void*>(static_cast<char*>(factors) + i * bytes); };
  const BlockGradients to{d_out,     d_features, d_state,   factor(0), factor(1),
                          factor(2), factor(3),  factor(4), sums,      more};
  return with_product(job, [&](auto product) { return block_backward<product()>(job, to, stream); });
}

}  // namespace speedk
