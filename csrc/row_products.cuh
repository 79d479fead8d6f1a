// A block of D / 32 warps makes NB columns of a product, 32 of its D rows a warp; the tokens come through shared
// memory, a few at a time, and several such are on the way.
#pragma once
#include "row_products.h"
#include "tensor_core.cuh"

namespace speedk {

template <Product P> constexpr int kStageTokens = kShort<P> ? 32 : 16;
constexpr int kStages = 3;

#ifndef SPEEDK_EMULATED
// 16 bytes from memory to shared memory, behind the thread's back; zeros unless `there`.
__device__ __forceinline__ void fetch(void* to, const void* from, bool there) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               :: "r"(static_cast<uint32_t>(__cvta_generic_to_shared(to))), "l"(from), "r"(there ? 16 : 0) : "memory");
}
__device__ __forceinline__ void end_of_stage() { asm volatile("cp.async.commit_group;" ::: "memory"); }
__device__ __forceinline__ void await_stage() {  // all but the last kStages - 2
  asm volatile("cp.async.wait_group %0;" :: "n"(kStages - 2) : "memory");
}
#endif

// Bytes of a token's row of both sides in shared memory.
template <Product P> __host__ __device__ constexpr int row_bytes(int64_t D, int NB) {
  return static_cast<int>(D + NB) * (kShort<P> ? 2 : 4) + (kShort<P> ? 16 : 0);
}

// Where the 16 bytes `chunk` of token `row` of a stage lie.
template <Product P> __device__ __forceinline__ int place(int row, int chunk, int bytes) {
  return row * bytes + 16 * (kShort<P> ? chunk : chunk ^ (2 * (row & 3)));
}

