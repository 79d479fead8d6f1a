// The tokens come through shared memory, a few at a time, and several such are on the way. A warp takes 32 rows of a
// product, and each group of warps some of the tokens; the groups' sums are added up at the end.
#pragma once
#include "early_launch.cuh"
#include "row_products.h"
#include "tensor_core.cuh"

namespace speedk {

constexpr int kGroups = 4, kStages = 3;
template <int D> constexpr int kGroupThreads = D;  // a warp for 32 rows
template <Product P> constexpr int kStep = kShort<P> ? 16 : 8;  // tokens that a warp takes of a stage
template <Product P> constexpr int kStageTokens = kGroups * kStep<P>;
// Bytes of a token's row of both sides in shared memory.
template <Product P, int D> constexpr int kRowBytes = kShort<P> ? 4 * D + 16 : 8 * D;
template <Product P, int D> constexpr int kProductBytes = kStages * kStageTokens<P> * kRowBytes<P, D>;

// Where the 16 bytes `chunk` of token `row` of a stage lie: of float32, so that a column of four rows has no conflicts.
template <Product P, int D> __device__ __forceinline__ int place(int row, int chunk) {
  return row * kRowBytes<P, D> + 16 * (kShort<P> ? chunk : chunk ^ (2 * (row & 3)));
}

// acc [32, D] += left^T right of this warp's tokens, from row `row` of a stage on, at left columns `strip` and on.
template <Product P, int D>
__device__ __forceinline__ void add_tokens(float (&acc)[2][D / 8][4], const char* stage, int row, int strip, int lane) {
  if constexpr (kShort<P>) {
    uint32_t a[2][4];
    const char* left = stage + (row + (lane & 7) + 8 * (lane >> 4)) * kRowBytes<P, D>;
    const char* right = stage + (row + (lane & 15)) * kRowBytes<P, D> + 2 * (D + 8 * (lane >> 4));
#pragma unroll
    for (int m = 0; m < 2; ++m) load_matrices<true>(a[m], left + 2 * (strip + 16 * m + 8 * (lane >> 3 & 1)));
#pragma unroll
    for (int n = 0; n < D / 8; n += 2) {
      uint32_t b[4];
      load_matrices<true>(b, right + 16 * n);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int m = 0; m < 2; ++m) multiply_16<P>(acc[m][n + i], a[m], b[2 * i], b[2 * i + 1]);
      }
    }
  } else {
    // Both sides are cut off to tf32, and one is made larger for both.
    constexpr float by = P == Product::tf32 ? 1.0f + 2 * kCutOff : 1.0f;
    const int g = lane >> 2, t = lane & 3;
    const auto at = [&](int far, int column) {
      const int r = row + t + 4 * far, c = column + g;
      return *reinterpret_cast<const float*>(stage + place<P, D>(r, c >> 2) + 4 * (c & 3));
    };
    Split<P, 4> a[2];
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i) a[m].set(i, by * at(i / 2, strip + 16 * m + 8 * (i % 2)));
    }
#pragma unroll
    for (int n = 0; n < D / 8; ++n) {
      const float near = at(0, D + 8 * n), far = at(1, D + 8 * n);
#pragma unroll
      for (int m = 0; m < 2; ++m) add_product_8<P>(acc[m][n], a[m], near, far);
    }
  }
}

