// The way back through tokens = inputs x weight on a GPU, float32, both gradients in one pass: of multi-head sparse
// coding (Eq. 3), whose inputs are codes, and of the last linear, whose tokens are patches of images.
#pragma once
#include <cstdint>

namespace speedk {

constexpr int64_t kLinearTokens = 16;  // a warp's, all of one image

// Inputs [images, parts, J, K] and their gradient, contiguous; J a multiple of kLinearTokens. Part p's weight is
// [K, W], its value (k, w) at `weight[p part + k of_k + column(w) of_column]`, and so is its gradient.
//
// Rows: d_tokens [images, J, parts W], contiguous, column(w) = w.
// Patches of `patch` pixels a side: d_tokens are images [images, 3, side patch, side patch], contiguous, of side^2 = J
// patches, side a power of two up to 1,024; w = (channel patch + row) patch + column, W = 3 patch^2, parts = 1, and
// column(w) is its place among a token's values, (row patch + column) 3 + channel; of_k = 1 and of_column = K.
struct LinearBackward {
  bool tf32;
  int64_t images, parts, J, K, W;
  const float* inputs;
  const float* weight;
  int64_t part, of_k, of_column;
  const float* d_tokens;
  int64_t patch, side;  // 0 for rows
  float* d_inputs;  // or null
};

// Columns of the inputs that one program takes, 0 where there is no kernel for these sizes.
inline constexpr int64_t linear_slice(int64_t K, int64_t W, int64_t patch, int64_t side) {
  if (patch == 0) return (W == 32 || W == 48 || W == 64) && K % 64 == 0 ? 64 : 0;
  if (W != 3 * patch * patch || side < 4 || side > 1024 || (side & (side - 1)) != 0) return 0;
  return patch == 4 ? K % 48 == 0 ? 48 : 0 : patch == 8 && K == 192 ? K : 0;
}

// Programs that fit a multiprocessor: what the sums leave of its registers decides.
inline constexpr int linear_programs(int64_t W) { return W <= 32 ? 3 : W <= 64 ? 2 : 1; }
// Shared memory of one.
inline constexpr int64_t linear_bytes(int64_t W, int64_t slice) { return 4 * W * slice; }

#ifdef SPEEDK_CUDA
// partial [splits, size] float32, or null: sums over a fixed split of the tokens, of the gradient of `weight`, laid out
// as it is, and, of patches, of that of the bias [W] behind it. Returns a cudaError_t.
int linear_backward_cuda(const LinearBackward& job, float* partial, int64_t size, int64_t splits, void* stream);
#endif

}  // namespace speedk
