// A warp carries 16 tokens through the block, forwards and back, in its registers; tensor_core.cuh says how they lie.
// Rows beyond M are zeros: what they give is written nowhere, and their gradient is zero.
#pragma once
#include "freenet_block.h"
#include "tensor_core.cuh"

namespace speedk {

constexpr int kVectors = 7;

template <Product P> constexpr int kForwardThreads = kShort<P> ? 256 : 384;
template <Product P> constexpr int kForwardBlocks = kShort<P> ? 2 : 1;  // of a multiprocessor
constexpr int kBackwardThreads = kBlockTokens * 2;  // 16 tokens a warp

template <Product P, int D> constexpr int kForwardBytes = 3 * kWeightBytes<P, D> + kVectors * 4 * D;
template <Product P, int D>
constexpr int kBackwardBytes = kForwardBytes<P, D> + kBackwardThreads / 32 * kVectors * 4 * D;

// Where the matrices and the vectors stand among the ten weights, the vectors in this order: the projection's bias, the
// first norm's two, the biases of both linears, the second norm's two.
__device__ constexpr int kMatrixAt[3] = {0, 4, 6};
__device__ constexpr int kVectorAt[kVectors] = {1, 2, 3, 5, 7, 8, 9};
enum { kProjBias, kNorm1Weight, kNorm1Bias, kFc1Bias, kFc2Bias, kNorm2Weight, kNorm2Bias };

template <Product P> __device__ __forceinline__ float scalar(const void* values, int i) {
  if constexpr (!kShort<P>) return static_cast<const float*>(values)[i];
  else return unpacked<P>(static_cast<const uint16_t*>(values)[i]).x;
}

// 16 tokens of a warp as float.
template <int D> using Tokens = float[D / 8][4];

// All weights into shared memory.
template <Product P, int D> __device__ __forceinline__ void stage(const FreenetBlock& job, char* shared) {
#pragma unroll
  for (int m = 0; m < 3; ++m) stage_weight<P, D>(job.weights[kMatrixAt[m]], shared + m * kWeightBytes<P, D>);
  auto* vectors = reinterpret_cast<float*>(shared + 3 * kWeightBytes<P, D>);
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    for (int i = threadIdx.x; i < D; i += blockDim.x) vectors[v * D + i] = scalar<P>(job.weights[kVectorAt[v]], i);
  }
}

// Call f(n, e, v) for each position of this lane, v the value there of a vector [D] in shared memory.
template <int D, class F> __device__ __forceinline__ void each_column(const float* vector, int t, F f) {
#pragma unroll
  for (int q = 0; q < D / 32; ++q) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const float4 v = *reinterpret_cast<const float4*>(vector + 32 * q + 8 * t + 4 * e);
      f(4 * q, e, v.x), f(4 * q + 1, e, v.y), f(4 * q + 2, e, v.z), f(4 * q + 3, e, v.w);
    }
  }
}

// f(n, half, e) for each value of this lane.
template <int D, class F> __device__ __forceinline__ void each(F f) {
#pragma unroll
  for (int n = 0; n < D / 8; ++n) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int e = 0; e < 2; ++e) f(n, half, e);
    }
  }
}

template <Product P, int D>
__device__ __forceinline__ void load(Rows<P, D>& rows, const void* from, int64_t first, int64_t M, int lane) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t row = first + (lane >> 2) + 8 * half;
#pragma unroll
    for (int q = 0; q < D / 32; ++q) {
      const int64_t at = row * D + 32 * q + 8 * (lane & 3);
      if constexpr (kShort<P>) {
        uint4 w = {0, 0, 0, 0};
        if (row < M) w = *reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(from) + at);
        rows.put(q, half, w);
      } else {
        float4 a = {0, 0, 0, 0}, b = a;
        if (row < M) {
          const auto* x = reinterpret_cast<const float4*>(static_cast<const float*>(from) + at);
          a = x[0], b = x[1];
        }
        rows.set(4 * q, half, a.x, b.x), rows.set(4 * q + 1, half, a.y, b.y);
        rows.set(4 * q + 2, half, a.z, b.z), rows.set(4 * q + 3, half, a.w, b.w);
      }
    }
  }
}

template <Product P, int D>
__device__ __forceinline__ void store(const Rows<P, D>& rows, void* to, int64_t first, int64_t M, int lane) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t row = first + (lane >> 2) + 8 * half;
    if (row >= M) continue;
#pragma unroll
    for (int q = 0; q < D / 32; ++q) {
      const int64_t at = row * D + 32 * q + 8 * (lane & 3);
      if constexpr (kShort<P>) {
        *reinterpret_cast<uint4*>(static_cast<uint16_t*>(to) + at) = rows.get(q, half);
      } else {
        auto* x = reinterpret_cast<float4*>(static_cast<float*>(to) + at);
        const float2 a = rows.of(4 * q, half), b = rows.of(4 * q + 1, half), c = rows.of(4 * q + 2, half),
                     d = rows.of(4 * q + 3, half);
        x[0] = {a.x, b.x, c.x, d.x}, x[1] = {a.y, b.y, c.y, d.y};
      }
    }
  }
}

