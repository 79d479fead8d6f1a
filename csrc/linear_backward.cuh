// A warp takes 16 tokens at a time from memory into its registers, in the order in which the tensor cores want them:
// which columns of memory a product's columns are is free, so that each lane reads and writes neighbours.
#pragma once
#include "linear_backward.h"
#include "tensor_core.cuh"

namespace speedk {

constexpr int kLinearThreads = 128;

// Of `columns` values of a row, lane g of eight has value v at near_column(v, g), and lane t of four value u at
// far_column(u, t): four on end, or two of the last 16.
template <int columns> __device__ __forceinline__ constexpr int near_column(int v, int g) {
  return v < columns / 32 * 4 ? 32 * (v / 4) + 4 * g + v % 4 : columns / 32 * 32 + 2 * g + v % 4;
}
__device__ __forceinline__ constexpr int far_column(int u, int t) { return 16 * (u / 4) + 4 * t + u % 4; }
// Column `at` of eight that a product makes of d_inputs' columns, 8 n and on: a lane's of two products lie on end.
__device__ __forceinline__ constexpr int input_column(int n, int at) {
  return 16 * (n / 2) + 4 * (at >> 1) + 2 * (n & 1) + (at & 1);
}

__device__ __forceinline__ void read(float* to, const float4& v) { to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w; }

// The tokens' gradient in memory.
template <int W, bool Patches> struct Gradient {
  const LinearBackward& job;
  const float* base;

  __device__ __forceinline__ Gradient(const LinearBackward& job, int part)
      : job(job), base(job.d_tokens + (Patches ? 0 : part * W)) {}
  // Where column w of a token lies, from its first one on.
  __device__ __forceinline__ int place(int w) const {
    if constexpr (!Patches) return w;
    constexpr int P = kPatchSide;
    const int line = w / P, width = static_cast<int>(job.side) * P;
    return (line / P * width + line % P) * width + w % P;
  }
  __device__ __forceinline__ const float* token(int64_t image, int j) const {
    if constexpr (!Patches) return base + (image * job.J + j) * job.parts * W;
    constexpr int P = kPatchSide;
    const int side = static_cast<int>(job.side), width = side * P, across = j & (side - 1), down = j - across;
    return base + image * job.channels * width * width + down * P * P + across * P;
  }
  // Its column among a token's values.
  __device__ __forceinline__ int column(int w) const {
    if constexpr (!Patches) return w;
    constexpr int P = kPatchSide;
    const int line = w / P;
    return (line % P * P + w % P) * static_cast<int>(job.channels) + line / P;
  }
};

#ifndef SPEEDK_EMULATED
// From shared memory, each time anew: the compiler would keep the whole weight in registers, which are for sums.
__device__ __forceinline__ float2 read_anew(const float2* from) {
  float2 pair;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];"
               : "=f"(pair.x), "=f"(pair.y) : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(from))));
  return pair;
}
#endif

template <int W, int S> constexpr int kLinearBytes = 4 * W * S;  // the weight, and later the sums

