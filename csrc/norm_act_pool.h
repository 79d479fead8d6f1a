// InstanceNorm, ReLU and 2x2 average pooling in one pass over each plane, and its backward pass.
#pragma once
#include <cstdint>

#include "isa.h"

namespace speedk {

// B C planes of H x W values; float32 or float64. An odd last row or column takes part in the norm, not in the pooling.
struct NormActPool {
  Dtype dtype;
  const void* x;       // [B, C, H, W]
  const void* weight;  // [C]
  const void* bias;    // [C]
  int64_t B, C, H, W;
  double eps;
};

// out [B, C, H / 2, W / 2]; mean and rstd [B, C], what the backward pass needs of the statistics.
SPEEDK_DECLARE(void norm_act_pool(const NormActPool& job, void* out, void* mean, void* rstd, int threads))

// d_x [B, C, H, W] and, for each plane, the parts d_weight and d_bias [B, C], to be summed over B.
SPEEDK_DECLARE(void norm_act_pool_backward(const NormActPool& job, const void* d_out, const void* mean,
                                           const void* rstd, void* d_x, void* d_weight, void* d_bias, int threads))

}  // namespace speedk
