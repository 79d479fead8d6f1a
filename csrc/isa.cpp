#include "isa.h"

namespace speedk {

int isa() {
#if defined(SPEEDK_X86)
  static const int found = [] {
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl"))
      return 2;
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2") ? 1 : 0;
  }();
  return found;
#else
  return 0;
#endif
}

const char* isa_name() {
  constexpr const char* names[] = {"baseline", "avx2", "avx512"};
  return names[isa()];
}

}  // namespace speedk