template <Product P, int W, int S, bool Patches>
__global__ void __launch_bounds__(kLinearThreads, linear_programs(W, P == Product::tf32))
linear_backward_kernel(LinearBackward job, float* partial, int64_t size) {
  constexpr int kSteps = W / 8, kTiles = S / 8, kWarps = kLinearThreads / 32;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane >> 2, t = lane & 3;
  const int slices = static_cast<int>(job.K / S), part = blockIdx.y / slices, slice = blockIdx.y % slices;
  const Gradient<W, Patches> gradient(job, part);
  const auto at = [&](int k, int w) {
    return part * job.part + (slice * S + k) * job.of_k + gradient.column(w) * job.of_column;
  };

  // The weight as the right operand of d_tokens weight^T, in the order in which lanes read it.
  auto* operand = reinterpret_cast<float2*>(block_memory());
  for (int i = threadIdx.x; i < kSteps * kTiles * 32; i += kLinearThreads) {
    const int k = input_column(i / 32 % kTiles, i % 32 / 4), step = i / 32 / kTiles;
    const float2 pair = {job.weight[at(k, far_column(2 * step, i % 4))],
                         job.weight[at(k, far_column(2 * step + 1, i % 4))]};
    operand[i] = P == Product::tf32 ? nearest(pair) : pair;
  }
  __syncthreads();

  int near[W / 32 + 1], far[W / 16];  // where this lane's columns begin
#pragma unroll
  for (int c = 0; c < (W + 31) / 32; ++c) near[c] = gradient.place(near_column<W>(4 * c, g));
#pragma unroll
  for (int c = 0; c < W / 16; ++c) far[c] = gradient.place(far_column(4 * c, t));

  float sums[S / 16][W / 8][4] = {}, of_bias[W / 8] = {};
  const int of_image = static_cast<int>(job.J / kLinearTokens);
  const int64_t tiles = job.images * of_image;
  for (int64_t tile = static_cast<int64_t>(blockIdx.x) * kWarps + warp; tile < tiles;
       tile += static_cast<int64_t>(gridDim.x) * kWarps) {
    const int64_t image = tile / of_image;
    const int first = static_cast<int>(tile % of_image) * static_cast<int>(kLinearTokens);
    const int64_t corner = ((image * job.parts + part) * job.J + first) * job.K + slice * S;

    float column[4][W / 8], input[4][S / 8];  // d_tokens and inputs by columns: tokens t, t + 4, t + 8 and t + 12
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float* from = gradient.token(image, first + t + 4 * i);
      const float* in = job.inputs + corner + (t + 4 * i) * job.K;
#pragma unroll
      for (int c = 0; c < W / 32; ++c) read(column[i] + 4 * c, *reinterpret_cast<const float4*>(from + near[c]));
      if constexpr (W % 32 > 0) {
        const float2 pair = *reinterpret_cast<const float2*>(from + near[W / 32]);
        column[i][W / 8 - 2] = pair.x, column[i][W / 8 - 1] = pair.y;
      }
#pragma unroll
      for (int c = 0; c < S / 32; ++c) {
        read(input[i] + 4 * c, *reinterpret_cast<const float4*>(in + near_column<S>(4 * c, g)));
      }
      if constexpr (S % 32 > 0) {
        const float2 pair = *reinterpret_cast<const float2*>(in + near_column<S>(S / 32 * 4, g));
        input[i][S / 8 - 2] = pair.x, input[i][S / 8 - 1] = pair.y;
      }
    }

    if (partial) {
      // The tensor cores cut values off to tf32, of both sides but where one is rounded before.
      constexpr float by = P == Product::tf32 ? 1.0f + 2 * kCutOff : 1.0f;
#pragma unroll
      for (int step = 0; step < 4; step += 2) {  // of 8 tokens
#pragma unroll
        for (int n = 0; n < W / 8; ++n) {
          if constexpr (Patches) of_bias[n] += column[step][n] + column[step + 1][n];
          column[step][n] *= by, column[step + 1][n] *= by;
        }
#pragma unroll
        for (int m = 0; m < S / 16; ++m) {
          Split<P, 4> a;
#pragma unroll
          for (int i = 0; i < 4; ++i) a.set(i, input[step + i / 2][2 * m + i % 2]);
#pragma unroll
          for (int n = 0; n < W / 8; ++n) add_product_8<P>(sums[m][n], a, column[step][n], column[step + 1][n]);
        }
      }
    }
    if (job.d_inputs) {
      float row[2][W / 4];  // d_tokens by rows: tokens g and g + 8
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float* from = gradient.token(image, first + g + 8 * half);
#pragma unroll
        for (int c = 0; c < W / 16; ++c) read(row[half] + 4 * c, *reinterpret_cast<const float4*>(from + far[c]));
      }
      constexpr float by = P == Product::tf32 ? 1.0f + kCutOff : 1.0f;
      Split<P, 4> left[kSteps];
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
#pragma unroll
        for (int i = 0; i < 4; ++i) left[s].set(i, by * row[i % 2][2 * s + i / 2]);
      }
#pragma unroll
      for (int n = 0; n < kTiles; n += 2) {
        float d[2][4] = {};
#pragma unroll
        for (int s = 0; s < kSteps; ++s) {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const float2 right = read_anew(operand + (s * kTiles + n + i) * 32 + lane);
            add_product_8<P>(d[i], left[s], right.x, right.y);
          }
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float* to = job.d_inputs + corner + (g + 8 * half) * job.K + input_column(n, 2 * t);
          *reinterpret_cast<float4*>(to) = {d[0][2 * half], d[0][2 * half + 1], d[1][2 * half], d[1][2 * half + 1]};
        }
      }
    }
  }
  if (!partial) return;

  // One warp after the other adds its own.
  auto* all = reinterpret_cast<float*>(block_memory());
  partial += blockIdx.x * size;
  for (int turn = 0; turn < kWarps; ++turn) {
    __syncthreads();
    if (turn != warp) continue;
#pragma unroll
    for (int m = 0; m < S / 16; ++m) {
#pragma unroll
      for (int n = 0; n < W / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float& sum = all[((m * (W / 8) + n) * 4 + i) * 32 + lane];
          sum = turn > 0 ? sum + sums[m][n][i] : sums[m][n][i];
        }
      }
    }
  }
  __syncthreads();
#pragma unroll 1
  for (int i = threadIdx.x; i < W * S; i += kLinearThreads) {
    const int value = i / 32 % 4, n = i / 128 % (W / 8), m = i / (16 * W);
    partial[at(near_column<S>(2 * m + value / 2, i % 32 / 4), near_column<W>(n, 2 * (i % 4) + value % 2))] = all[i];
  }
  if (!Patches || slice > 0) return;
  __syncthreads();
#pragma unroll
  for (int n = 0; n < W / 8; ++n) {
    const float two = of_bias[n] + across(of_bias[n], 1), four = two + across(two, 2);
    if (t == 0) all[warp * W + near_column<W>(n, g)] = four;
  }
  __syncthreads();
  for (int w = threadIdx.x; w < W; w += kLinearThreads) {
    float sum = all[w];
    for (int other = 1; other < kWarps; ++other) sum += all[other * W + w];
    partial[job.K * W + gradient.column(w)] = sum;
  }
}

}  // namespace speedk
