// One source, several instruction sets: CMake compiles each CPU file once per SPEEDK_ISA (baseline, avx2, avx512), and
// SPEEDK_CALL takes the widest that this processor runs. Everything in such a file lives in its own namespace, and
// calls nothing inline from the standard library, so that the linker can never hand wide instructions to an older
// processor.
#pragma once
#include <cstdint>

#if defined(__CUDACC__)
#define SPEEDK_SHARED __host__ __device__ __forceinline__
#else
#define SPEEDK_SHARED inline __attribute__((always_inline))
#endif

namespace speedk {

// Element types by their storage; the value is what Python passes.
enum class Dtype : int { float32 = 0, float64 = 1, float16 = 2, bfloat16 = 3 };

// A size known at compile time, where a function also takes one that is not.
template <int64_t value> struct Fixed {
  SPEEDK_SHARED constexpr operator int64_t() const { return value; }
};

// The widest of the compiled sets that this processor runs: 0 baseline, 1 avx2, 2 avx512.
int isa();
const char* isa_name();

// Compilers that know AMX.
#if defined(SPEEDK_X86) && (defined(__clang__) ? __clang_major__ >= 12 : defined(__GNUC__) && __GNUC__ >= 11)
#define SPEEDK_KNOWS_AMX
#endif

// Whether products of float32 may take the matrix unit (csrc/amx.h): the processor has one, the system lets this
// process use it, and it is wanted, as by default, unless SPEEDK_AMX is 0 in the environment.
bool matrix_unit();
// Wants it or not from here on, and returns what matrix_unit() then says.
bool use_matrix_unit(bool wanted);

#if defined(SPEEDK_X86)
#define SPEEDK_DECLARE(signature)   \
  namespace baseline { signature; } \
  namespace avx2 { signature; }     \
  namespace avx512 { signature; }
#define SPEEDK_CALL(function, ...)                     \
  (isa() == 2   ? avx512::function(__VA_ARGS__)        \
   : isa() == 1 ? avx2::function(__VA_ARGS__)          \
                : baseline::function(__VA_ARGS__))
#else
#define SPEEDK_DECLARE(signature) \
  namespace baseline { signature; }
#define SPEEDK_CALL(function, ...) (baseline::function(__VA_ARGS__))
#endif

}  // namespace speedk
