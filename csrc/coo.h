// The stored form of sparse coding matrices: coordinates (row below J, column below K) and values.
#pragma once
#include <cstdint>

#include "isa.h"

namespace speedk {

// Stored entries: `matrices` of k each. Indices are unsigned, of index_bytes (1 or 2); float32 or float64 values.
struct Entries {
  Dtype dtype;
  const void* values;  // [matrices, k]
  const void* rows;    // [matrices, k]
  const void* cols;    // [matrices, k]
  int index_bytes;
  int64_t matrices, k, J, K;
};

// An entry whose row or column is out of range is left out of every result; each function returns whether one was met.

// dense [matrices, J, K]: the sum of the entries at each coordinate.
SPEEDK_DECLARE(bool coo_decode(const Entries& entries, void* dense, int threads))

// d_values [matrices, k] from d_dense [matrices, J, K].
SPEEDK_DECLARE(bool coo_decode_backward(const Entries& entries, const void* d_dense, void* d_values, int threads))

// out [N, J, D] from saet [K, D], N H = matrices: out[n, r, h d + i] = sum over entries (r, c, v) of (n, h) of
// v saet[c, h d + i], with d = D / H.
SPEEDK_DECLARE(bool mhsc_coo(const Entries& entries, const void* saet, int64_t H, int64_t D, void* out, int threads))

// d_values [matrices, k] and d_saet [K, D] from d_out [N, J, D]; either may be null. `partial` is memory for
// kParts [K, D] arrays: d_saet is summed in a fixed order, whatever the number of threads.
constexpr int64_t kParts = 8;
SPEEDK_DECLARE(bool mhsc_coo_backward(const Entries& entries, const void* saet, const void* d_out, int64_t H, int64_t D,
                                      void* d_values, void* d_saet, void* partial, int threads))

}  // namespace speedk
