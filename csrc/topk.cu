#include "topk_short.cuh"

namespace speedk {
namespace {

template <class Key, class Index> void launch(const Topk& job, int* nan, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>(job.rows);
  if (is_short<Key, kShortThreads>(job)) {
    short_topk_kernel<Key, Index, kShortThreads, kShortBlocks<Key>><<<blocks, kShortThreads, 0, stream>>>(job, nan);
  } else {
    topk_kernel<Key, Index, kThreads, kBlocks><<<blocks, kThreads, 0, stream>>>(job, nan);
  }
}

template <class Key> int launch(const Topk& job, int* nan, cudaStream_t stream) {
  if (job.index_bytes == 2) launch<Key, uint16_t>(job, nan, stream);
  else launch<Key, uint8_t>(job, nan, stream);
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
