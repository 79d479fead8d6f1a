// A warp takes 16 tokens at a time from memory into its registers, in the order in which the tensor cores want them:
// which columns of memory a product's columns are is free, so that each lane reads and writes neighbours.
#pragma once
#include <type_traits>

#include "linear_backward.h"
#include "tensor_core.cuh"

namespace speedk {

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

// The tokens' gradient in memory: rows of parts W values, or, where `side` is that of a patch, patches of images.
template <int W, int side> struct Gradient {
  const float* base;
  int64_t of_image;
  int of_token, across;  // patches in a row of an image

  __device__ __forceinline__ Gradient(const LinearBackward& job, int part) : base(job.d_tokens) {
    if constexpr (side == 0) base += part * W;
    of_image = job.J * job.parts * W, of_token = static_cast<int>(job.parts) * W, across = static_cast<int>(job.side);
  }
  // Where column w of a token lies, from its first one on.
  __device__ __forceinline__ int place(int w) const {
    if constexpr (side == 0) return w;
    else return (w / side / side * across * side + w / side % side) * across * side + w % side;
  }
  __device__ __forceinline__ const float* token(int64_t image, int j) const {
    if constexpr (side == 0) return base + image * of_image + static_cast<int64_t>(j) * of_token;
    const int column = j & (across - 1);
    return base + image * of_image + (j - column) * side * side + column * side;
  }
  // Its column among a token's values.
  __device__ __forceinline__ static constexpr int column(int w) {
    if constexpr (side == 0) return w;
    else return (w / side % side * side + w % side) * (W / side / side) + w / side / side;
  }
};

__device__ __forceinline__ void read(float* to, const float* from) {
  const float4 four = *reinterpret_cast<const float4*>(from);
  to[0] = four.x, to[1] = four.y, to[2] = four.z, to[3] = four.w;
}

// A lane's of `columns` values of a row; `place(c)` is where its c-th four, or the last two, lie.
template <int columns, class F>
__device__ __forceinline__ void read_near(float (&to)[columns / 8], const float* row, F place) {
#pragma unroll
  for (int c = 0; c < columns / 32; ++c) read(to + 4 * c, row + place(c));
  if constexpr (columns % 32 > 0) {
    const float2 pair = *reinterpret_cast<const float2*>(row + place(columns / 32));
    to[columns / 8 - 2] = pair.x, to[columns / 8 - 1] = pair.y;
  }
}

// sums [S, W] += inputs^T d_tokens, of which a lane has tokens t, t + 4, t + 8 and t + 12; of_bias is the sum of
// d_tokens alone. The tensor cores cut values off to tf32, of both sides but where one is rounded before.
template <Product P, int S, int W>
__device__ __forceinline__ void add_tokens(float (&sums)[S / 16][W / 8][4], float (&of_bias)[W / 8],
                                           const float (&inputs)[4][S / 8], float (&d_tokens)[4][W / 8]) {
  constexpr float by = P == Product::tf32 ? 1.0f + 2 * kCutOff : 1.0f;
#pragma unroll
  for (int step = 0; step < 4; step += 2) {  // of 8 tokens
#pragma unroll
    for (int n = 0; n < W / 8; ++n) {
      of_bias[n] += d_tokens[step][n] + d_tokens[step + 1][n];
      d_tokens[step][n] *= by, d_tokens[step + 1][n] *= by;
    }
#pragma unroll
    for (int m = 0; m < S / 16; ++m) {
      Split<P, 4> a;
#pragma unroll
      for (int i = 0; i < 4; ++i) a.set(i, inputs[step + i / 2][2 * m + i % 2]);
#pragma unroll
      for (int n = 0; n < W / 8; ++n) add_product_8<P>(sums[m][n], a, d_tokens[step][n], d_tokens[step + 1][n]);
    }
  }
}

#ifndef SPEEDK_EMULATED
// From shared memory, each time anew: the compiler would keep the whole weight in registers, which are for sums.
__device__ __forceinline__ float2 read_anew(const float2* from) {
  float2 pair;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];"
               : "=f"(pair.x), "=f"(pair.y) : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(from))));
  return pair;
}
#endif

__device__ __forceinline__ float2 nearest(float2 v) {
  return {v.x == v.x ? to_tf32(v.x) : v.x, v.y == v.y ? to_tf32(v.y) : v.y};
}

