// A warp carries 16 tokens through the block, forwards and back, in its registers. Beyond M are zeros: what they
// give is written nowhere, and their gradient is zero.
#pragma once
#include "early_launch.cuh"
#include "freenet_block.h"
#include "tokens.cuh"

namespace speedk {

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

// Ask for all weights, in shared memory. The vectors, which any product may need, are asked for first.
template <Product P, int D, int threads> __device__ __forceinline__ void stage(const FreenetBlock& job, char* shared) {
  static_assert(threads >= D, "a thread has one value of each vector");
  const unsigned i = threadIdx.x < D ? threadIdx.x : 0;
  uint32_t bits[kVectors];  // as they are, so that nothing waits for them before all is asked for
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const void* vector = job.weights[kVectorAt[v]];
    bits[v] = kShort<P> ? static_cast<const uint16_t*>(vector)[i] : static_cast<const uint32_t*>(vector)[i];
  }
#pragma unroll 1
  for (int m = 0; m < 3; ++m) {
    const void* weight = job.weights[kMatrixAt[0]];
    if (m > 0) weight = m == 1 ? job.weights[kMatrixAt[1]] : job.weights[kMatrixAt[2]];
    fetch_weight<P, D, threads>(weight, shared + m * kWeightBytes<P, D>);
    end_of_stage();
  }
  auto* vectors = reinterpret_cast<float*>(shared + 3 * kWeightBytes<P, D>);
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    if (threadIdx.x >= D) continue;
    if constexpr (kShort<P>) vectors[v * D + i] = unpacked<P>(bits[v]).x;
    else vectors[v * D + i] = __uint_as_float(bits[v]);
  }
}

// The vectors and the matrices, but for so many of the last, are there for all threads, which go on together.
template <int left> __device__ __forceinline__ void await_weights_but() {
  await_all_but<left>();
  __syncthreads();
}

// The input of the MLP from what the projection gives, x; `see` looks at that once it is normalised. Returns the scale.
template <Product P, int D, class F>
__device__ __forceinline__ float2 to_hidden(const FreenetBlock& job, const float* vectors, Tokens<D>& x,
                                            Rows<P, D>& rows, int64_t first, int lane, float eps, F see) {
  if (job.state) {
    load<P, D>(rows, job.state, first, job.M, lane);
    if (job.sum) add<P, D>(x, rows);
  }
  const float2 by = normalise<D>(x, eps);
  see();
  scale<D>(x, vectors + kNorm1Weight * D, vectors + kNorm1Bias * D, lane & 3);
  if (job.state && !job.sum) add<P, D>(x, rows);
  keep<P, D>(rows, x);
  return by;
}

// Products stand in loops of three that are not unrolled: a kernel goes through its instructions about once for each
// tile, and those of six products would not fit the multiprocessor's cache.
template <Product P, int D>
__global__ void __launch_bounds__(kForwardThreads<P>, kForwardBlocks<P>) block_kernel(FreenetBlock job, void* out) {
  char* shared = block_memory();
  stage<P, D, kForwardThreads<P>>(job, shared);
  constexpr int kWeight = kWeightBytes<P, D>;
  const auto* vectors = reinterpret_cast<const float*>(shared + 3 * kWeight);
  constexpr int kTokens = kForwardThreads<P> / 2;
  const int lane = threadIdx.x % 32, t = lane & 3, of_warp = threadIdx.x / 32 * 16;
  const float eps = static_cast<float>(job.eps);
  for (unsigned tile = blockIdx.x; static_cast<int64_t>(tile) * kTokens < job.M; tile += gridDim.x) {
    const int64_t first = static_cast<int64_t>(tile) * kTokens + of_warp;
    Tokens<D> x;
    Rows<P, D> rows;
    load<P, D>(rows, job.features, first, job.M, lane);
    const bool arriving = tile == blockIdx.x;
    if (arriving) await_weights_but<2>();
    fill<D>(x, vectors + kProjBias * D, t);
#pragma unroll 1
    for (int product = 0; product < 3; ++product) {
      add_product<false, P, D>(x, rows, shared + product * kWeight, lane);
      if (product == 0) {
        to_hidden<P, D>(job, vectors, x, rows, first, lane, eps, [] {});
        fill<D>(x, vectors + kFc1Bias * D, t);
        if (arriving) await_weights_but<1>();
      } else if (product == 1) {
        each<D>([&](int n, int half, int e) { x[n][2 * half + e] *= normal_at(x[n][2 * half + e]).below; });
        swap<P, D>(x, rows);
        each_column<D>(vectors + kFc2Bias * D, t, [&](int n, int e, float v) { x[n][e] += v, x[n][2 + e] += v; });
        if (arriving) await_weights_but<0>();
      } else {
        normalise<D>(x, eps);
        scale<D>(x, vectors + kNorm2Weight * D, vectors + kNorm2Bias * D, t);
        keep<P, D>(rows, x);
        store<P, D>(rows, out, first, job.M, lane);
      }
    }
  }
}

