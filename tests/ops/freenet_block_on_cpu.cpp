#include "tensor_core_on_cpu.h"

#include "freenet_block.cuh"
#include "row_products.cuh"

using namespace speedk;

namespace {

template <Product P> bool run(const FreenetBlock& job, void* out, const BlockGradients* to) {
  constexpr int D = kBlockWidth;
  if (to) {
    return launch((job.M + kBlockTokens - 1) / kBlockTokens, kBackwardThreads,
                  [&] { block_backward_kernel<P, D>(job, *to); }, true);
  }
  return launch<int64_t>(job.M > 0, kForwardThreads<P>, [&] { block_kernel<P, D>(job, out); });
}

template <Product P> bool run(const RowProducts& job, float* partial, int64_t splits, bool more) {
  constexpr int D = kProductWidth;
  const int64_t stages = (job.M + kStageTokens<P> - 1) / kStageTokens<P>, of_split = (stages + splits - 1) / splits;
  const emulated::Index grid{static_cast<unsigned>(splits), static_cast<unsigned>(job.count), 1};
  return launch(grid, kGroups * kGroupThreads<D>,
                [&] { row_products_kernel<P, D>(job, partial, of_split * kStageTokens<P>, more); }, true);
}

// f(product) for a dtype.
template <class F> bool with_product(int dtype, bool tf32, F f) {
  switch (static_cast<Dtype>(dtype)) {
    case Dtype::bfloat16: return f(std::integral_constant<Product, Product::bfloat16>());
    case Dtype::float16: return f(std::integral_constant<Product, Product::float16>());
    default:
      return tf32 ? f(std::integral_constant<Product, Product::tf32>())
                  : f(std::integral_constant<Product, Product::float32>());
  }
}

}  // namespace

// sizes: M, D; given: features, state and the ten weights; results: out alone, or of the backward pass d_out,
// d_features, d_state, factors and sums.
extern "C" bool freenet_block_on_cpu(int dtype, bool tf32, bool sum, const int64_t* sizes, void** given, double eps,
                                     void** results, bool backward, int64_t size, bool more) {
  FreenetBlock job{static_cast<Dtype>(dtype), tf32, sum, sizes[0], sizes[1], given[0], given[1], {}, eps};
  for (int i = 0; i < 10; ++i) job.weights[i] = given[2 + i];
  const auto factor = [&](int i) { return static_cast<char*>(results[3]) + i * size * (dtype == 0 ? 4 : 2); };
  BlockGradients to{};
  if (backward) {
    to = {results[0], results[1], results[2], factor(0), factor(1),
          factor(2),  factor(3),  factor(4),  static_cast<float*>(results[4]), more};
  }
  return with_product(dtype, tf32, [&](auto product) {
    return run<product()>(job, results[0], backward ? &to : nullptr);
  });
}

extern "C" bool row_products_on_cpu(int dtype, bool tf32, int64_t M, int count, void** left, void** right,
                                    float* partial, int64_t splits, bool more) {
  RowProducts job{static_cast<Dtype>(dtype), tf32, count, M, {}, {}};
  for (int i = 0; i < count; ++i) job.left[i] = left[i], job.right[i] = right[i];
  return with_product(dtype, tf32, [&](auto product) { return run<product()>(job, partial, splits, more); });
}

extern "C" bool sum_rows_on_cpu(int dtype, const float* partial, int64_t rows, int64_t size, void* out) {
  return with_product(dtype, false, [&](auto product) {
    return launch((size + 31) / 32, kSumThreads,
                  [&] { sum_rows_kernel<product()>(partial, rows, size, size, out, nullptr); }, true);
  });
}
