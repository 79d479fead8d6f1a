// LayerNorm of a token that sits in the cache, and its way back.
#pragma once
#include <cstdint>

#include "simd.h"

namespace speedk {
namespace {

constexpr float kEps = 1e-6f;  // EPS of speedk/ops/freenet_block.py

// LayerNorm of one row of D values (plus `residual`), in place: y becomes normalised w + b (plus `added`), and
// `normalised` what it is scaled from; each of these may be null. Returns 1 / standard deviation.
inline float norm_row(float* y, const float* residual, float* normalised, const float* w, const float* b,
                      const float* added, int64_t D) {
  constexpr int W = kWidth<float>;
  Floats total{};
  int64_t i = 0;
  for (; i + W <= D; i += W) {
    const Floats value = residual ? load(y + i) + load(residual + i) : load(y + i);
    if (residual) store(y + i, value);
    total += value;
  }
  float mean = sum_of<float>(total);
  for (; i < D; ++i) {
    if (residual) y[i] += residual[i];
    mean += y[i];
  }
  mean /= static_cast<float>(D);
  Floats squares{};
  for (i = 0; i + W <= D; i += W) {
    const Floats centred = load(y + i) - mean;
    squares += centred * centred;
  }
  float variance = sum_of<float>(squares);
  for (; i < D; ++i) variance += (y[i] - mean) * (y[i] - mean);
  const float scale = 1.0f / __builtin_sqrtf(variance / static_cast<float>(D) + kEps);
  for (i = 0; i + W <= D; i += W) {
    const Floats n = (load(y + i) - mean) * scale;
    if (normalised) store(normalised + i, n);
    const Floats result = n * load(w + i) + load(b + i);
    store(y + i, added ? result + load(added + i) : result);
  }
  for (; i < D; ++i) {
    const float n = (y[i] - mean) * scale;
    if (normalised) normalised[i] = n;
    y[i] = n * w[i] + b[i] + (added ? added[i] : 0.0f);
  }
  return scale;
}

// From the gradient `d` of the result of norm_row that of its input, to `d_y`, which may be `d`; adds to those of w and
// b.
inline void norm_row_backward(const float* d, float* d_y, const float* normalised, const float* w, float scale,
                              float* d_w, float* d_b, int64_t D) {
  constexpr int W = kWidth<float>;
  float sum = 0, projection = 0;
  Floats sums{}, projections{};
  int64_t i = 0;
  for (; i + W <= D; i += W) {
    const Floats g = load(d + i), n = load(normalised + i);
    store(d_w + i, load(d_w + i) + g * n);
    store(d_b + i, load(d_b + i) + g);
    const Floats scaled = g * load(w + i);
    store(d_y + i, scaled);
    sums += scaled;
    projections += scaled * n;
  }
  for (; i < D; ++i) {
    d_w[i] += d[i] * normalised[i];
    d_b[i] += d[i];
    d_y[i] = d[i] * w[i];
    sum += d_y[i];
    projection += d_y[i] * normalised[i];
  }
  sum = (sum + sum_of<float>(sums)) / static_cast<float>(D);
  projection = (projection + sum_of<float>(projections)) / static_cast<float>(D);
  for (i = 0; i + W <= D; i += W) {
    store(d_y + i, (load(d_y + i) - sum - load(normalised + i) * projection) * scale);
  }
  for (; i < D; ++i) d_y[i] = (d_y[i] - sum - normalised[i] * projection) * scale;
}

}  // namespace
}  // namespace speedk
