#include "tensor_core_on_cpu.h"

#include "freenet_block.cuh"
#include "row_products.cuh"

using namespace speedk;

namespace {

template <Product P> bool run(const FreenetBlock& job, void* out, const BlockGradients* to) {
  constexpr int D = kBlockWidth;
  if (to) {
    return emulated::run((job.M + kBlockTokens - 1) / kBlockTokens, kBackwardThreads, 1,
                         [&] { block_backward_kernel<P, D>(job, *to); });
  }
  return emulated::run(2, kForwardThreads<P>, 1, [&] { block_kernel<P, D>(job, out); });
}

template <Product P> bool run(const RowProducts& job, float* partial, int64_t splits, bool more) {
  const int64_t stages = (job.M + kStageTokens<P> - 1) / kStageTokens<P>, of_split = (stages + splits - 1) / splits;
  const auto on = [&](auto columns) {
    constexpr int NB = columns();
    const emulated::Index grid{static_cast<unsigned>(splits), static_cast<unsigned>(job.count),
                               static_cast<unsigned>(job.D / NB)};
    return emulated::run(grid, static_cast<unsigned>(job.D), 1,
                         [&] { row_products_kernel<P, NB>(job, partial, of_split * kStageTokens<P>, more); });
  };
  return job.D % 96 == 0   ? on(std::integral_constant<int, 96>())
         : job.D % 64 == 0 ? on(std::integral_constant<int, 64>())
                           : on(std::integral_constant<int, 32>());
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
                                     void** results, bool backward, int64_t size, int64_t more) {
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

extern "C" bool row_products_on_cpu(int dtype, bool tf32, const int64_t* sizes, int count, void** left, void** right,
                                    float* partial, int64_t splits, bool more) {
  RowProducts job{static_cast<Dtype>(dtype), tf32, count, sizes[0], sizes[1], {}, {}};
  for (int i = 0; i < count; ++i) job.left[i] = left[i], job.right[i] = right[i];
  return with_product(dtype, tf32, [&](auto product) { return run<product()>(job, partial, splits, more); });
}

extern "C" bool sum_rows_on_cpu(int dtype, const float* partial, int64_t rows, int64_t size, void* out) {
  return with_product(dtype, false, [&](auto product) {
    return emulated::run((size + 31) / 32, kSumThreads, 1,
                         [&] { sum_rows_kernel<product()>(partial, rows, size, out); });
  });
}