// The weight as the right operand of d_tokens weight^T, in the order in which lanes read it: `value(k, w)` for K
// columns of inputs and W of tokens.
template <Product P, int W, int K, int threads, class F>
__device__ __forceinline__ float2* stage_operand(F value) {
  auto* operand = reinterpret_cast<float2*>(block_memory());
#pragma unroll 4
  for (int i = threadIdx.x; i < W * K / 2; i += threads) {
    const int k = input_column(i / 32 % (K / 8), i % 32 / 4), step = i / (4 * K), t = i % 4;
    const float2 pair = {value(k, far_column(2 * step, t)), value(k, far_column(2 * step + 1, t))};
    operand[i] = P == Product::tf32 ? nearest(pair) : pair;
  }
  __syncthreads();
  return operand;
}

// d [16, 16] += d_tokens weight^T for W values of tokens g and g + 8, in `rows`; at `operand` is a lane's first pair
// for them, and K the columns of all inputs.
template <Product P, int W, int K>
__device__ __forceinline__ void add_inputs(float (&d)[2][4], const Split<P, 4> (&rows)[W / 8], const float2* operand) {
#pragma unroll
  for (int s = 0; s < W / 8; ++s) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float2 right = read_anew(operand + (s * (K / 8) + i) * 32);
      add_product_8<P>(d[i], rows[s], right.x, right.y);
    }
  }
}

template <Product P, int W> __device__ __forceinline__ void split_rows(Split<P, 4> (&to)[W / 8],
                                                                       const float (&rows)[2][W / 4]) {
  constexpr float by = P == Product::tf32 ? 1.0f + kCutOff : 1.0f;
#pragma unroll
  for (int s = 0; s < W / 8; ++s) {
#pragma unroll
    for (int i = 0; i < 4; ++i) to[s].set(i, by * rows[i % 2][2 * s + i / 2]);
  }
}

// To column `to` of token g on, the one 8 tokens on at `next`.
__device__ __forceinline__ void write_inputs(float* to, int64_t next, const float (&d)[2][4]) {
  *reinterpret_cast<float4*>(to) = {d[0][0], d[0][1], d[1][0], d[1][1]};
  *reinterpret_cast<float4*>(to + next) = {d[0][2], d[0][3], d[1][2], d[1][3]};
}

constexpr int kLinearThreads = 128;

// Each warp takes tokens of its own, for S columns of the inputs; `side` as in Gradient.
template <Product P, int W, int S, int side>
__global__ void __launch_bounds__(kLinearThreads, linear_programs(W))
linear_backward_kernel(LinearBackward job, float* partial, int64_t size) {
  constexpr int kWarps = kLinearThreads / 32;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane >> 2, t = lane & 3;
  const int slices = static_cast<int>(job.K / S), part = blockIdx.y / slices, slice = blockIdx.y % slices;
  const Gradient<W, side> gradient(job, part);
  const auto at = [&](int k, int w) {
    return part * job.part + (slice * S + k) * job.of_k + gradient.column(w) * job.of_column;
  };
  const auto* operand =
      stage_operand<P, W, S, kLinearThreads>([&](int k, int w) { return job.weight[at(k, w)]; }) + lane;

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

    float d_tokens[4][W / 8], inputs[4][S / 8];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      read_near<W>(d_tokens[i], gradient.token(image, first + t + 4 * i), [&](int c) { return near[c]; });
      read_near<S>(inputs[i], job.inputs + corner + (t + 4 * i) * job.K,
                   [&](int c) { return near_column<S>(4 * c, g); });
    }
    if (partial) add_tokens<P, S, W>(sums, of_bias, inputs, d_tokens);
    if (!job.d_inputs) continue;
    float rows[2][W / 4];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float* from = gradient.token(image, first + g + 8 * half);
#pragma unroll
      for (int c = 0; c < W / 16; ++c) read(rows[half] + 4 * c, from + far[c]);
    }
    Split<P, 4> left[W / 8];
    split_rows<P, W>(left, rows);