template <Product P, int D> __device__ __forceinline__ void keep(Rows<P, D>& rows, const Tokens<D>& x) {
#pragma unroll
  for (int n = 0; n < D / 8; ++n) rows.set(n, 0, x[n][0], x[n][1]), rows.set(n, 1, x[n][2], x[n][3]);
}

template <Product P, int D> __device__ __forceinline__ float value(const Rows<P, D>& rows, int n, int half, int e) {
  const float2 v = rows.of(n, half);
  return e ? v.y : v.x;
}

// The sum over a token's values, of what its four lanes have of it.
__device__ __forceinline__ float over_token(float sum) {
  sum += across(sum, 1);
  return sum + across(sum, 2);
}

// x is centred and scaled to variance 1; returns the scale of each of the two tokens.
template <int D> __device__ __forceinline__ float2 normalise(Tokens<D>& x, float eps) {
  float scale[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float sum = 0, squares = 0;
#pragma unroll
    for (int n = 0; n < D / 8; ++n) sum += x[n][2 * half] + x[n][2 * half + 1];
    const float mean = over_token(sum) * (1.0f / D);
#pragma unroll
    for (int n = 0; n < D / 8; ++n) {
      const float a = x[n][2 * half] -= mean, b = x[n][2 * half + 1] -= mean;
      squares += a * a + b * b;
    }
    scale[half] = rsqrtf(over_token(squares) * (1.0f / D) + eps);
#pragma unroll
    for (int n = 0; n < D / 8; ++n) x[n][2 * half] *= scale[half], x[n][2 * half + 1] *= scale[half];
  }
  return {scale[0], scale[1]};
}

// d, the gradient of norm(x) weight + bias, becomes that of x, whose normalised values are `normalised(n, half, e)`.
template <int D, class F>
__device__ __forceinline__ void back_through_norm(Tokens<D>& d, const float* weight, float2 scale, int t,
                                                  F normalised) {
  each_column<D>(weight, t, [&](int n, int e, float w) { d[n][e] *= w, d[n][2 + e] *= w; });
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float sum = 0, along = 0;
#pragma unroll
    for (int n = 0; n < D / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) sum += d[n][2 * half + e], along += d[n][2 * half + e] * normalised(n, half, e);
    }
    sum = over_token(sum) * (1.0f / D), along = over_token(along) * (1.0f / D);
    const float by = half ? scale.y : scale.x;
#pragma unroll
    for (int n = 0; n < D / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float& value = d[n][2 * half + e];
        value = by * (value - sum - along * normalised(n, half, e));
      }
    }
  }
}

// Of 2 count partial sums, the lanes of a pair keep half each, added up; `upper`: this one keeps the second half.
template <int count, int size> __device__ __forceinline__ void share(float (&part)[size], bool upper, int lanes) {
#pragma unroll
  for (int s = 0; s < count; ++s) {
    const float mine = upper ? part[s + count] : part[s], other = upper ? part[s] : part[s + count];
    part[s] = mine + across(other, lanes);
  }
}

// sums [D], in shared memory, is the sum over the warp's 16 tokens of `value(n, half, e)`. Lanes of one column
// halve what is left among them three times, so each ends with an eighth of the columns.
template <int D, class F> __device__ __forceinline__ void sum_columns(float* sums, int lane, F value) {
  float part[D / 4];
#pragma unroll
  for (int s = 0; s < D / 4; ++s) part[s] = value(s / 2, 0, s % 2) + value(s / 2, 1, s % 2);
  share<D / 8>(part, lane & 16, 16);
  share<D / 16>(part, lane & 8, 8);
  share<D / 32>(part, lane & 4, 4);
  const int first = (lane & 16 ? D / 8 : 0) + (lane & 8 ? D / 16 : 0) + (lane & 4 ? D / 32 : 0);
#pragma unroll
  for (int i = 0; i < D / 32; ++i) {
    const int s = first + i, n = s >> 1;
    sums[8 * (n & ~3) + 8 * (lane & 3) + 4 * (s & 1) + (n & 3)] = part[i];
  }
}

__device__ __forceinline__ float normal_below(float u) { return 0.5f + 0.5f * erff(u * 0.70710678f); }

