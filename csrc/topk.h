// Eq. 6: the k entries of largest magnitude of each row (a row is one image and head, J K entries), ties to the lowest
// index. The order is that of `magnitude_key`, on the CPU and on the GPU alike.
#pragma once
#include <cstdint>

#include "isa.h"

namespace speedk {

// The most entries of a row: positions and counts are of 32 bits, and a step beyond the last stays so.
constexpr int64_t kMaxEntries = int64_t{1} << 30;

// What to compute for `rows` rows of J K contiguous entries. A null pointer means not wanted.
struct Topk {
  Dtype dtype;
  const void* scm;       // [rows, J, K]
  int64_t rows, J, K, k; // 0 <= k <= J K <= kMaxEntries
  void* dense;           // [rows, J, K] like scm: zero where not kept
  bool* mask;            // [rows, J, K]
  void* values;          // [rows, k]
  void* row_index;       // [rows, k], unsigned of index_bytes: below J
  void* col_index;       // [rows, k], unsigned of index_bytes: below K
  int index_bytes;       // 1 or 2
  int threads;           // CPU
};

// A signed integer per storage width: keys are never negative but for NaN, and signed comparisons are what SIMD has.
template <int bytes> struct KeyOf;
template <> struct KeyOf<2> { using type = int16_t; };
template <> struct KeyOf<4> { using type = int32_t; };
template <> struct KeyOf<8> { using type = int64_t; };

// |x| as an integer that orders like |x|: the bits without their sign.
template <class Key> SPEEDK_SHARED Key magnitude_key(Key bits) {
  return bits & static_cast<Key>(~(uint64_t{1} << (8 * sizeof(Key) - 1)));
}

// The key of infinity; every key above it is a NaN.
template <class Key> SPEEDK_SHARED Key infinity_key(Dtype dtype) {
  if constexpr (sizeof(Key) == 8) return Key{0x7FF0000000000000};
  else if constexpr (sizeof(Key) == 4) return Key{0x7F800000};
  else return dtype == Dtype::float16 ? Key{0x7C00} : Key{0x7F80};
}

// NaN ranks below every number: it is kept only where fewer than k numbers are there.
template <class Key> SPEEDK_SHARED Key rank_key(Key bits, Key infinity) {
  const Key key = magnitude_key(bits);
  return key > infinity ? Key{-1} : key;
}

// The largest b in [low, high] that at least k keys reach, given that k reach `low` and none is above `high`; stops
// early, at a smaller b, where exactly k reach it. reach(b) counts the keys that reach b; there are `count` in all, 0
// for unknown.
#if defined(__CUDACC__)
#pragma nv_exec_check_disable
#endif
template <class Key, class Reach> SPEEDK_SHARED Key bound_of(int32_t count, int32_t k, Key low, Key high, Reach reach) {
  while (low < high && count != k) {
    const Key middle = static_cast<Key>(low + (high - low) / 2 + ((high - low) & 1));
    const int32_t c = reach(middle);
    if (c >= k) {
      low = middle;
      count = c;
    } else {
      high = static_cast<Key>(middle - 1);
    }
  }
  return low;
}

// Which entries of a row are kept: those above `key`, and those equal to it up to and including position `last`.
template <class Key> struct Cut {
  Key key;
  int32_t last;
};
template <class Key> SPEEDK_SHARED bool keeps(Cut<Key> cut, Key key, int32_t position) {
  return key > cut.key || (key == cut.key && position <= cut.last);
}

// Returns whether a NaN was met.
SPEEDK_DECLARE(bool topk(const Topk& job))

#if defined(SPEEDK_CUDA)
// The same on `stream`; `nan` is a device flag that is raised where a NaN is met. Returns a cudaError_t.
int topk_cuda(const Topk& job, int* nan, void* stream);
#endif

}  // namespace speedk