#pragma unroll
    for (int n = 0; n < S / 8; n += 2) {
      float d[2][4] = {};
      add_inputs<P, W, S>(d, left, operand + 32 * n);
      write_inputs(job.d_inputs + corner + g * job.K + input_column(n, 2 * t), 8 * job.K, d);
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
  if (side == 0 || slice > 0) return;
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

constexpr int kWideThreads = 384, kWideInputs = 64, kWideColumns = 48;

// Where sums of [K, W] are too many for a warp: 12 of them share the tokens, each with its own 64 columns of inputs and
// 48 of tokens for the weight's gradient, and 16 columns of the inputs' one. For patches of `side`.
template <Product P, int W, int K, int side>
__global__ void __launch_bounds__(kWideThreads, 1)
wide_linear_backward_kernel(LinearBackward job, float* partial, int64_t size) {
  constexpr int kDown = K / kWideInputs, kInputs = kWideInputs, kColumns = kWideColumns;
  static_assert(kDown * (W / kColumns) * 32 == kWideThreads && K / 16 * 32 == kWideThreads, "a warp for each part");
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane >> 2, t = lane & 3;
  const int k0 = warp % kDown * kInputs, w0 = warp / kDown * kColumns;
  const Gradient<W, side> gradient(job, 0);
  const auto* operand = stage_operand<P, W, K, kWideThreads>([&](int k, int w) {
    return job.weight[k * job.of_k + gradient.column(w) * job.of_column];
  }) + 64 * warp + lane;

  float sums[kInputs / 16][kColumns / 8][4] = {}, of_bias[kColumns / 8] = {};
  const int of_image = static_cast<int>(job.J / kLinearTokens);
  const int64_t tiles = job.images * of_image;
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    __syncthreads();  // so that what one warp has read the others find in the multiprocessor's cache
    const int64_t image = tile / of_image;
    const int first = static_cast<int>(tile % of_image) * static_cast<int>(kLinearTokens);
    const int64_t corner = (image * job.J + first) * K;
    if (partial) {
      float d_tokens[4][kColumns / 8], inputs[4][kInputs / 8];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        read_near<kColumns>(d_tokens[i], gradient.token(image, first + t + 4 * i),
                            [&](int c) { return gradient.place(w0 + near_column<kColumns>(4 * c, g)); });
        read_near<kInputs>(inputs[i], job.inputs + corner + (t + 4 * i) * K + k0,
                           [&](int c) { return near_column<kInputs>(4 * c, g); });
      }
      add_tokens<P, kInputs, kColumns>(sums, of_bias, inputs, d_tokens);
    }
    if (!job.d_inputs) continue;
    float d[2][4] = {};
#pragma unroll 1
    for (int w = 0; w < W; w += kColumns) {
      float rows[2][kColumns / 4];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float* from = gradient.token(image, first + g + 8 * half);
#pragma unroll
        for (int c = 0; c < kColumns / 16; ++c) {
          read(rows[half] + 4 * c, from + gradient.place(w + far_column(4 * c, t)));
        }
      }
      Split<P, 4> left[kColumns / 8];
      split_rows<P, kColumns>(left, rows);
      add_inputs<P, kColumns, K>(d, left, operand + w * (K / 2));
    }
    write_inputs(job.d_inputs + corner + g * K + 16 * warp + 4 * t, 8 * K, d);
  }
  if (!partial) return;

  partial += blockIdx.x * size;
#pragma unroll
  for (int n = 0; n < kColumns / 8; ++n) {
    const float two = of_bias[n] + across(of_bias[n], 1), four = two + across(two, 2);
    if (k0 == 0 && t == 0) partial[K * W + gradient.column(w0 + near_column<kColumns>(n, g))] = four;
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      float* to = partial + gradient.column(w0 + near_column<kColumns>(n, 2 * t + e)) * K + k0 + 4 * g;
#pragma unroll
      for (int m = 0; m < kInputs / 16; m += 2) {  // four columns on end
        *reinterpret_cast<float4*>(to + near_column<kInputs>(2 * m, 0)) = {sums[m][n][e], sums[m][n][2 + e],
                                                                         sums[m + 1][n][e], sums[m + 1][n][2 + e]};
      }
    }
  }
}

template <int value> using Size = std::integral_constant<int, value>;

// f(W, S, side) with the sizes of the kernel for this job.
template <class F> auto with_sizes(const LinearBackward& job, F f) {
  switch (job.W) {
    case 32: return f(Size<32>(), Size<64>(), Size<0>());
    case 48: return job.patch ? f(Size<48>(), Size<48>(), Size<4>()) : f(Size<48>(), Size<64>(), Size<0>());
    case 64: return f(Size<64>(), Size<64>(), Size<0>());
    default: return f(Size<192>(), Size<192>(), Size<8>());
  }
}

}  // namespace speedk
