// The GPU's topk: one thread block takes one row from end to end, with the order and the cut of topk.h.
//   1. The largest entry of each thread's share. The k-th largest of these is a lower bound of the k-th largest entry,
//      as k shares each hold an entry at least as large, and with few k to the threads a close one.
//   2. The candidates: entries that reach the bound. They are gathered in shared memory, and the exact cut is found
//      among them.
//   3. The results: zeros, and then the candidates that are kept.
// So a row is read twice, and nothing is done to most entries but to compare them (docs/math/topk.md). What this does
// not suit - a NaN, many k, more candidates than there is room for - goes through the row digit by digit. Nothing
// depends on the order in which threads run: equal inputs give equal bits. Without a launch in it, so that a test can
// compile this file for the CPU and run it there.
#pragma once
#include "topk.h"

#include <type_traits>

namespace speedk {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;
constexpr int kDigitBits = 11;
constexpr int kDigits = 1 << kDigitBits;
constexpr int kCandidates = 2 * kThreads;
constexpr int kBounded = kThreads / 4 * 3;  // the largest k for which the bound is close enough to be tried
constexpr int kBlocks = 3;  // of a multiprocessor: what they load at a time, 16 bytes a thread, keeps the memory busy

template <class Key> struct Shared {
  union {
    int counts[kDigits];
    struct {
      Key bits[kCandidates];
      int position[kCandidates];
    } candidates;
  };
  int warps[kWarps];
  int found[2];
  int count;
};

template <class Key> struct alignas(16) Pack {
  static constexpr int size = 16 / static_cast<int>(sizeof(Key));
  Key keys[size];
};

__device__ __forceinline__ int lead_of(const void* address, int64_t bytes) {
  const int64_t lead = (16 - static_cast<int64_t>(reinterpret_cast<uintptr_t>(address) % 16)) % 16;
  return static_cast<int>(lead < bytes ? lead : bytes);
}

// each(position, bits) for this thread's share of a row, in packs of 16 bytes but at the ends; from the last pack to
// the first with `backwards`.
template <bool backwards, class Key, class F>
__device__ __forceinline__ void each_of_share(const Key* bits, int n, F&& each) {
  constexpr int size = Pack<Key>::size;
  const int lead = lead_of(bits, int64_t{n} * static_cast<int64_t>(sizeof(Key))) / static_cast<int>(sizeof(Key));
  const int packs = (n - lead) / size, tail = lead + packs * size;
  const auto* from = reinterpret_cast<const Pack<Key>*>(bits + lead);
  const int me = static_cast<int>(threadIdx.x);
  for (int i = me; i < packs; i += kThreads) {
    const int at = backwards ? packs - 1 - i : i;
    const Pack<Key> pack = from[at];
#pragma unroll
    for (int e = 0; e < size; ++e) each(lead + size * at + e, pack.keys[e]);
  }
  if (me < lead) each(me, bits[me]);
  if (tail + me < n) each(tail + me, bits[tail + me]);
}

// Zeros, by all threads of the block.
__device__ void clear(void* target, int64_t bytes) {
  auto* to = static_cast<char*>(target);
  const int lead = lead_of(to, bytes);
  const int64_t packs = (bytes - lead) / 16, tail = lead + 16 * packs;
  for (int64_t i = threadIdx.x; i < packs; i += kThreads) reinterpret_cast<Pack<char>*>(to + lead)[i] = Pack<char>{};
  if (static_cast<int>(threadIdx.x) < lead) to[threadIdx.x] = 0;
  if (tail + threadIdx.x < bytes) to[tail + threadIdx.x] = 0;
}

template <class Key> using Unsigned = std::conditional_t<sizeof(Key) == 8, uint64_t, uint32_t>;

// Keys as unsigned numbers: NaN is 0, every number is above it.
template <class Key> __device__ Unsigned<Key> ordered(Key bits, Key infinity) {
  return static_cast<Unsigned<Key>>(static_cast<int64_t>(rank_key(bits, infinity)) + 1);
}

// How many threads before this one raise `flag`, and how many do in all. Every thread of the block takes part.
__device__ int count_before(bool flag, int* warps, int* total) {
  const unsigned ballot = __ballot_sync(0xFFFFFFFFu, flag);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  __syncthreads();  // the counts of the call before have been read
  if (lane == 0) warps[warp] = __popc(ballot);
  __syncthreads();
  int before = __popc(ballot & ((1u << lane) - 1));
  int sum = 0;
  for (int w = 0; w < kWarps; ++w) {
    before += w < warp ? warps[w] : 0;
    sum += warps[w];
  }
  *total = sum;
  return before;
}

// The highest digit d such that at least `wanted` counted keys have digit d or above; takes off `wanted` those above d.
// `counts` is [kDigits] in shared memory, `found` two shared ints.
__device__ int pick_digit(const int* counts, int* warps, int* found, int* wanted) {
  constexpr int each = kDigits / kThreads;
  const int high = kDigits - 1 - each * static_cast<int>(threadIdx.x);  // this thread's digits: high, high - 1, ...
  int own = 0;
  for (int i = 0; i < each; ++i) own += counts[high - i];
  int above = own;  // an inclusive sum over the threads of a warp, then over the warps
  for (int step = 1; step < 32; step *= 2) {
    const int other = __shfl_up_sync(0xFFFFFFFFu, above, step);
    if (threadIdx.x % 32 >= step) above += other;
  }
  if (threadIdx.x % 32 == 31) warps[threadIdx.x / 32] = above;
  __syncthreads();
  for (int w = 0; w < static_cast<int>(threadIdx.x) / 32; ++w) above += warps[w];
  above -= own;
  for (int i = 0; i < each; ++i) {
    const int next = above + counts[high - i];
    if (above < *wanted && *wanted <= next) {
      found[0] = high - i;
      found[1] = *wanted - above;
    }
    above = next;
  }
  __syncthreads();
  *wanted = found[1];
  return found[0];
}

// The cut, kDigitBits of the key at a time: each pass counts the digits of the keys that agree with what is known of
// it. Where more entries equal the cut than may be kept, one more finds the position of the last one that is.
template <class Key>
__device__ Cut<Key> cut_by_digits(const Key* bits, int n, int k, Key infinity, Shared<Key>& shared) {
  int *counts = shared.counts, *warps = shared.warps, *found = shared.found;
  constexpr int key_bits = 8 * static_cast<int>(sizeof(Key)) - 1;
  constexpr int passes = (key_bits + kDigitBits - 1) / kDigitBits;
  Unsigned<Key> known = 0;  // the digits of the cut that are found, the rest zero
  int wanted = k, equal = 0;
  int shift = key_bits;
  for (int pass = 0; pass < passes; ++pass) {
    const int before = shift;  // bits from here up are known
    shift = before > kDigitBits ? before - kDigitBits : 0;
    for (int i = threadIdx.x; i < kDigits; i += kThreads) counts[i] = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < n; i += kThreads) {
      const Unsigned<Key> key = ordered(bits[i], infinity);
      if ((key >> before) == (known >> before)) atomicAdd(&counts[static_cast<int>(key >> shift) & (kDigits - 1)], 1);
    }
    __syncthreads();
    const int digit = pick_digit(counts, warps, found, &wanted);
    known |= static_cast<Unsigned<Key>>(digit) << shift;
    equal = counts[digit];
    __syncthreads();
  }
  Cut<Key> cut{static_cast<Key>(static_cast<int64_t>(known) - 1), n};
  if (equal == wanted) return cut;
  int seen = 0;
  for (int start = 0; start < n; start += kThreads) {
    const int i = start + static_cast<int>(threadIdx.x);
    const bool tie = i < n && ordered(bits[i], infinity) == known;
    int total;
    const int before = count_before(tie, warps, &total);
    if (tie && seen + before + 1 == wanted) found[0] = i;
    seen += total;
    if (seen >= wanted) break;  // the same for every thread
  }
  __syncthreads();
  cut.last = found[0];
  return cut;
}

