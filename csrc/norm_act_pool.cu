#include "norm_act_pool.cuh"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace speedk {
namespace {

// run(a T{}, a Team{}, blocks) for the job's dtype and layout; returns the launch's cudaError_t.
template <class F> int launch(const NormActPool& j, F&& run) {
  if (j.B * j.C == 0) return 0;
  const auto on = [&](auto type) {
    with_team(j, [&](auto team) { run(type, team, static_cast<unsigned>(team.blocks(j))); });
  };
  switch (j.dtype) {
    case Dtype::float32: on(float{}); break;
    case Dtype::float64: on(double{}); break;
    case Dtype::float16: on(__half{}); break;
    default: on(__nv_bfloat16{});
  }
  return static_cast<int>(cudaGetLastError());
}

constexpr dim3 kBlock{32, kTeamRows, 1};

}  // namespace

int norm_act_pool_cuda(const NormActPool& job, void* out, void* mean, void* rstd, void* stream) {
  return launch(job, [&](auto type, auto team, unsigned blocks) {
    forward_kernel<decltype(type), decltype(team)>
        <<<blocks, kBlock, 0, static_cast<cudaStream_t>(stream)>>>(job, out, mean, rstd);
  });
}

int norm_act_pool_backward_cuda(const NormActPool& job, const void* d_out, const void* mean, const void* rstd,
                                void* d_x, void* d_weight, void* d_bias, void* stream) {
  return launch(job, [&](auto type, auto team, unsigned blocks) {
    backward_kernel<decltype(type), decltype(team)>
        <<<blocks, kBlock, 0, static_cast<cudaStream_t>(stream)>>>(job, d_out, mean, rstd, d_x, d_weight, d_bias);
  });
}

int norm_act_pool_double_backward_cuda(const NormActPool& job, const NormActPoolSecond& second, void* stream) {
  return launch(job, [&](auto type, auto team, unsigned blocks) {
    double_backward_kernel<decltype(type), decltype(team)>
        <<<blocks, kBlock, 0, static_cast<cudaStream_t>(stream)>>>(job, second);
  });
}

}  // namespace speedk
