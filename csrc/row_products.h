// Gradients of matrices on a GPU: sums over tokens of outer products, by a fixed split of the tokens, so that they have
// one order everywhere.
#pragma once
#include <cstdint>

#include "isa.h"

namespace speedk {

// `count` products left_i^T right_i of [M, kProductWidth], contiguous, all of one dtype.
constexpr int kMostProducts = 3;
constexpr int kProductWidth = 96;
struct RowProducts {
  Dtype dtype;
  bool tf32;
  int count;
  int64_t M;
  const void* left[kMostProducts];
  const void* right[kMostProducts];
};

#ifdef SPEEDK_CUDA
// partial [splits, count, D, D] float32, or, if there is `more`, what is added to it. They return a cudaError_t.
int row_products_cuda(const RowProducts& job, float* partial, int64_t splits, bool more, void* stream);
// The sum over the rows of partial [rows, size], float32: its first values to out [first], the others to rest [size -
// first], of `dtype`.
int sum_rows_cuda(Dtype dtype, const float* partial, int64_t rows, int64_t size, int64_t first, void* out, void* rest,
                  void* stream);
#endif

}  // namespace speedk
