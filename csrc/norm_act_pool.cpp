#include "norm_act_pool.h"

#include "parallel.h"

namespace speedk {
namespace SPEEDK_ISA {
namespace {

constexpr int64_t kLanes = 16;
constexpr int64_t kStrip = 512;  // values of a row that are worked on at a time

// The sum over i of f(i), in kLanes partial sums: a fixed order, and one that the compiler can vectorise.
template <class T, class F> inline T sum_over(int64_t count, F&& f) {
  T lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes)
    for (int64_t l = 0; l < kLanes; ++l) lanes[l] += f(i + l);
  for (; i < count; ++i) lanes[0] += f(i);
  T total = 0;
  for (int64_t l = 0; l < kLanes; ++l) total += lanes[l];
  return total;
}

inline float inverse_root(float v) { return 1.0f / __builtin_sqrtf(v); }
inline double inverse_root(double v) { return 1.0 / __builtin_sqrt(v); }

template <class T> void forward_plane(const NormActPool& j, int64_t plane, const T* x, T* out, T* mean, T* rstd) {
  const int64_t size = j.H * j.W, h = j.H / 2, w = j.W / 2;
  const T m = sum_over<T>(size, [&](int64_t i) { return x[i]; }) / static_cast<T>(size);
  const T var = sum_over<T>(size, [&](int64_t i) { return (x[i] - m) * (x[i] - m); }) / static_cast<T>(size);
  const T r = inverse_root(var + static_cast<T>(j.eps));
  mean[plane] = m;
  rstd[plane] = r;
  const T scale = static_cast<const T*>(j.weight)[plane % j.C] * r;
  const T shift = static_cast<const T*>(j.bias)[plane % j.C] - scale * m;
  T sums[kStrip];
  for (int64_t row = 0; row < h; ++row) {
    const T* upper = x + 2 * row * j.W;
    const T* lower = upper + j.W;
    for (int64_t begin = 0; begin < 2 * w; begin += kStrip) {
      const int64_t count = 2 * w - begin < kStrip ? 2 * w - begin : kStrip;
      for (int64_t i = 0; i < count; ++i) {
        const T a = scale * upper[begin + i] + shift, b = scale * lower[begin + i] + shift;
        sums[i] = (a < 0 ? 0 : a) + (b < 0 ? 0 : b);  // a NaN stays one
      }
      T* target = out + row * w + begin / 2;
      for (int64_t i = 0; i < count / 2; ++i) target[i] = static_cast<T>(0.25) * (sums[2 * i] + sums[2 * i + 1]);
    }
  }
}

// With n = (x - mean) rstd, a = weight n + bias and g = d_a = (a > 0) d_out / 4:
// d_weight = sum g n, d_bias = sum g, d_x = weight rstd (g - mean(g) - n mean(g n)).
template <class T>
void backward_plane(const NormActPool& j, int64_t plane, const T* x, const T* d_out, T m, T r, T* d_x, T* d_weight,
                    T* d_bias) {
  const int64_t size = j.H * j.W, h = j.H / 2, w = j.W / 2;
  const T weight = static_cast<const T*>(j.weight)[plane % j.C];
  const T scale = weight * r, shift = static_cast<const T*>(j.bias)[plane % j.C] - scale * m;
  T sum_g = 0, sum_gx = 0;  // of g, and of g (x - m)
  for (int64_t row = 0; row < j.H; ++row) {
    const T* from = x + row * j.W;
    T* to = d_x + row * j.W;
    if (row / 2 >= h) {
      for (int64_t i = 0; i < j.W; ++i) to[i] = 0;
      continue;
    }
    const T* slope = d_out + row / 2 * w;
    for (int64_t i = 0; i < w; ++i) to[2 * i] = to[2 * i + 1] = static_cast<T>(0.25) * slope[i];
    if (j.W % 2) to[j.W - 1] = 0;
    for (int64_t i = 0; i < 2 * w; ++i) to[i] = scale * from[i] + shift <= 0 ? 0 : to[i];
    sum_g += sum_over<T>(2 * w, [&](int64_t i) { return to[i]; });
    sum_gx += sum_over<T>(2 * w, [&](int64_t i) { return to[i] * (from[i] - m); });
  }
  d_weight[plane] = sum_gx * r;
  d_bias[plane] = sum_g;
  const T constant = sum_g / static_cast<T>(size), slope = sum_gx * r * r / static_cast<T>(size);
  for (int64_t i = 0; i < size; ++i) d_x[i] = scale * (d_x[i] - constant - (x[i] - m) * slope);
}

int64_t grain(const NormActPool& j) { return (int64_t{1} << 15) / (j.H * j.W + 1) + 1; }

template <class T> void forward(const NormActPool& j, void* out, void* mean, void* rstd, int threads) {
  parallel_for(threads, j.B * j.C, grain(j), [&](int64_t begin, int64_t end) {
    for (int64_t plane = begin; plane < end; ++plane)
      forward_plane(j, plane, static_cast<const T*>(j.x) + plane * j.H * j.W,
                    static_cast<T*>(out) + plane * (j.H / 2) * (j.W / 2), static_cast<T*>(mean), static_cast<T*>(rstd));
  });
}

template <class T>
void backward(const NormActPool& j, const void* d_out, const void* mean, const void* rstd, void* d_x, void* d_weight,
              void* d_bias, int threads) {
  parallel_for(threads, j.B * j.C, grain(j), [&](int64_t begin, int64_t end) {
    for (int64_t plane = begin; plane < end; ++plane)
      backward_plane(j, plane, static_cast<const T*>(j.x) + plane * j.H * j.W,
                     static_cast<const T*>(d_out) + plane * (j.H / 2) * (j.W / 2), static_cast<const T*>(mean)[plane],
                     static_cast<const T*>(rstd)[plane], static_cast<T*>(d_x) + plane * j.H * j.W,
                     static_cast<T*>(d_weight), static_cast<T*>(d_bias));
  });
}

}  // namespace

void norm_act_pool(const NormActPool& job, void* out, void* mean, void* rstd, int threads) {
  if (job.dtype == Dtype::float64) forward<double>(job, out, mean, rstd, threads);
  else forward<float>(job, out, mean, rstd, threads);
}

void norm_act_pool_backward(const NormActPool& job, const void* d_out, const void* mean, const void* rstd, void* d_x,
                            void* d_weight, void* d_bias, int threads) {
  if (job.dtype == Dtype::float64) backward<double>(job, d_out, mean, rstd, d_x, d_weight, d_bias, threads);
  else backward<float>(job, d_out, mean, rstd, d_x, d_weight, d_bias, threads);
}

}  // namespace SPEEDK_ISA
}  // namespace speedk
