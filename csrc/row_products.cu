#include "row_products.cuh"

namespace speedk {
namespace {

template <Product P>
int launch(const RowProducts& job, float* partial, int64_t splits, bool more, cudaStream_t stream) {
  constexpr int D = kProductWidth, bytes = kProductBytes<P, D>, tokens = kStageTokens<P>;
  static_assert(bytes >= kGroups / 2 * D * D * 4, "the sums of half of the groups take the place of the tokens");
  static_assert(bytes <= 99 << 10, "what any GPU with tensor cores for these types has");
  const cudaError_t set =
      cudaFuncSetAttribute(row_products_kernel<P, D>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (set != cudaSuccess) return static_cast<int>(cudaGetLastError());
  const int64_t stages = (job.M + tokens - 1) / tokens, of_split = (stages + splits - 1) / splits;
  const dim3 grid(static_cast<unsigned>(splits), static_cast<unsigned>(job.count));
  return launch(row_products_kernel<P, D>, grid, kGroups * kGroupThreads<D>, bytes, stream, true, job, partial,
                of_split * tokens, more);
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

int sum_rows_cuda(Dtype dtype, const float* partial, int64_t rows, int64_t size, int64_t first, void* out, void* rest,
                  void* stream) {
  const auto blocks = static_cast<unsigned>((size + 31) / 32);
  auto* on = static_cast<cudaStream_t>(stream);
  const auto sum = dtype == Dtype::bfloat16  ? sum_rows_kernel<Product::bfloat16>
                   : dtype == Dtype::float16 ? sum_rows_kernel<Product::float16>
                                             : sum_rows_kernel<Product::float32>;
  return launch(sum, dim3(blocks), kSumThreads, 0, on, true, partial, rows, size, first, out, rest);
}

}  // namespace speedk
