// One block of FReeNet (Eq. 4) on a GPU, for tokens whose three matrices fit into shared memory.
#pragma once
#include <cstdint>
#include <type_traits>

#include "isa.h"
#include "product.h"

namespace speedk {

// M tokens [M, D], contiguous; float32 (`tf32`: products in tf32, else as three of halves), float16 or bfloat16.
// state may be null. weights: the ten of BlockWeights, contiguous. sum: LN1(P(features) + state), else
// LN1(P(features)) + state.
struct FreenetBlock {
  Dtype dtype;
  bool tf32, sum;
  int64_t M, D;
  const void* features;
  const void* state;
  const void* weights[10];
  double eps;
};

// The D for which there is a kernel.
constexpr int64_t kBlockWidth = 96;

// Tokens that one program of the backward pass takes; it makes one row of sums.
constexpr int64_t kBlockTokens = 128;
constexpr int64_t kVectors = 7;

// Shared memory of a block of threads that the kernels need at most: the weights, and the sums of each warp.
inline constexpr int64_t block_bytes(Dtype dtype) {
  constexpr int64_t D = kBlockWidth, sums = kBlockTokens / 16 * kVectors * 4 * D;
  return 3 * (dtype == Dtype::float32 ? 4 * D * D : D * (2 * D + 16)) + kVectors * 4 * D + sums;
}

#if defined(SPEEDK_CUDA) || defined(SPEEDK_EMULATED)
// out [M, D]. They return a cudaError_t.
int freenet_block_cuda(const FreenetBlock& job, void* out, void* stream);
// From d_out [M, D]: d_features and, with a state, d_state, [M, D]; the factors of the gradients of the matrices,
// d_branch, d_inner, d_mlp, hidden and active, at `factors`, `size` values apart; and sums over the tokens of each
// program, the gradients of the seven vectors in their order, [programs, 7 D] float32, or, if there is `more`, what is
// added to it.
int freenet_block_backward_cuda(const FreenetBlock& job, const void* d_out, void* d_features, void* d_state,
                                void* factors, int64_t size, float* sums, bool more, void* stream);

// What of these a backward kernel writes, and d_out.
struct BlockGradients {
  const void* d_out;
  void* d_features;
  void* d_state;
  void* d_branch;
  void* d_inner;
  void* d_mlp;
  void* hidden;
  void* active;
  float* sums;
  bool more;
};

// The same where products are computed as P.
template <Product P> int block_forward(const FreenetBlock& job, void* out, void* stream);
template <Product P> int block_backward(const FreenetBlock& job, const BlockGradients& to, void* stream);
#endif

}  // namespace speedk

