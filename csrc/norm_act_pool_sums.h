// Sums over a plane whose values lie side by side.
#pragma once
#include "norm_act_pool.h"
#include "simd.h"

namespace speedk {
namespace {

constexpr int64_t kLanes = 16;
constexpr int64_t kStrip = 512;  // values of a row that are worked on at a time
constexpr int kChains = 4;       // vectors of sums that are added to in turns, so that none waits for another

// Adds up f(i) over i: strips in kLanes sums each, which the compiler can vectorise, then the lanes in pairs. A fixed
// order, and short chains of roundings.
template <class T, class F> inline T sum_over(int64_t count, F&& f) {
  T total[kLanes] = {};
  for (int64_t begin = 0; begin < count; begin += kStrip) {
    const int64_t end = begin + kStrip < count ? begin + kStrip : count;
    T lanes[kLanes] = {};
    int64_t i = begin;
    for (; i + kLanes <= end; i += kLanes)
      for (int64_t l = 0; l < kLanes; ++l) lanes[l] += f(i + l);
    for (; i < end; ++i) lanes[i % kLanes] += f(i);
    for (int64_t l = 0; l < kLanes; ++l) total[l] += lanes[l];
  }
  for (int64_t half = kLanes / 2; half; half /= 2)
    for (int64_t l = 0; l < half; ++l) total[l] += total[l + half];
  return total[0];
}

// Several sums at once: add(sums, at) adds what belongs to one index, or to a vector of them, where at(values) are the
// `values` there. Inlined, as short planes then unroll.
template <template <class> class Sums, class T, class F> SPEEDK_SHARED Sums<T> sums_over(int64_t count, F&& add) {
  using V = Simd<T>;
  constexpr int64_t width = kWidth<T>;
  constexpr int numbers = sizeof(Sums<T>) / sizeof(T);  // a Sums is numbers alone
  Sums<V> total{};
  Sums<T> rest{}, result;
  int64_t i = 0;
  const auto vector = [&](const T* values) { return load<T>(values + i); };
  while (i + width <= count) {
    const int64_t end = i + kStrip < count ? i + kStrip : count;
    Sums<V> part[kChains] = {};
    while (i + kChains * width <= end)
      for (int c = 0; c < kChains; ++c, i += width) add(part[c], vector);
    for (; i + width <= end; i += width) add(part[0], vector);
    for (int c = 0; c < kChains; ++c) total += part[c];
  }
  for (; i < count; ++i) add(rest, [&](const T* values) { return values[i]; });
  V lanes[numbers];
  T sums[numbers];
  std::memcpy(lanes, &total, sizeof(total));
  for (int k = 0; k < numbers; ++k) sums[k] = sum_of<T>(lanes[k]);
  std::memcpy(&result, sums, sizeof(result));
  result += rest;
  return result;
}

}  // namespace
}  // namespace speedk
