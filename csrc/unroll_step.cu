// A block takes one chunk, so that the partial sums of d_lr are those of the shape, not of the GPU.
#include "unroll_step.h"

namespace speedk {
namespace {

constexpr int kThreads = 256;
static_assert(kStepChunk % kThreads == 0, "every thread of a block takes as many parameters");

template <class T>
__global__ void __launch_bounds__(kThreads)
step_kernel(int64_t P, const T* lr, T momentum, const T* theta, const T* m, const T* gradient, T* theta_out, T* m_out) {
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * kStepChunk;
  for (int64_t i = begin + threadIdx.x; i < begin + kStepChunk && i < P; i += kThreads) {
    const T value = averaged(m[i], gradient[i], momentum);
    m_out[i] = value;
    theta_out[i] = theta[i] - *lr * value;
  }
}

// The sum of one value a thread, in a tree: the same order every time. For thread 0.
__device__ double block_sum(double value) {
  __shared__ double values[kThreads];
  values[threadIdx.x] = value;
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) values[threadIdx.x] += values[threadIdx.x + half];
  }
  return values[0];
}

template <class T>
__global__ void __launch_bounds__(kThreads)
adjoint_kernel(int64_t P, const T* lr, T momentum, const T* d_theta, const T* d_m, const T* m, T* d_gradient,
               T* d_m_out, double* partial) {
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * kStepChunk;
  double sum = 0;
  for (int64_t i = begin + threadIdx.x; i < begin + kStepChunk && i < P; i += kThreads) {
    const T p = d_theta[i], q = d_m[i] - *lr * p;
    if (m) sum += static_cast<double>(p) * m[i];
    d_gradient[i] = (1 - momentum) * q;
    d_m_out[i] = momentum * q;
  }
  if (!m) return;
  const double total = block_sum(sum);
  if (threadIdx.x == 0) partial[blockIdx.x] = total;
}

template <class T>
__global__ void __launch_bounds__(kThreads) total_kernel(int64_t chunks, const double* partial, T* d_lr) {
  double sum = 0;
  for (int64_t i = threadIdx.x; i < chunks; i += kThreads) sum += partial[i];
  const double total = block_sum(sum);
  if (threadIdx.x == 0) *d_lr = static_cast<T>(-total);
}

template <class T>
int step(const UnrollStep& job, const void* theta, const void* m, const void* gradient, void* theta_out, void* m_out,
         cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>(step_chunks(job.P));
  if (blocks == 0) return 0;
  step_kernel<T><<<blocks, kThreads, 0, stream>>>(
      job.P, static_cast<const T*>(job.lr), static_cast<T>(job.momentum), static_cast<const T*>(theta),
      static_cast<const T*>(m), static_cast<const T*>(gradient), static_cast<T*>(theta_out), static_cast<T*>(m_out));
  return static_cast<int>(cudaGetLastError());
}

template <class T>
int adjoint(const UnrollStep& job, const void* d_theta, const void* d_m, const void* m, void* d_gradient,
            void* d_m_out, void* d_lr, double* partial, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>(step_chunks(job.P));
  if (blocks)
    adjoint_kernel<T><<<blocks, kThreads, 0, stream>>>(
        job.P, static_cast<const T*>(job.lr), static_cast<T>(job.momentum), static_cast<const T*>(d_theta),
        static_cast<const T*>(d_m), static_cast<const T*>(m), static_cast<T*>(d_gradient), static_cast<T*>(d_m_out),
        partial);
  if (m) total_kernel<T><<<1, kThreads, 0, stream>>>(blocks, partial, static_cast<T*>(d_lr));
  return static_cast<int>(cudaGetLastError());
}

}  // namespace

int unroll_step_cuda(const UnrollStep& job, const void* theta, const void* m, const void* gradient, void* theta_out,
                     void* m_out, void* stream) {
  auto* on = static_cast<cudaStream_t>(stream);
  return job.dtype == Dtype::float64 ? step<double>(job, theta, m, gradient, theta_out, m_out, on)
                                     : step<float>(job, theta, m, gradient, theta_out, m_out, on);
}

int unroll_step_adjoint_cuda(const UnrollStep& job, const void* d_theta, const void* d_m, const void* m,
                             void* d_gradient, void* d_m_out, void* d_lr, double* partial, void* stream) {
  auto* on = static_cast<cudaStream_t>(stream);
  return job.dtype == Dtype::float64
             ? adjoint<double>(job, d_theta, d_m, m, d_gradient, d_m_out, d_lr, partial, on)
             : adjoint<float>(job, d_theta, d_m, m, d_gradient, d_m_out, d_lr, partial, on);
}

}  // namespace speedk
