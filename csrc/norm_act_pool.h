// InstanceNorm, ReLU and 2x2 average pooling in one pass over each plane, its backward pass and that pass's own.
// docs/math/norm_act_pool.md derives the arithmetic, which the CPU and the GPU share.
#pragma once
#include <cstdint>

#include "isa.h"

namespace speedk {

// B C planes of H x W values; on the CPU float32 or float64. An odd last row or column takes part in the norm, not in
// the pooling.
struct NormActPool {
  Dtype dtype;
  bool channels_last;  // of x and everything of its size or the pooled one: [B, H, W, C] in memory, else [B, C, H, W]
  const void* x;       // [B, C, H, W]
  const void* weight;  // [C]
  const void* bias;    // [C]
  int64_t B, C, H, W;
  double eps;
};

// What the second derivative is taken of and what it gives. Statistics and sums over a plane are of the type that the
// kernels compute in: float32, or float64 for float64.
struct NormActPoolSecond {
  const void* d_out;      // [B, C, H / 2, W / 2], as it came to the backward pass
  const void* mean;       // [B, C]
  const void* rstd;       // [B, C]
  const void* dd_x;       // [B, C, H, W], the slope of d_x
  const void* dd_weight;  // [C], the slope of d_weight
  const void* dd_bias;    // [C], the slope of d_bias
  void* d_d_out;          // [B, C, H / 2, W / 2]
  void* d_x;              // [B, C, H, W]
  void* d_weight;         // [B, C], to be summed over B
};

// out [B, C, H / 2, W / 2]; mean and rstd [B, C], what the backward passes need of the statistics.
SPEEDK_DECLARE(void norm_act_pool(const NormActPool& job, void* out, void* mean, void* rstd, int threads))

// d_x [B, C, H, W] and, for each plane, the parts d_weight and d_bias [B, C], to be summed over B.
SPEEDK_DECLARE(void norm_act_pool_backward(const NormActPool& job, const void* d_out, const void* mean,
                                           const void* rstd, void* d_x, void* d_weight, void* d_bias, int threads))

SPEEDK_DECLARE(void norm_act_pool_double_backward(const NormActPool& job, const NormActPoolSecond& second, int threads))

#if defined(SPEEDK_CUDA)
// The same on a GPU's stream, for every Dtype; they return a cudaError_t.
int norm_act_pool_cuda(const NormActPool& job, void* out, void* mean, void* rstd, void* stream);
int norm_act_pool_backward_cuda(const NormActPool& job, const void* d_out, const void* mean, const void* rstd,
                                void* d_x, void* d_weight, void* d_bias, void* stream);
int norm_act_pool_double_backward_cuda(const NormActPool& job, const NormActPoolSecond& second, void* stream);
#endif

namespace {  // compiled once per instruction set

// V is a number or, where lanes are channels, a vector of them. A NaN stays one.
template <class V> SPEEDK_SHARED V relu(V a) { return a < V{} ? V{} : a; }
template <class V> SPEEDK_SHARED V through(V a, V slope) { return a <= V{} ? V{} : slope; }

// Sums over a plane about a rough mean: of x - mean and of its square.
template <class V> struct Spread {
  V centred, square;
  SPEEDK_SHARED void add(V value) {
    centred += value;
    square += value * value;
  }
  SPEEDK_SHARED void operator+=(const Spread& other) {
    centred += other.centred;
    square += other.square;
  }
};

// The sum of many values beside which their spread is small is off by more than the spread allows; that of what is left
// of them about the rough mean is not, and corrects it. Rounding could take the variance below zero.
template <class V> struct Statistics {
  V mean, variance;
  SPEEDK_SHARED static Statistics of(V mean, const Spread<V>& sums, V size) {
    const V off = sums.centred / size;
    return {mean + off, relu(sums.square / size - off * off)};
  }
};

// a = scale (x - mean) + bias is what the ReLU sees: near the mean the difference is exact, as scale x is not.
template <class V> struct Norm {
  V mean, rstd, scale, bias;
  SPEEDK_SHARED static Norm of(V weight, V bias, V mean, V rstd) { return {mean, rstd, weight * rstd, bias}; }
  SPEEDK_SHARED V operator()(V x) const { return scale * (x - mean) + bias; }
};

// Sums over a plane, with g = d out / 4 where a > 0: of g and g (x - mean).
template <class V> struct FirstSums {
  V g, gx;
  SPEEDK_SHARED void add(V g_i, V centred) {
    g += g_i;
    gx += g_i * centred;
  }
  SPEEDK_SHARED void operator+=(const FirstSums& other) {
    g += other.g;
    gx += other.gx;
  }
};

// d_x = by_g g + by_x (x - mean) + constant.
template <class V> struct First {
  V by_g, by_x, constant, d_weight, d_bias;
  SPEEDK_SHARED static First of(const Norm<V>& norm, const FirstSums<V>& sums, V size) {
    const V scale = norm.scale;
    return {scale, -scale * norm.rstd * norm.rstd * sums.gx / size, -scale * sums.g / size, norm.rstd * sums.gx,
            sums.g};
  }
  SPEEDK_SHARED V d_x(V g, V centred) const { return by_g * g + by_x * centred + constant; }
};

// The same with u = dd_x, the slope of d_x: also the sums of u and u (x - mean).
template <class V> struct SecondSums {
  V g, gx, u, ux;
  SPEEDK_SHARED void add(V g_i, V u_i, V centred) {
    g += g_i;
    gx += g_i * centred;
    add(u_i, centred);
  }
  SPEEDK_SHARED void add(V u_i, V centred) {
    u += u_i;
    ux += u_i * centred;
  }
  SPEEDK_SHARED void operator+=(const SecondSums& other) {
    g += other.g;
    gx += other.gx;
    u += other.u;
    ux += other.ux;
  }
};

// Means over a plane of g, g n, u and u n, with n = (x - mean) rstd.
template <class V> struct SecondMeans {
  V g, gn, u, un, slope;
  SPEEDK_SHARED static SecondMeans of(const Norm<V>& norm, const SecondSums<V>& sums, V size) {
    const V gn = norm.rstd * sums.gx / size;
    return {sums.g / size, gn, sums.u / size, norm.rstd * sums.ux / size, norm.rstd * gn};
  }
  // What is summed next: of numbers that are centred already, as the difference of large sums would not be exact.
  SPEEDK_SHARED V rest(V g_i, V u_i, V centred) const { return (u_i - u) * (g_i - g - slope * centred); }
};

// d_g = scale u + mixed (x - mean) + g_constant; d_x = mixed g + by_u u + by_x (x - mean) + x_constant.
template <class V> struct Second {
  V scale, mixed, g_constant, by_u, by_x, x_constant, d_weight;
  SPEEDK_SHARED static Second of(const Norm<V>& norm, const SecondMeans<V>& mean, V rest, V dd_weight, V dd_bias,
                                 V size) {
    const V r = norm.rstd, scale = norm.scale;
    const V mixed = r * (dd_weight - scale * mean.un), by_u = -r * scale * mean.gn;
    const V by_x = -r * r * (dd_weight * mean.gn + scale * (rest / size - (mean.un + mean.un) * mean.gn));
    const V constant = -mixed * mean.g - by_u * mean.u;
    return {scale, mixed, dd_bias - scale * mean.u, by_u, by_x, constant, r * rest};
  }
  SPEEDK_SHARED V d_g(V u, V centred) const { return scale * u + mixed * centred + g_constant; }
  SPEEDK_SHARED V d_x(V g, V u, V centred) const { return mixed * g + by_u * u + by_x * centred + x_constant; }
};

}  // namespace
}  // namespace speedk
