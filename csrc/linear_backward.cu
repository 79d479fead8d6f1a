#include "linear_backward.cuh"

namespace speedk {
namespace {

template <Product P, int W, int S, bool Patches>
int launch(const LinearBackward& job, float* partial, int64_t size, int64_t splits, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(splits), static_cast<unsigned>(job.parts * (job.K / S)));
  linear_backward_kernel<P, W, S, Patches><<<grid, kLinearThreads, kLinearBytes<W, S>, stream>>>(job, partial, size);
  return static_cast<int>(cudaGetLastError());
}

template <Product P>
int launch(const LinearBackward& job, float* partial, int64_t size, int64_t splits, cudaStream_t stream) {
  if (job.channels > 0) return launch<P, 48, 48, true>(job, partial, size, splits, stream);
  switch (job.W) {
    case 32: return launch<P, 32, 64, false>(job, partial, size, splits, stream);
    case 48: return launch<P, 48, 64, false>(job, partial, size, splits, stream);
    default: return launch<P, 64, 64, false>(job, partial, size, splits, stream);
  }
}

}  // namespace

int linear_backward_cuda(const LinearBackward& job, float* partial, int64_t size, int64_t splits, void* stream) {
  if (job.images == 0) return 0;
  if (linear_slice(job.K, job.W, job.channels, job.side) == 0) return static_cast<int>(cudaErrorInvalidValue);
  auto* on = static_cast<cudaStream_t>(stream);
  return job.tf32 ? launch<Product::tf32>(job, partial, size, splits, on)
                  : launch<Product::float32>(job, partial, size, splits, on);
}

}  // namespace speedk
