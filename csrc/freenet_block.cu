// CMake compiles this once for each way to compute products, SPEEDK_PRODUCT; without it, it holds all of them.
#include "freenet_block.cuh"

namespace speedk {
namespace {

int multiprocessors() {
  int device = 0, count = 1;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return count;
}

}  // namespace

template <Product P> int block_forward(const FreenetBlock& job, void* out, void* stream) {
  constexpr int D = kBlockWidth, threads = kForwardThreads<P>, bytes = kForwardBytes<P, D>;
  const cudaError_t set = cudaFuncSetAttribute(block_kernel<P, D>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (set != cudaSuccess) return static_cast<int>(cudaGetLastError());
  const int64_t tokens = threads / 2, blocks = (job.M + tokens - 1) / tokens;
  const int64_t most = kForwardBlocks<P> * multiprocessors();
  block_kernel<P, D><<<static_cast<unsigned>(blocks < most ? blocks : most), threads, bytes,
                       static_cast<cudaStream_t>(stream)>>>(job, out);
  return static_cast<int>(cudaGetLastError());
}

template <Product P> int block_backward(const FreenetBlock& job, const BlockGradients& to, void* stream) {
  constexpr int D = kBlockWidth, bytes = kBackwardBytes<P, D>;
  static_assert(bytes == block_bytes(kShort<P> ? Dtype::bfloat16 : Dtype::float32) && bytes >= kForwardBytes<P, D>,
                "as the ops are told");
  const cudaError_t set =
      cudaFuncSetAttribute(block_backward_kernel<P, D>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (set != cudaSuccess) return static_cast<int>(cudaGetLastError());
  const auto blocks = static_cast<unsigned>((job.M + kBlockTokens - 1) / kBlockTokens);
  return launch(block_backward_kernel<P, D>, dim3(blocks), kBackwardThreads, bytes, static_cast<cudaStream_t>(stream),
                to.more, job, to);
}

#ifdef SPEEDK_PRODUCT
#define SPEEDK_MAKE(name)                                                               \
  template int block_forward<Product::name>(const FreenetBlock&, void*, void*);          \
  template int block_backward<Product::name>(const FreenetBlock&, const BlockGradients&, void*);
#define SPEEDK_MAKE_GIVEN(name) SPEEDK_MAKE(name)
SPEEDK_MAKE_GIVEN(SPEEDK_PRODUCT)
#else
template int block_forward<Product::bfloat16>(const FreenetBlock&, void*, void*);
template int block_forward<Product::float16>(const FreenetBlock&, void*, void*);
template int block_forward<Product::tf32>(const FreenetBlock&, void*, void*);
template int block_forward<Product::float32>(const FreenetBlock&, void*, void*);
template int block_backward<Product::bfloat16>(const FreenetBlock&, const BlockGradients&, void*);
template int block_backward<Product::float16>(const FreenetBlock&, const BlockGradients&, void*);
template int block_backward<Product::tf32>(const FreenetBlock&, const BlockGradients&, void*);
template int block_backward<Product::float32>(const FreenetBlock&, const BlockGradients&, void*);
#endif

}  // namespace speedk
