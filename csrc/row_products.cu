#include "row_products.cuh"

namespace speedk {
namespace {

template <Product P, int NB>
int launch(const RowProducts& job, float* partial, int64_t splits, bool more, cudaStream_t stream) {
  const int bytes = kStages * kStageTokens<P> * row_bytes<P>(job.D, NB);
  const cudaError_t set =
      cudaFuncSetAttribute(row_products_kernel<P, NB>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (set != cudaSuccess) return static_cast<int>(set);
  const int64_t stages = (job.M + kStageTokens<P> - 1) / kStageTokens<P>, of_split = (stages + splits - 1) / splits;
  const dim3 grid(static_cast<unsigned>(splits), static_cast<unsigned>(job.count), static_cast<unsigned>(job.D / NB));
  row_products_kernel<P, NB>
      <<<grid, static_cast<unsigned>(job.D), bytes, stream>>>(job, partial, of_split * kStageTokens<P>, more);
  return static_cast<int>(cudaGetLastError());
}

template <Product P>
int launch(const RowProducts& job, float* partial, int64_t splits, bool more, cudaStream_t stream) {
  if (job.D % 96 == 0) return launch<P, 96>(job, partial, splits, more, stream);
  return job.D % 64 == 0 ? launch<P, 64>(job, partial, splits, more, stream)
                         : launch<P, 32>(job, partial, splits, more, stream);
}

}  // namespace

int row_products_cuda(const RowProducts& job, float* partial, int64_t splits, bool more, void* stream) {
  auto* on = static_cast<cudaStream_t>(stream);
  switch (job.dtype) {
    case Dtype::bfloat16: return launch<Product::bfloat16>(job, partial, splits, more, on);
    case Dtype::float16: return launch<Product::float16>(job, partial, splits, more, on);
    case Dtype::float32: return job.tf32 ? launch<Product::tf32>(job, partial, splits, more, on)
                                         : launch<Product::float32>(job, partial, splits, more, on);
    default: return static_cast<int>(cudaErrorInvalidValue);
  }
}

int sum_rows_cuda(Dtype dtype, const float* partial, int64_t rows, int64_t size, void* out, void* stream) {
  const auto blocks = static_cast<unsigned>((size + 31) / 32);
  auto* on = static_cast<cudaStream_t>(stream);
  if (dtype == Dtype::bfloat16) {
    sum_rows_kernel<Product::bfloat16><<<blocks, kSumThreads, 0, on>>>(partial, rows, size, out);
  } else if (dtype == Dtype::float16) {
    sum_rows_kernel<Product::float16><<<blocks, kSumThreads, 0, on>>>(partial, rows, size, out);
  } else {
    sum_rows_kernel<Product::float32><<<blocks, kSumThreads, 0, on>>>(partial, rows, size, out);
  }
  return static_cast<int>(cudaGetLastError());
}

}  // namespace speedk
