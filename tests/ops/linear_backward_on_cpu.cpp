#include "tensor_core_on_cpu.h"

#include "linear_backward.cuh"
#include "row_products.cuh"

using namespace speedk;

namespace {

template <Product P> bool run(const LinearBackward& job, float* partial, int64_t size, int64_t splits) {
  return with_sizes(job, [&](auto W, auto S, auto side) {
    const emulated::Index grid{static_cast<unsigned>(splits), static_cast<unsigned>(job.parts * (job.K / S())), 1};
    if constexpr (W() <= 64) {
      return launch(grid, kLinearThreads,
                    [&] { linear_backward_kernel<P, W(), S(), side()>(job, partial, size); });
    } else {
      return launch(grid, kWideThreads, [&] { wide_linear_backward_kernel<P, W(), S(), side()>(job, partial, size); });
    }
  });
}

}  // namespace

// sizes: images, parts, J, K, W, part, of_k, of_column, patch, side; tensors: inputs, weight, d_tokens, d_inputs,
// partial.
extern "C" bool linear_backward_on_cpu(bool tf32, const int64_t* sizes, void** tensors, int64_t size, int64_t splits) {
  const auto of = [&](int i) { return static_cast<float*>(tensors[i]); };
  const LinearBackward job{tf32,     sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], of(0), of(1),
                           sizes[5], sizes[6], sizes[7], of(2),    sizes[8], sizes[9], of(3)};
  if (linear_slice(job.K, job.W, job.patch, job.side) == 0) return false;
  return tf32 ? run<Product::tf32>(job, of(4), size, splits) : run<Product::float32>(job, of(4), size, splits);
}

extern "C" bool sum_rows_on_cpu(const float* partial, int64_t rows, int64_t size, int64_t first, void* out,
                                void* rest) {
  return launch((size + 31) / 32, kSumThreads,
                [&] { sum_rows_kernel<Product::float32>(partial, rows, size, first, out, rest); }, true);
}