template <Product P, int D>
__global__ void __launch_bounds__(kGroups * kGroupThreads<D>, 1)
row_products_kernel(RowProducts job, float* partial, int64_t tokens, bool more) {
  char* shared = block_memory();
  constexpr int kTokens = kStageTokens<P>, kThreads = kGroups * kGroupThreads<D>, kSize = kShort<P> ? 2 : 4;
  constexpr int kOfRow = 2 * D * kSize / 16, kRows = kThreads / kOfRow;  // tokens that all threads fetch at a time
  static_assert(kThreads % kOfRow == 0 && kTokens % kRows == 0, "a thread always fetches the same columns");
  const int which = blockIdx.y, lane = threadIdx.x % 32, group = threadIdx.x / kGroupThreads<D>;
  const int of_group = threadIdx.x % kGroupThreads<D>, strip = of_group / 32 * 32;
  const int64_t begin = blockIdx.x * tokens, end = begin + tokens < job.M ? begin + tokens : job.M;
  const int stages = begin < end ? static_cast<int>((end - begin + kTokens - 1) / kTokens) : 0;

  const int chunk = threadIdx.x % kOfRow, row = threadIdx.x / kOfRow;
  const void* side = chunk < kOfRow / 2 ? which == 0 ? job.left[0] : which == 1 ? job.left[1] : job.left[2]
                                        : which == 0 ? job.right[0] : which == 1 ? job.right[1] : job.right[2];
  const auto* from = static_cast<const char*>(side) + 16 * (chunk % (kOfRow / 2));
  const auto request = [&](int stage) {
    char* to = shared + stage % kStages * kTokens * kRowBytes<P, D>;
#pragma unroll
    for (int r = 0; r < kTokens && stage < stages; r += kRows) {  // beyond the last it would be written too late
      const int64_t token = begin + static_cast<int64_t>(stage) * kTokens + r + row;
      const bool there = token < end;
      fetch(to + place<P, D>(r + row, chunk), from + (there ? token : 0) * D * kSize, there);
    }
    end_of_stage();
  };

  float acc[2][D / 8][4];
#pragma unroll
  for (int i = 0; i < D; ++i) acc[i / (D / 2)][i / 4 % (D / 8)][i % 4] = 0;
  let_the_next_begin();
  await_the_one_before();
  for (int stage = 0; stage < kStages - 1; ++stage) request(stage);
  for (int stage = 0; stage < stages; ++stage) {
    await_all_but<kStages - 2>();
    __syncthreads();
    request(stage + kStages - 1);  // where all have read the stage before
    add_tokens<P, D>(acc, shared + stage % kStages * kTokens * kRowBytes<P, D>, group * kStep<P>, strip, lane);
  }

  auto* sums = reinterpret_cast<float*>(shared);
  for (int half = kGroups / 2; half > 0; half /= 2) {
    __syncthreads();
    float* mine = sums + (group % half) * D * kGroupThreads<D> + of_group;
    if (group >= half && group < 2 * half) {
#pragma unroll
      for (int i = 0; i < D; ++i) mine[i * kGroupThreads<D>] = acc[i / (D / 2)][i / 4 % (D / 8)][i % 4];
    }
    __syncthreads();
    if (group < half) {
#pragma unroll
      for (int i = 0; i < D; ++i) acc[i / (D / 2)][i / 4 % (D / 8)][i % 4] += mine[i * kGroupThreads<D>];
    }
  }
  if (group > 0) return;
  partial += (static_cast<int64_t>(blockIdx.x) * job.count + which) * D * D;
#pragma unroll
  for (int m = 0; m < 2; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int n = 0; n < D / 8; ++n) {
        const int out_row = strip + 16 * m + 8 * half + (lane >> 2), column = 8 * n + 2 * (lane & 3);
        auto* to = reinterpret_cast<float2*>(partial + out_row * D + column);
        float2 sum = {acc[m][n][2 * half], acc[m][n][2 * half + 1]};
        if (more) sum.x += to->x, sum.y += to->y;
        *to = sum;
      }
    }
  }
}

constexpr int kSumThreads = 256;

// Eight threads a column.
template <Product P> __global__ void __launch_bounds__(kSumThreads)
sum_rows_kernel(const float* partial, int64_t rows, int64_t size, int64_t first, void* out, void* rest) {
  __shared__ float sums[kSumThreads];
  await_the_one_before();
  const int64_t column = static_cast<int64_t>(blockIdx.x) * 32 + threadIdx.x % 32;
  float sum = 0;
  if (column < size) {
#pragma unroll 4
    for (int64_t row = threadIdx.x / 32; row < rows; row += kSumThreads / 32) sum += partial[row * size + column];
  }
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.x >= 32 || column >= size) return;
  for (int i = 1; i < kSumThreads / 32; ++i) sum += sums[32 * i + threadIdx.x];
  const int64_t at = column < first ? column : column - first;
  void* to = column < first ? out : rest;
  if constexpr (kShort<P>) static_cast<uint16_t*>(to)[at] = static_cast<uint16_t>(packed<P>(sum, 0));
  else static_cast<float*>(to)[at] = sum;
}

}  // namespace speedk