template <class Key, class Index> __device__ void write_entry(const Topk& job, int64_t at, Key value, int position) {
  const int K = static_cast<int>(job.K);
  static_cast<Key*>(job.values)[at] = value;
  static_cast<Index*>(job.row_index)[at] = static_cast<Index>(position / K);
  static_cast<Index*>(job.col_index)[at] = static_cast<Index>(position % K);
}

// The results of a row by its candidates alone, `shared.count` entries with all k largest among them. They are few:
// each is compared with all others, and the one that k - 1 come before is the last that is kept.
template <class Key, class Index> __device__ void keep_candidates(const Topk& job, int64_t row, Shared<Key>& shared) {
  const int n = static_cast<int>(job.J * job.K), k = static_cast<int>(job.k), count = shared.count;
  const auto& all = shared.candidates;
  for (int c = threadIdx.x; c < count; c += kThreads) {
    const Cut<Key> own{magnitude_key(all.bits[c]), all.position[c]};
    int before = -1;  // it is kept itself where it is the cut
    for (int o = 0; o < count; ++o) before += keeps(own, magnitude_key(all.bits[o]), all.position[o]);
    if (before == k - 1) shared.found[0] = c;
  }
  __syncthreads();
  const int last = shared.found[0];
  const Cut<Key> cut{magnitude_key(all.bits[last]), all.position[last]};
  for (int c = threadIdx.x; c < count; c += kThreads) {
    const Key value = all.bits[c];
    const int position = all.position[c];
    if (!keeps(cut, magnitude_key(value), position)) continue;
    if (job.dense) static_cast<Key*>(job.dense)[row * n + position] = value;
    if (job.mask) job.mask[row * n + position] = true;
    if (!job.values) continue;
    int before = 0;
    for (int o = 0; o < count; ++o) {
      before += all.position[o] < position && keeps(cut, magnitude_key(all.bits[o]), all.position[o]);
    }
    write_entry<Key, Index>(job, row * k + before, value, position);
  }
}