template <Product P, int D>
__global__ void __launch_bounds__(kForwardThreads<P>, kForwardBlocks<P>)
block_kernel(FreenetBlock job, void* out) {
  char* shared = block_memory();
  stage<P, D>(job, shared);
  __syncthreads();
  constexpr int kWeight = kWeightBytes<P, D>;
  const auto* vectors = reinterpret_cast<const float*>(shared + 3 * kWeight);
  const int lane = threadIdx.x % 32, t = lane & 3, warps = kForwardThreads<P> / 32;
  const float eps = static_cast<float>(job.eps);
  for (int64_t tile = static_cast<int64_t>(blockIdx.x) * warps + threadIdx.x / 32; tile * 16 < job.M;
       tile += static_cast<int64_t>(gridDim.x) * warps) {
    const int64_t first = tile * 16;
    Tokens<D> x;
    Rows<P, D> rows;
    load<P, D>(rows, job.features, first, job.M, lane);
    each_column<D>(vectors + kProjBias * D, t, [&](int n, int e, float v) { x[n][e] = x[n][2 + e] = v; });
    add_product<false, P, D>(x, rows, shared, lane);
    if (job.state) {
      load<P, D>(rows, job.state, first, job.M, lane);
      if (job.sum) each<D>([&](int n, int half, int e) { x[n][2 * half + e] += value<P, D>(rows, n, half, e); });
    }
    normalise<D>(x, eps);
    each_column<D>(vectors + kNorm1Weight * D, t, [&](int n, int e, float v) { x[n][e] *= v, x[n][2 + e] *= v; });
    each_column<D>(vectors + kNorm1Bias * D, t, [&](int n, int e, float v) { x[n][e] += v, x[n][2 + e] += v; });
    if (job.state && !job.sum) {
      each<D>([&](int n, int half, int e) { x[n][2 * half + e] += value<P, D>(rows, n, half, e); });
    }
    keep<P, D>(rows, x);  // the state of the MLP

    each_column<D>(vectors + kFc1Bias * D, t, [&](int n, int e, float v) { x[n][e] = x[n][2 + e] = v; });
    add_product<false, P, D>(x, rows, shared + kWeight, lane);
    Rows<P, D> active;
    each<D>([&](int n, int half, int e) { x[n][2 * half + e] *= normal_below(x[n][2 * half + e]); });
    keep<P, D>(active, x);

    each<D>([&](int n, int half, int e) { x[n][2 * half + e] = value<P, D>(rows, n, half, e); });
    each_column<D>(vectors + kFc2Bias * D, t, [&](int n, int e, float v) { x[n][e] += v, x[n][2 + e] += v; });
    add_product<false, P, D>(x, active, shared + 2 * kWeight, lane);
    normalise<D>(x, eps);
    each_column<D>(vectors + kNorm2Weight * D, t, [&](int n, int e, float v) { x[n][e] *= v, x[n][2 + e] *= v; });
    each_column<D>(vectors + kNorm2Bias * D, t, [&](int n, int e, float v) { x[n][e] += v, x[n][2 + e] += v; });
    keep<P, D>(rows, x);
    store<P, D>(rows, out, first, job.M, lane);
  }
}

