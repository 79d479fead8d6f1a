#include "unroll_step.h"

#include "parallel.h"

namespace speedk {
namespace SPEEDK_ISA {
namespace {

constexpr int64_t kLanes = 16;

// In double, where the product of two floats is exact, and in kLanes partial sums: a fixed order, and one that the
// compiler can vectorise.
template <class T> double dot(const T* a, const T* b, int64_t count) {
  double lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes)
    for (int64_t l = 0; l < kLanes; ++l) lanes[l] += static_cast<double>(a[i + l]) * b[i + l];
  for (; i < count; ++i) lanes[0] += static_cast<double>(a[i]) * b[i];
  double total = 0;
  for (const double lane : lanes) total += lane;
  return total;
}

template <class F> void each_chunk(int64_t P, int threads, F&& f) {
  parallel_for(threads, step_chunks(P), 8, [&](int64_t first, int64_t last) {
    for (int64_t chunk = first; chunk < last; ++chunk) {
      const int64_t begin = chunk * kStepChunk;
      f(chunk, begin, P - begin < kStepChunk ? P : begin + kStepChunk);
    }
  });
}

// One chunk of a step. With arguments of its own: what a lambda captures by reference could lie anywhere, and the
// compiler would load lr and momentum again after each store instead of taking a vector at a time.
template <class T>
void step_chunk(int64_t count, T lr, T momentum, const T* theta, const T* m, const T* gradient,
                T* __restrict__ theta_out, T* __restrict__ m_out) {
  for (int64_t i = 0; i < count; ++i) {
    const T value = averaged(m[i], gradient[i], momentum);
    m_out[i] = value;
    theta_out[i] = theta[i] - lr * value;
  }
}

template <class T>
void step(const UnrollStep& job, const void* theta, const void* m, const void* gradient, void* theta_out, void* m_out,
          int threads) {
  const T lr = *static_cast<const T*>(job.lr), momentum = static_cast<T>(job.momentum);
  const T *from = static_cast<const T*>(theta), *average = static_cast<const T*>(m),
          *g = static_cast<const T*>(gradient);
  T *to = static_cast<T*>(theta_out), *next = static_cast<T*>(m_out);
  each_chunk(job.P, threads, [&](int64_t, int64_t begin, int64_t end) {
    step_chunk(end - begin, lr, momentum, from + begin, average + begin, g + begin, to + begin, next + begin);
  });
}

template <class T>
void adjoint(const UnrollStep& job, const void* d_theta, const void* d_m, const void* m, void* d_gradient,
             void* d_m_out, void* d_lr, double* partial, int threads) {
  const T lr = *static_cast<const T*>(job.lr), momentum = static_cast<T>(job.momentum);
  const T *p = static_cast<const T*>(d_theta), *before = static_cast<const T*>(d_m),
          *average = static_cast<const T*>(m);
  T* __restrict__ slope = static_cast<T*>(d_gradient);
  T* __restrict__ next = static_cast<T*>(d_m_out);
  each_chunk(job.P, threads, [&](int64_t chunk, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const T q = before[i] - lr * p[i];
      slope[i] = (1 - momentum) * q;
      next[i] = momentum * q;
    }
    if (average) partial[chunk] = dot(p + begin, average + begin, end - begin);  // both still in the cache
  });
  if (!average) return;
  double sum = 0;
  for (int64_t chunk = 0; chunk < step_chunks(job.P); ++chunk) sum += partial[chunk];
  *static_cast<T*>(d_lr) = static_cast<T>(-sum);
}

}  // namespace

void unroll_step(const UnrollStep& job, const void* theta, const void* m, const void* gradient, void* theta_out,
                 void* m_out, int threads) {
  if (job.dtype == Dtype::float64) step<double>(job, theta, m, gradient, theta_out, m_out, threads);
  else step<float>(job, theta, m, gradient, theta_out, m_out, threads);
}

void unroll_step_adjoint(const UnrollStep& job, const void* d_theta, const void* d_m, const void* m, void* d_gradient,
                         void* d_m_out, void* d_lr, double* partial, int threads) {
  if (job.dtype == Dtype::float64) adjoint<double>(job, d_theta, d_m, m, d_gradient, d_m_out, d_lr, partial, threads);
  else adjoint<float>(job, d_theta, d_m, m, d_gradient, d_m_out, d_lr, partial, threads);
}

}  // namespace SPEEDK_ISA
}  // namespace speedk