// The results of a row by its cut, entry by entry.
template <class Key, class Index>
__device__ void keep_by_cut(const Topk& job, int64_t row, Cut<Key> cut, Key infinity, int* warps) {
  const int n = static_cast<int>(job.J * job.K), k = static_cast<int>(job.k);
  const Key* bits = static_cast<const Key*>(job.scm) + row * n;
  int written = 0;
  for (int start = 0; start < n; start += kThreads) {
    const int i = start + static_cast<int>(threadIdx.x);
    const Key value = i < n ? bits[i] : Key{0};
    const bool kept = i < n && keeps(cut, rank_key(value, infinity), i);
    if (i < n && job.dense) static_cast<Key*>(job.dense)[row * n + i] = kept ? value : Key{0};
    if (i < n && job.mask) job.mask[row * n + i] = kept;
    if (!job.values) continue;
    int total;
    const int before = count_before(kept, warps, &total);
    if (kept) write_entry<Key, Index>(job, row * k + written + before, value, i);
    written += total;
  }
}

template <class Key, class Index> __global__ void __launch_bounds__(kThreads, kBlocks) topk_kernel(Topk job, int* nan) {
  __shared__ Shared<Key> shared;
  const int n = static_cast<int>(job.J * job.K), k = static_cast<int>(job.k);
  const int64_t row = blockIdx.x;
  const Key infinity = infinity_key<Key>(job.dtype);
  const Key* bits = static_cast<const Key*>(job.scm) + row * n;
  Key top = -1;
  each_of_share<false>(bits, n, [&](int, Key value) {
    const Key key = magnitude_key(value);
    top = key > top ? key : top;
  });
  if (threadIdx.x == 0) shared.count = 0;
  const bool bad = __syncthreads_or(top > infinity);
  if (bad && threadIdx.x == 0) *nan = 1;  // every block writes the same
  if (!bad && k > 0 && k <= kBounded) {
    // Of the threads' maxima, one each: all of the block take part.
    const Key low = bound_of(0, k, Key{-1}, infinity, [top](Key bound) { return __syncthreads_count(top >= bound); });
    // Backwards, as what was read last is in the caches still.
    each_of_share<true>(bits, n, [&](int position, Key value) {
      if (magnitude_key(value) < low) return;
      const int at = atomicAdd(&shared.count, 1);
      if (at >= kCandidates) return;
      shared.candidates.bits[at] = value;
      shared.candidates.position[at] = position;
    });
    if (job.dense) clear(static_cast<Key*>(job.dense) + row * n, int64_t{n} * static_cast<int64_t>(sizeof(Key)));
    if (job.mask) clear(job.mask + row * n, n);
    __syncthreads();
    if (shared.count <= kCandidates) return keep_candidates<Key, Index>(job, row, shared);
    __syncthreads();  // all have read the count, and nobody reads candidates
  }
  const Cut<Key> cut = k ? cut_by_digits(bits, n, k, infinity, shared) : Cut<Key>{infinity, -1};
  keep_by_cut<Key, Index>(job, row, cut, infinity, shared.warps);
}

}  // namespace
}  // namespace speedk
