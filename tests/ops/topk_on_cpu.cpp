#include "cuda_on_cpu.h"

#include "topk_short.cuh"

using namespace speedk;

namespace {

template <class Key, class Index> bool run(const Topk& job, int* nan) {
  if (is_short<Key, kShortThreads>(job)) {
    return emulated::run(job.rows, kShortThreads, 1,
                         [&] { short_topk_kernel<Key, Index, kShortThreads, kShortBlocks<Key>>(job, nan); });
  }
  return emulated::run(job.rows, kThreads, 1, [&] { topk_kernel<Key, Index, kThreads, kBlocks>(job, nan); });
}

template <class Key> bool run(const Topk& job, int* nan) {
  return job.index_bytes == 2 ? run<Key, uint16_t>(job, nan) : run<Key, uint8_t>(job, nan);
}

}  // namespace

// sizes: rows, J, K, k; results: dense, mask, values, row_index, col_index.
extern "C" bool topk_on_cpu(int dtype, const void* scm, const int64_t* sizes, void** results, int index_bytes,
                            int* nan) {
  const Topk job{static_cast<Dtype>(dtype), scm, sizes[0], sizes[1], sizes[2], sizes[3], results[0],
                 static_cast<bool*>(results[1]), results[2], results[3], results[4], index_bytes, 1};
  switch (job.dtype) {
    case Dtype::float32: return run<int32_t>(job, nan);
    case Dtype::float64: return run<int64_t>(job, nan);
    default: return run<int16_t>(job, nan);
  }
}
