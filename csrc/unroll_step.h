// A step of SGD with an averaged gradient, and its adjoint: one pass over the parameters each.
#pragma once
#include <cstdint>

#include "isa.h"

namespace speedk {

// P parameters, float32 or float64; lr is one number of that type, on the device of the rest.
struct UnrollStep {
  Dtype dtype;
  int64_t P;
  const void* lr;
  double momentum;
};

// Parameters whose products make one partial sum of d_lr: the order of the sum depends on P alone.
constexpr int64_t kStepChunk = 4096;
inline int64_t step_chunks(int64_t P) { return (P + kStepChunk - 1) / kStepChunk; }

// m' = momentum m + (1 - momentum) gradient.
template <class T> SPEEDK_SHARED T averaged(T m, T gradient, T momentum) {
  return momentum * m + (1 - momentum) * gradient;
}

// theta_out = theta - lr m_out. All [P].
SPEEDK_DECLARE(void unroll_step(const UnrollStep& job, const void* theta, const void* m, const void* gradient,
                                void* theta_out, void* m_out, int threads))

// q = d_m - lr d_theta; d_gradient = (1 - momentum) q, d_m_out = momentum q, all [P]; d_lr = -<d_theta, m>, one number,
// by way of `partial`, double [step_chunks(P)]. m is that after the step; where it is null, d_lr is left alone.
SPEEDK_DECLARE(void unroll_step_adjoint(const UnrollStep& job, const void* d_theta, const void* d_m, const void* m,
                                        void* d_gradient, void* d_m_out, void* d_lr, double* partial, int threads))

#ifdef SPEEDK_CUDA
// The same on a GPU, on `stream`. They return a cudaError_t.
int unroll_step_cuda(const UnrollStep& job, const void* theta, const void* m, const void* gradient, void* theta_out,
                     void* m_out, void* stream);
int unroll_step_adjoint_cuda(const UnrollStep& job, const void* d_theta, const void* d_m, const void* m,
                             void* d_gradient, void* d_m_out, void* d_lr, double* partial, void* stream);
#endif

}  // namespace speedk