// One tile of 16 tokens a warp. Names as in docs/math/freenet.md.
template <Product P, int D>
__global__ void __launch_bounds__(kBackwardThreads, 1) block_backward_kernel(FreenetBlock job, BlockGradients to) {
  char* shared = block_memory();
  constexpr int kWeight = kWeightBytes<P, D>;
  const int lane = threadIdx.x % 32, t = lane & 3, warp = threadIdx.x / 32;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kBlockTokens + 16 * warp, M = job.M;
  Tokens<D> x;
  Rows<P, D> rows, normalised, slope;
  let_the_next_begin();
  if (!to.more) await_the_one_before();  // which may have written the inputs; of later chunks they are there
  load<P, D>(rows, job.features, first, M, lane);
  if (first + lane / 2 < M) {
    const int64_t at = (first + lane / 2) * D * (kShort<P> ? 2 : 4) + 128 * (lane & 1);  // two lines of each token
    ask_for(static_cast<const char*>(to.d_out) + at);
    if (job.state) ask_for(static_cast<const char*>(job.state) + at);
  }
  stage<P, D, kBackwardThreads>(job, shared);
  const auto* vectors = reinterpret_cast<const float*>(shared + 3 * kWeight);
  auto* all_sums = const_cast<float*>(vectors) + kVectors * D;
  float* sums = all_sums + warp * kVectors * D;
  const float eps = static_cast<float>(job.eps);
  float2 scale1 = {0, 0};

  if (to.more) await_the_one_before();
  await_weights_but<2>();
  fill<D>(x, vectors + kProjBias * D, t);
#pragma unroll 1
  for (int product = 0; product < 3; ++product) {
    add_product<false, P, D>(x, rows, shared + product * kWeight, lane);
    if (product == 0) {
      scale1 = to_hidden<P, D>(job, vectors, x, rows, first, lane, eps, [&] { keep<P, D>(normalised, x); });
      store<P, D>(rows, to.hidden, first, M, lane);
      await_weights_but<1>();
      fill<D>(x, vectors + kFc1Bias * D, t);
    } else if (product == 1) {
#pragma unroll
      for (int n = 0; n < D / 8; ++n) {
        float steep[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const Normal at = normal_at(x[n][i]);
          steep[i] = at.below + x[n][i] * at.density;
          x[n][i] *= at.below;
        }
        slope.set(n, 0, steep[0], steep[1]), slope.set(n, 1, steep[2], steep[3]);
      }
      swap<P, D>(x, rows);
      each_column<D>(vectors + kFc2Bias * D, t, [&](int n, int e, float v) { x[n][e] += v, x[n][2 + e] += v; });
      await_weights_but<0>();
      store<P, D>(rows, to.active, first, M, lane);
    } else {
      const float2 scale2 = normalise<D>(x, eps);
      load<P, D>(rows, to.d_out, first, M, lane);
      sum_columns<D>(sums + kNorm2Weight * D, lane,
                     [&](int n, int half, int e) { return value<P, D>(rows, n, half, e) * x[n][2 * half + e]; });
      sum_columns<D>(sums + kNorm2Bias * D, lane,
                     [&](int n, int half, int e) { return value<P, D>(rows, n, half, e); });
      Tokens<D> d;
      each<D>([&](int n, int half, int e) { d[n][2 * half + e] = value<P, D>(rows, n, half, e); });
      back_through_norm<D>(d, vectors + kNorm2Weight * D, scale2, t,
                           [&](int n, int half, int e) { return x[n][2 * half + e]; });
      sum_columns<D>(sums + kFc2Bias * D, lane, [&](int n, int half, int e) { return d[n][2 * half + e]; });
      keep<P, D>(rows, d);  // dY
      store<P, D>(rows, to.d_mlp, first, M, lane);
    }
  }

  clear<D>(x);
#pragma unroll 1
  for (int product = 2; product >= 0; --product) {
    add_product<true, P, D>(x, rows, shared + product * kWeight, lane);
    const auto of_x = [&](int n, int half, int e) { return x[n][2 * half + e]; };
    if (product == 2) {
      each<D>([&](int n, int half, int e) { x[n][2 * half + e] *= value<P, D>(slope, n, half, e); });
      sum_columns<D>(sums + kFc1Bias * D, lane, of_x);
      swap<P, D>(x, rows);  // x is dY, rows are dU
      store<P, D>(rows, to.d_inner, first, M, lane);
    } else if (product == 1) {
      const auto branch = [&](int n, int half, int e) { return value<P, D>(normalised, n, half, e); };
      sum_columns<D>(sums + kNorm1Weight * D, lane,
                     [&](int n, int half, int e) { return of_x(n, half, e) * branch(n, half, e); });
      sum_columns<D>(sums + kNorm1Bias * D, lane, of_x);
      if (job.state && !job.sum) {
        keep<P, D>(rows, x);
        store<P, D>(rows, to.d_state, first, M, lane);
      }
      back_through_norm<D>(x, vectors + kNorm1Weight * D, scale1, t, branch);
      sum_columns<D>(sums + kProjBias * D, lane, of_x);
      keep<P, D>(rows, x);  // dB
      store<P, D>(rows, to.d_branch, first, M, lane);
      if (job.state && job.sum) store<P, D>(rows, to.d_state, first, M, lane);
      clear<D>(x);
    } else {
      keep<P, D>(rows, x);
      store<P, D>(rows, to.d_features, first, M, lane);
    }
  }

  __syncthreads();
  float* total = to.sums + static_cast<int64_t>(blockIdx.x) * kVectors * D;
  for (int i = threadIdx.x; i < kVectors * D; i += kBackwardThreads) {
    float sum = to.more ? total[i] : 0;
    for (int w = 0; w < kBackwardThreads / 32; ++w) sum += all_sums[w * kVectors * D + i];
    total[i] = sum;
  }
}

}  // namespace speedk
