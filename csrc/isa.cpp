#include "isa.h"

#include <atomic>
#include <cstdlib>
#include <cstring>

#if defined(SPEEDK_KNOWS_AMX) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

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

namespace {

// Linux hands the unit's registers, 8 KiB a thread, to those processes that ask.
bool has_matrix_unit() {
#if defined(SPEEDK_KNOWS_AMX) && defined(__linux__)
  constexpr unsigned bfloat16 = 1u << 22, tiles = 1u << 24;
  constexpr long ask_for = 0x1023, tile_data = 18;
  unsigned a = 0, b = 0, c = 0, d = 0;
  return isa() == 2 && __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & bfloat16) && (d & tiles) &&
         syscall(SYS_arch_prctl, ask_for, tile_data) == 0;
#else
  return false;
#endif
}

std::atomic<bool> matrix_unit_wanted{[] {
  const char* said = std::getenv("SPEEDK_AMX");
  return !said || std::strcmp(said, "0") != 0;
}()};

}  // namespace

bool matrix_unit() {
  if (!matrix_unit_wanted) return false;  // and the system is not asked: the process's signal stacks stay small
  static const bool found = has_matrix_unit();
  return found;
}

bool use_matrix_unit(bool wanted) {
  matrix_unit_wanted = wanted;
  return matrix_unit();
}

const char* isa_name() {
  constexpr const char* names[] = {"baseline", "avx2", "avx512"};
  return matrix_unit() ? "avx512 and amx" : names[isa()];
}

}  // namespace speedk
