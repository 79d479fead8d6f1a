#include "topk.cuh"

namespace speedk {
namespace {

template <class Key> int launch(const Topk& job, int* nan, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>(job.rows);
  if (job.index_bytes == 2) topk_kernel<Key, uint16_t><<<blocks, kThreads, 0, stream>>>(job, nan);
  else topk_kernel<Key, uint8_t><<<blocks, kThreads, 0, stream>>>(job, nan);
  return static_cast<int>(cudaGetLastError());
}

}  // namespace

int topk_cuda(const Topk& job, int* nan, void* stream) {
  if (job.rows == 0 || job.J * job.K == 0) return 0;
  if (job.rows > INT32_MAX) return static_cast<int>(cudaErrorInvalidConfiguration);  // of a grid
  auto* on = static_cast<cudaStream_t>(stream);
  switch (job.dtype) {
    case Dtype::float32: return launch<int32_t>(job, nan, on);
    case Dtype::float64: return launch<int64_t>(job, nan, on);
    default: return launch<int16_t>(job, nan, on);
  }
}

}  // namespace speedk
