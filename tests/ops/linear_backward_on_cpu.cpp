#include "tensor_core_on_cpu.h"

#include "linear_backward.cuh"

using namespace speedk;

namespace {

template <Product P, int W, int S, bool Patches>
bool run(const LinearBackward& job, float* partial, int64_t size, int64_t splits) {
  static_assert(kLinearBytes<W, S> <= 48 << 10, "what a kernel may have without asking for it");
  const emulated::Index grid{static_cast<unsigned>(splits), static_cast<unsigned>(job.parts * (job.K / S)), 1};
  return emulated::run(grid, kLinearThreads, 1, [&] { linear_backward_kernel<P, W, S, Patches>(job, partial, size); });
}

template <Product P> bool run(const LinearBackward& job, float* partial, int64_t size, int64_t splits) {
  if (job.channels > 0) return run<P, 48, 48, true>(job, partial, size, splits);
  switch (job.W) {
    case 32: return run<P, 32, 64, false>(job, partial, size, splits);
    case 48: return run<P, 48, 64, false>(job, partial, size, splits);
    default: return run<P, 64, 64, false>(job, partial, size, splits);
  }
}

}  // namespace

// sizes: images, parts, J, K, W, part, of_k, of_column, channels, side; tensors: inputs, weight, d_tokens, d_inputs,
// partial.
extern "C" bool linear_backward_on_cpu(bool tf32, const int64_t* sizes, void** tensors, int64_t size, int64_t splits) {
  const auto of = [&](int i) { return static_cast<float*>(tensors[i]); };
  const LinearBackward job{tf32,     sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], of(0), of(1),
                           sizes[5], sizes[6], sizes[7], of(2),    sizes[8], sizes[9], of(3)};
  if (linear_slice(job.K, job.W, job.channels, job.side) == 0) return false;
  return tf32 ? run<Product::tf32>(job, of(4), size, splits) : run<Product::float32>(job, of(4), size, splits);
}

// The last warp goes first.
extern "C" bool in_the_other_order_on_cpu(bool wanted) {
  emulated::backwards = wanted;
  return true;
}