template <Product P, int NB>
__global__ void __launch_bounds__(kWidestProduct, 1)
row_products_kernel(RowProducts job, float* partial, int64_t tokens, bool more) {
  char* shared = block_memory();
  constexpr int kTokens = kStageTokens<P>, kSize = kShort<P> ? 2 : 4;
  const int which = blockIdx.y, D = static_cast<int>(job.D), column = blockIdx.z * NB;
  const int lane = threadIdx.x % 32, g = lane >> 2, t = lane & 3, strip = threadIdx.x / 32 * 32;
  const int bytes = row_bytes<P>(D, NB), of_left = D * kSize / 16, of_row = of_left + NB * kSize / 16;
  const auto* left = static_cast<const char*>(which == 0 ? job.left[0] : which == 1 ? job.left[1] : job.left[2]);
  const auto* right = static_cast<const char*>(which == 0 ? job.right[0] : which == 1 ? job.right[1] : job.right[2]);
  right += column * kSize;
  const int64_t begin = blockIdx.x * tokens, end = begin + tokens < job.M ? begin + tokens : job.M;
  const int stages = begin < end ? static_cast<int>((end - begin + kTokens - 1) / kTokens) : 0;

  const auto request = [&](int stage) {
    char* to = shared + stage % kStages * kTokens * bytes;
    for (int c = threadIdx.x; stage < stages && c < kTokens * of_row; c += blockDim.x) {
      const int row = c / of_row, chunk = c % of_row;
      const int64_t token = begin + static_cast<int64_t>(stage) * kTokens + row, there = token < end ? token : begin;
      const char* from = chunk < of_left ? left + 16 * chunk : right + 16 * (chunk - of_left);
      fetch(to + place<P>(row, chunk, bytes), from + there * D * kSize, token < end);
    }
    end_of_stage();
  };

  float acc[2][NB / 8][4];
#pragma unroll
  for (int m = 0; m < 2; ++m) {
#pragma unroll
    for (int n = 0; n < NB / 8; ++n) acc[m][n][0] = acc[m][n][1] = acc[m][n][2] = acc[m][n][3] = 0;
  }
  for (int stage = 0; stage < kStages - 1; ++stage) request(stage);
  for (int stage = 0; stage < stages; ++stage) {
    await_stage();
    __syncthreads();
    request(stage + kStages - 1);  // where all have read the stage before
    const char* from = shared + stage % kStages * kTokens * bytes;
    if constexpr (kShort<P>) {
#pragma unroll
      for (int k = 0; k < kTokens; k += 16) {
        uint32_t a[2][4];
        const int row = k + (lane & 7);
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          const int column = strip + 16 * m + 8 * (lane >> 3 & 1);
          load_matrices<true>(a[m], from + (row + 8 * (lane >> 4)) * bytes + 2 * column);
        }
#pragma unroll
        for (int n = 0; n < NB / 8; n += 2) {
          uint32_t b[4];
          load_matrices<true>(b, from + (row + 8 * (lane >> 3 & 1)) * bytes + 2 * (D + 8 * n + 8 * (lane >> 4)));
#pragma unroll
          for (int m = 0; m < 2; ++m) {
            multiply_16<P>(acc[m][n], a[m], b[0], b[1]);
            multiply_16<P>(acc[m][n + 1], a[m], b[2], b[3]);
          }
        }
      }
    } else {
      const auto at = [&](int row, int chunk) {
        return *reinterpret_cast<const float4*>(from + place<P>(row, chunk, bytes));
      };
#pragma unroll
      for (int k = 0; k < kTokens; k += 8) {
        const float4 near = at(k + t, strip / 4 + g), far = at(k + 4 + t, strip / 4 + g);
        float a[2][4] = {{near.x, near.y, far.x, far.y}, {near.z, near.w, far.z, far.w}}, low[2][4];
#pragma unroll
        for (int m = 0; m < 2; ++m) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const float given = a[m][i];
            a[m][i] = rounded(given);
            low[m][i] = P == Product::float32 ? rounded(given - a[m][i]) : 0.0f;
          }
        }
#pragma unroll
        for (int q = 0; q < NB / 32; ++q) {
          const float4 b0 = at(k + t, D / 4 + 8 * q + g), b1 = at(k + 4 + t, D / 4 + 8 * q + g);
          const float b_near[4] = {b0.x, b0.y, b0.z, b0.w}, b_far[4] = {b1.x, b1.y, b1.z, b1.w};
#pragma unroll
          for (int j = 0; j < 4; ++j) {
#pragma unroll
            for (int m = 0; m < 2; ++m) add_product_8<P>(acc[m][4 * q + j], a[m], low[m], b_near[j], b_far[j]);
          }
        }
      }
    }
  }

  partial += ((static_cast<int64_t>(blockIdx.x) * job.count + which) * D) * D + column;
#pragma unroll
  for (int m = 0; m < 2; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if constexpr (kShort<P>) {
#pragma unroll
        for (int n = 0; n < NB / 8; ++n) {
          auto* to = reinterpret_cast<float2*>(partial + (strip + 16 * m + 8 * half + g) * D + 8 * n + 2 * t);
          float2 sum = {acc[m][n][2 * half], acc[m][n][2 * half + 1]};
          if (more) sum.x += to->x, sum.y += to->y;
          *to = sum;
        }
      } else {
#pragma unroll
        for (int q = 0; q < NB / 32; ++q) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const int row = strip + 4 * g + 2 * m + half;
            auto* to = reinterpret_cast<float4*>(partial + row * D + 32 * q + 8 * t + 4 * e);
            const int i = 2 * half + e;
            float4 sum = {acc[m][4 * q][i], acc[m][4 * q + 1][i], acc[m][4 * q + 2][i], acc[m][4 * q + 3][i]};
            if (more) sum.x += to->x, sum.y += to->y, sum.z += to->z, sum.w += to->w;
            *to = sum;
          }
        }
      }
    }
  }
}

constexpr int kSumThreads = 256;

// Eight threads a column.
template <Product P> __global__ void __launch_bounds__(kSumThreads)
sum_rows_kernel(const float* partial, int64_t rows, int64_t size, void* out) {
  __shared__ float sums[kSumThreads];
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
  if constexpr (kShort<P>) static_cast<uint16_t*>(out)[column] = static_cast<uint16_t>(packed<P>(sum, 0));
  else static_cast<float*>(out)[column] = sum;
}

}  // namespace speedk
