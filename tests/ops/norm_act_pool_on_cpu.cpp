#include "cuda_on_cpu.h"

#include "norm_act_pool.cuh"

using namespace speedk;

namespace {

template <class T> bool run(const NormActPool& job, int pass, const NormActPoolSecond& second, void** tensors) {
  return with_team(job, [&](auto team) {
    using Team = decltype(team);
    return emulated::run(team.blocks(job), 32, kTeamRows, [&] {
      if (pass == 0) forward_kernel<T, Team>(job, tensors[0], tensors[1], tensors[2]);
      if (pass == 1)
        backward_kernel<T, Team>(job, tensors[0], tensors[1], tensors[2], tensors[3], tensors[4], tensors[5]);
      if (pass == 2) double_backward_kernel<T, Team>(job, second);
    });
  });
}

}  // namespace

// pass: 0 forward, 1 backward, 2 double backward, with the pointers in the order of the launchers.
extern "C" bool norm_act_pool_on_cpu(int pass, int dtype, bool channels_last, const int64_t* shape, double eps,
                                     const void** inputs, void** t) {
  const NormActPool job{static_cast<Dtype>(dtype), channels_last, inputs[0], inputs[1], inputs[2],
                        shape[0], shape[1], shape[2], shape[3], eps};
  NormActPoolSecond second{};
  if (pass == 2) second = {t[0], t[1], t[2], t[3], t[4], t[5], t[6], t[7], t[8]};
  return dtype == 1 ? run<double>(job, pass, second, t) : run<float>(job, pass, second, t);
}
