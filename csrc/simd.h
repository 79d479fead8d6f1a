// Vectors as wide as the instruction set, and the few functions on them that the decoder needs. In an unnamed
// namespace: every instruction set compiles its own.
#pragma once
#include <cstdint>
#include <cstring>

#include "isa.h"

namespace speedk {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <class T> struct SimdOf;
template <> struct SimdOf<float> {
  using Vec = float __attribute__((vector_size(kVectorBytes)));
  using Narrow = float __attribute__((vector_size(16)));
  using Unaligned = float __attribute__((vector_size(kVectorBytes), aligned(4), may_alias));
};
template <> struct SimdOf<double> {
  using Vec = double __attribute__((vector_size(kVectorBytes)));
  using Narrow = double __attribute__((vector_size(16)));
  using Unaligned = double __attribute__((vector_size(kVectorBytes), aligned(8), may_alias));
};
template <class T> using Simd = typename SimdOf<T>::Vec;
template <class T> constexpr int kWidth = kVectorBytes / static_cast<int>(sizeof(T));

template <class T> SPEEDK_SHARED Simd<T> load(const T* from) {
  return *reinterpret_cast<const typename SimdOf<T>::Unaligned*>(from);
}
template <class T> SPEEDK_SHARED void store(T* to, Simd<T> value) {
  *reinterpret_cast<typename SimdOf<T>::Unaligned*>(to) = value;
}
// The first `count` values, zeros behind them; only the first `count`.
template <class T> SPEEDK_SHARED Simd<T> load_some(const T* from, int64_t count) {
  Simd<T> value{};
  std::memcpy(&value, from, static_cast<size_t>(count) * sizeof(T));
  return value;
}
template <class T> SPEEDK_SHARED void store_some(T* to, Simd<T> value, int64_t count) {
  std::memcpy(to, &value, static_cast<size_t>(count) * sizeof(T));
}
// Less nothing, which compilers leave out: `0 + value` is no such thing, as it makes a zero of a negative zero.
template <class T> SPEEDK_SHARED Simd<T> spread(T value) { return value - Simd<T>{}; }
// Quarters first, and then what is left of them: a chain of single values would take four times as long.
template <class T> SPEEDK_SHARED T sum_of(Simd<T> v) {
  typename SimdOf<T>::Narrow parts[kVectorBytes / 16], sums{};
  std::memcpy(parts, &v, sizeof(v));
  for (int i = 0; i < kVectorBytes / 16; ++i) sums += parts[i];
  constexpr int left = 16 / static_cast<int>(sizeof(T));
  T sum = sums[0] + sums[left / 2];
  if constexpr (left == 4) sum += sums[1] + sums[3];
  return sum;
}

using Floats = Simd<float>;
using Ints = int32_t __attribute__((vector_size(kVectorBytes)));

// e^x for x <= 0, to 2 units in the last place: x = n ln 2 + r, a polynomial of degree 6 in r (minimax on
// [-ln 2 / 2, ln 2 / 2], relative error 3e-9). Below -87 it is 0, where float32 is about to underflow.
SPEEDK_SHARED Floats exp_negative(Floats x) {
  const Floats clamped = x < -87.0f ? spread(-87.0f) : x;
  const Floats magic = spread(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const Floats n = (clamped * 1.44269504f + magic) - magic;
  const Floats r = (clamped - n * 0.693359375f) - n * -2.12194440e-4f;
  Floats p = r * 0.00138146124f + 0.0083687099f;
  p = p * r + 0.0416683874f;
  p = p * r + 0.166665207f;
  p = p * r + 0.499999935f;
  p = (p * r + 1.0f) * r + 1.0f;
  const Ints scale = (__builtin_convertvector(n, Ints) + 127) << 23;
  return x < -87.0f ? Floats{} : p * (Floats)scale;
}

// erf(z), to 4e-7: z P(z^2) / Q(z^2), minimax on [-3.95, 3.95]; beyond that erf is +-1 to float32.
SPEEDK_SHARED Floats erf(Floats z) {
  z = z > 3.95f ? spread(3.95f) : z < -3.95f ? spread(-3.95f) : z;
  const Floats w = z * z;
  Floats p = w * 2.01164473e-06f + 0.000287579371f;
  p = p * w + 0.00391693117f;
  p = p * w + 0.0532058811f;
  p = p * w + 0.194028442f;
  p = p * w + 1.12837901f;
  Floats q = w * 3.7837559e-05f + 0.00119808234f;
  q = q * w + 0.0152699586f;
  q = q * w + 0.115587551f;
  q = q * w + 0.505284723f;
  q = q * w + 1.0f;
  return z * p / q;
}

// Phi(x); GELU is x Phi(x), and its derivative Phi(x) + x phi(x).
SPEEDK_SHARED Floats normal_cdf(Floats x) { return 0.5f * erf(x * 0.707106781f) + 0.5f; }
SPEEDK_SHARED Floats gelu_slope(Floats x, Floats cdf) { return cdf + x * (0.398942280f * exp_negative(-0.5f * x * x)); }

}  // namespace
}  // namespace speedk
