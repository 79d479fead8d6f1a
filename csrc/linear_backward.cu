#include "linear_backward.cuh"

namespace speedk {
namespace {

template <Product P, int W, int S, int side>
int launch(const LinearBackward& job, float* partial, int64_t size, int64_t splits, cudaStream_t stream) {
  constexpr int bytes = linear_bytes(W, S);
  const dim3 grid(static_cast<unsigned>(splits), static_cast<unsigned>(job.parts * (job.K / S)));
  if constexpr (W <= 64) {
    static_assert(bytes <= 48 << 10, "what a kernel has without asking for it");
    linear_backward_kernel<P, W, S, side><<<grid, kLinearThreads, bytes, stream>>>(job, partial, size);
  } else {
    const cudaError_t set = cudaFuncSetAttribute(wide_linear_backward_kernel<P, W, S, side>,
                                                 cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (set != cudaSuccess) return static_cast<int>(cudaGetLastError());
    wide_linear_backward_kernel<P, W, S, side><<<grid, kWideThreads, bytes, stream>>>(job, partial, size);
  }
  return static_cast<int>(cudaGetLastError());
}

template <Product P>
int launch(const LinearBackward& job, float* partial, int64_t size, int64_t splits, cudaStream_t stream) {
  return with_sizes(job, [&](auto W, auto S, auto side) {
    return launch<P, W(), S(), side()>(job, partial, size, splits, stream);
  });
}

}  // namespace

int linear_backward_cuda(const LinearBackward& job, float* partial, int64_t size, int64_t splits, void* stream) {
  if (job.images == 0) return 0;
  if (linear_slice(job.K, job.W, job.patch, job.side) == 0) return static_cast<int>(cudaErrorInvalidValue);
  auto* on = static_cast<cudaStream_t>(stream);
  return job.tf32 ? launch<Product::tf32>(job, partial, size, splits, on)
                  : launch<Product::float32>(job, partial, size, splits, on);
}

}  // namespace speedk
