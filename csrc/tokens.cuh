// 16 tokens of a warp in its registers, as tensor_core.cuh lays them out: from memory and back, norms, GELU, and sums
// over tokens. Rows beyond M are zeros, and written nowhere.
#pragma once
#include "tensor_core.cuh"

namespace speedk {

// 16 tokens of a warp as float.
template <int D> using Tokens = float[D / 8][4];

// Call f(n, e, v) for each position of this lane, v the value there of a vector [D] in shared memory.
template <int D, class F> __device__ __forceinline__ void each_column(const float* vector, int t, F f) {
#pragma unroll
  for (int q = 0; q < D / 32; ++q) {
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
      const float4 v = *reinterpret_cast<const float4*>(vector + 32 * q + 8 * t + 2 * i);
      f(4 * q + i, 0, v.x), f(4 * q + i, 1, v.y), f(4 * q + i + 1, 0, v.z), f(4 * q + i + 1, 1, v.w);
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
        rows.set(4 * q, half, a.x, a.y), rows.set(4 * q + 1, half, a.z, a.w);
        rows.set(4 * q + 2, half, b.x, b.y), rows.set(4 * q + 3, half, b.z, b.w);
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
        x[0] = {a.x, a.y, b.x, b.y}, x[1] = {c.x, c.y, d.x, d.y};
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
    sums[8 * (n & ~3) + 8 * (lane & 3) + 2 * (n & 3) + (s & 1)] = part[i];
  }
}

// The normal distribution up to u, and its density at u.
struct Normal {
  float below, density;
};

// With the error function of Abramowitz and Stegun, 7.1.26, which is off by 1.5e-7 at most.
__device__ __forceinline__ Normal normal_at(float u) {
  const float power = power_of_2(-0.72134752f * u * u), t = inverse(1.0f + 0.23164190f * fabsf(u));
  const float beyond =
      ((((0.530702715f * t - 0.726576014f) * t + 0.710706871f) * t - 0.142248368f) * t + 0.127414796f) * t * power;
  return {u >= 0 ? 1.0f - beyond : beyond, 0.39894228f * power};
}

// x = vector, for every token.
template <int D> __device__ __forceinline__ void fill(Tokens<D>& x, const float* vector, int t) {
  each_column<D>(vector, t, [&](int n, int e, float v) { x[n][e] = x[n][2 + e] = v; });
}

template <int D> __device__ __forceinline__ void clear(Tokens<D>& x) {
  each<D>([&](int n, int half, int e) { x[n][2 * half + e] = 0; });
}

// x = x weight + bias.
template <int D> __device__ __forceinline__ void scale(Tokens<D>& x, const float* weight, const float* bias, int t) {
  each_column<D>(weight, t, [&](int n, int e, float v) { x[n][e] *= v, x[n][2 + e] *= v; });
  each_column<D>(bias, t, [&](int n, int e, float v) { x[n][e] += v, x[n][2 + e] += v; });
}

template <Product P, int D> __device__ __forceinline__ void add(Tokens<D>& x, const Rows<P, D>& rows) {
  each<D>([&](int n, int half, int e) { x[n][2 * half + e] += value<P, D>(rows, n, half, e); });
}

// The two change places; x loses what `rows` does not hold.
template <Product P, int D> __device__ __forceinline__ void swap(Tokens<D>& x, Rows<P, D>& rows) {
#pragma unroll
  for (int n = 0; n < D / 8; ++n) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float2 kept = rows.of(n, half);
      rows.set(n, half, x[n][2 * half], x[n][2 * half + 1]);
      x[n][2 * half] = kept.x, x[n][2 * half + 1] = kept.y;
    }
  }
}

}  // namespace speedk