// One tile of 16 tokens a warp. Names as in docs/math/freenet.md.
template <Product P, int D>
__global__ void __launch_bounds__(kBackwardThreads, 1) block_backward_kernel(FreenetBlock job, BlockGradients to) {
  char* shared = block_memory();
  stage<P, D>(job, shared);
  __syncthreads();
  constexpr int kWeight = kWeightBytes<P, D>;
  const auto* vectors = reinterpret_cast<const float*>(shared + 3 * kWeight);
  auto* all_sums = const_cast<float*>(vectors) + kVectors * D;
  const int lane = threadIdx.x % 32, t = lane & 3, warp = threadIdx.x / 32;
  float* sums = all_sums + warp * kVectors * D;
  const float eps = static_cast<float>(job.eps);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kBlockTokens + 16 * warp, M = job.M;

  Tokens<D> x;
  Rows<P, D> normalised, rows, slope;
  load<P, D>(rows, job.features, first, M, lane);
  each_column<D>(vectors + kProjBias * D, t, [&](int n, int e, float v) { x[n][e] = x[n][2 + e] = v; });
  add_product<false, P, D>(x, rows, shared, lane);
  if (job.state) {
    load<P, D>(rows, job.state, first, M, lane);
    if (job.sum) each<D>([&](int n, int half, int e) { x[n][2 * half + e] += value<P, D>(rows, n, half, e); });
  }
  const float2 scale1 = normalise<D>(x, eps);
  keep<P, D>(normalised, x);
  each_column<D>(vectors + kNorm1Weight * D, t, [&](int n, int e, float v) { x[n][e] *= v, x[n][2 + e] *= v; });
  each_column<D>(vectors + kNorm1Bias * D, t, [&](int n, int e, float v) { x[n][e] += v, x[n][2 + e] += v; });
  if (job.state && !job.sum) {
    each<D>([&](int n, int half, int e) { x[n][2 * half + e] += value<P, D>(rows, n, half, e); });
  }
  keep<P, D>(rows, x);
  store<P, D>(rows, to.hidden, first, M, lane);

  each_column<D>(vectors + kFc1Bias * D, t, [&](int n, int e, float v) { x[n][e] = x[n][2 + e] = v; });
  add_product<false, P, D>(x, rows, shared + kWeight, lane);
  {
    Tokens<D> y;
    each<D>([&](int n, int half, int e) { y[n][2 * half + e] = value<P, D>(rows, n, half, e); });
    each_column<D>(vectors + kFc2Bias * D, t, [&](int n, int e, float v) { y[n][e] += v, y[n][2 + e] += v; });
#pragma unroll
    for (int n = 0; n < D / 8; ++n) {
      float steep[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float u = x[n][i], below = normal_below(u);
        steep[i] = below + u * 0.39894228f * __expf(-0.5f * u * u);
        x[n][i] = u * below;
      }
      slope.set(n, 0, steep[0], steep[1]), slope.set(n, 1, steep[2], steep[3]);
    }
    keep<P, D>(rows, x);  // what GELU gives
    store<P, D>(rows, to.active, first, M, lane);
    add_product<false, P, D>(y, rows, shared + 2 * kWeight, lane);
    const float2 scale2 = normalise<D>(y, eps);
    load<P, D>(rows, to.d_out, first, M, lane);
    sum_columns<D>(sums + kNorm2Weight * D, lane,
                   [&](int n, int half, int e) { return value<P, D>(rows, n, half, e) * y[n][2 * half + e]; });
    sum_columns<D>(sums + kNorm2Bias * D, lane, [&](int n, int half, int e) { return value<P, D>(rows, n, half, e); });
    each<D>([&](int n, int half, int e) { x[n][2 * half + e] = value<P, D>(rows, n, half, e); });
    back_through_norm<D>(x, vectors + kNorm2Weight * D, scale2, t,
                         [&](int n, int half, int e) { return y[n][2 * half + e]; });
  }
  sum_columns<D>(sums + kFc2Bias * D, lane, [&](int n, int half, int e) { return x[n][2 * half + e]; });
  keep<P, D>(rows, x);  // dY
  store<P, D>(rows, to.d_mlp, first, M, lane);

  Rows<P, D> d_inner;
  each<D>([&](int n, int half, int e) { x[n][2 * half + e] = 0; });
  add_product<true, P, D>(x, rows, shared + 2 * kWeight, lane);
  each<D>([&](int n, int half, int e) { x[n][2 * half + e] *= value<P, D>(slope, n, half, e); });
  sum_columns<D>(sums + kFc1Bias * D, lane, [&](int n, int half, int e) { return x[n][2 * half + e]; });
  keep<P, D>(d_inner, x);
  store<P, D>(d_inner, to.d_inner, first, M, lane);

  each<D>([&](int n, int half, int e) { x[n][2 * half + e] = value<P, D>(rows, n, half, e); });
  add_product<true, P, D>(x, d_inner, shared + kWeight, lane);
  const auto branch = [&](int n, int half, int e) { return value<P, D>(normalised, n, half, e); };
  sum_columns<D>(sums + kNorm1Weight * D, lane,
                 [&](int n, int half, int e) { return x[n][2 * half + e] * branch(n, half, e); });
  sum_columns<D>(sums + kNorm1Bias * D, lane, [&](int n, int half, int e) { return x[n][2 * half + e]; });
  if (job.state && !job.sum) {
    keep<P, D>(rows, x);
    store<P, D>(rows, to.d_state, first, M, lane);
  }
  back_through_norm<D>(x, vectors + kNorm1Weight * D, scale1, t, branch);
  sum_columns<D>(sums + kProjBias * D, lane, [&](int n, int half, int e) { return x[n][2 * half + e]; });
  keep<P, D>(rows, x);  // dB
  store<P, D>(rows, to.d_branch, first, M, lane);
  if (job.state && job.sum) store<P, D>(rows, to.d_state, first, M, lane);
  each<D>([&](int n, int half, int e) { x[n][2 * half + e] = 0; });
  add_product<true, P, D>(x, rows, shared, lane);
  keep<P, D>(rows, x);
  store<P, D>(rows, to.d_features, first, M, lane);

  __syncthreads();
  float* total = to.sums + static_cast<int64_t>(blockIdx.x) * kVectors * D;
  for (int i = threadIdx.x; i < kVectors * D; i += kBackwardThreads) {
    float sum = blockIdx.x < to.more ? total[i] : 0;
    for (int w = 0; w < kBackwardThreads / 32; ++w) sum += all_sums[w * kVectors * D + i];
    total[i] = sum;
  }
}

}  // namespace speedk
