// Eq. 3 before the projection: out[n, j, h d + i] = sum over k of scm[n, h, j, k] saet[k, h d + i], with d = D / H.
#pragma once
#include <cstdint>

#include "isa.h"

namespace speedk {

struct Mhsc {
  Dtype dtype;  // float32 or float64
  int64_t N, H, J, K, D;
  const void* scm;   // [N, H, J, K]
  const void* saet;  // [K, D]
  int threads;
};

SPEEDK_DECLARE(void mhsc(const Mhsc& job, void* out))

// d_scm [N, H, J, K] and d_saet [K, D] from d_out [N, J, D]; either may be null. `partial` holds kMhscParts [K, D]
// arrays: d_saet is summed in a fixed order, whatever the number of threads.
constexpr int64_t kMhscParts = 8;
SPEEDK_DECLARE(void mhsc_backward(const Mhsc& job, const void* d_out, void* d_scm, void* d_saet, void* partial))

}  // namespace speedk
