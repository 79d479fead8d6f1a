// The GPU's topk: one thread block takes one row from end to end, with the order and the cut of topk.h.
//   1. The largest entry of each thread's share. From these comes a lower bound of the k-th largest entry, which k
//      entries reach, or some more.
//   2. The candidates: entries that reach the bound. They are gathered in shared memory.
//   3. The results: zeros, and over them the candidates that fewer than k others come before.
// So a row is read twice, and nothing is done to most entries but to compare them (docs/math/topk.md); topk_short.cuh
// reads a short one once. What this does not suit - a NaN, many k, more candidates than there is room for - goes
// through the row digit by digit. Nothing depends on the order in which threads run: equal inputs give equal bits.
// Without a launch in it, so that a test can compile this file for the CPU and run it there.
#pragma once
#include "topk.h"

#include <cstring>
#include <type_traits>

namespace speedk {
namespace {

constexpr int kThreads = 1024;  // for a row of any length
constexpr int kBlocks = 1;      // of a multiprocessor: rows under way at once that the second-level cache holds
constexpr int kDigitBits = 11;
constexpr int kDigits = 1 << kDigitBits;
constexpr int kCandidates = 1024;
// The largest k whose bound is close enough: 3 in 4 threads reach it, and there is room for twice as many candidates.
template <int threads> constexpr int kBounded = threads / 4 * 3 < kCandidates / 2 ? threads / 4 * 3 : kCandidates / 2;

// An entry as a number that is larger the earlier it is kept: its key, then its position from the end, then its sign.
__extension__ typedef unsigned __int128 Wide;
template <class Key> using Word = std::conditional_t<sizeof(Key) == 8, Wide, uint64_t>;

template <class Key> __device__ __forceinline__ Word<Key> word_of(Key bits, int position) {
  const auto low = static_cast<uint32_t>(INT32_MAX - position) << 1 | static_cast<uint32_t>(bits < 0);
  return static_cast<Word<Key>>(magnitude_key(bits)) << 32 | low;
}
template <class W> __device__ int position_of(W word) {
  return INT32_MAX - static_cast<int>(static_cast<uint32_t>(word) >> 1);
}
template <class Key> __device__ Key bits_of(Word<Key> word) {
  const auto sign = static_cast<uint64_t>(word & 1) << (8 * sizeof(Key) - 1);
  return static_cast<Key>(static_cast<uint64_t>(word >> 32) | sign);
}

template <class Key, int threads> struct Shared {
  union {
    int counts[kDigits];
    Word<Key> candidates[kCandidates];
  };
  Word<Key> kept[kBounded<threads>];
  Key bound[threads / 32], top[threads / 32];
  int warps[threads / 32];
  int found[2];
  int count, kept_count;
};

template <class Key> struct alignas(16) Pack {
  static constexpr int size = 16 / static_cast<int>(sizeof(Key));
  Key keys[size];
};

// What is read for the last time: its lines leave the caches first.
template <class Key> __device__ __forceinline__ Pack<Key> fetch_once(const Pack<Key>* from) {
  const int4 raw = __ldcs(reinterpret_cast<const int4*>(from));
  Pack<Key> pack;
  memcpy(&pack, &raw, sizeof(pack));
  return pack;
}

__device__ __forceinline__ int lead_of(const void* address, int64_t bytes) {
  const int64_t lead = (16 - static_cast<int64_t>(reinterpret_cast<uintptr_t>(address) % 16)) % 16;
  return static_cast<int>(lead < bytes ? lead : bytes);
}

// each(position, bits) for this thread's share of a row, in packs of 16 bytes but at the ends. `again`, that is for the
// last time: from the last pack to the first, as what was read last is in the caches still.
template <int threads, bool again, class Key, class F>
__device__ __forceinline__ void each_of_share(const Key* bits, int n, F&& each) {
  constexpr int size = Pack<Key>::size;
  const int lead = lead_of(bits, int64_t{n} * static_cast<int64_t>(sizeof(Key))) / static_cast<int>(sizeof(Key));
  const int packs = (n - lead) / size, tail = lead + packs * size;
  const auto* from = reinterpret_cast<const Pack<Key>*>(bits + lead);
  const int me = static_cast<int>(threadIdx.x);
  for (int i = me; i < packs; i += threads) {
    const int at = again ? packs - 1 - i : i;
    const Pack<Key> pack = again ? fetch_once(from + at) : from[at];
#pragma unroll
    for (int e = 0; e < size; ++e) each(lead + size * at + e, pack.keys[e]);
  }
  if (me < lead) each(me, bits[me]);
  if (tail + me < n) each(tail + me, bits[tail + me]);
}

// Zeros, by all threads of the block; with `streaming` their lines leave the caches first.
template <int threads, bool streaming> __device__ void clear(void* target, int64_t bytes) {
  auto* to = static_cast<char*>(target);
  const int lead = lead_of(to, bytes);
  const int64_t packs = (bytes - lead) / 16, tail = lead + 16 * packs;
  auto* wide = reinterpret_cast<int4*>(to + lead);
  for (int64_t i = threadIdx.x; i < packs; i += threads) {
    if constexpr (streaming) __stcs(wide + i, int4{});
    else wide[i] = int4{};
  }
  if (static_cast<int>(threadIdx.x) < lead) to[threadIdx.x] = 0;
  if (tail + threadIdx.x < bytes) to[tail + threadIdx.x] = 0;
}

template <class Key> using Unsigned = std::conditional_t<sizeof(Key) == 8, uint64_t, uint32_t>;

// Keys as unsigned numbers: NaN is 0, every number is above it.
template <class Key> __device__ Unsigned<Key> ordered(Key bits, Key infinity) {
  return static_cast<Unsigned<Key>>(static_cast<int64_t>(rank_key(bits, infinity)) + 1);
}

// How many threads before this one raise `flag`, and how many do in all. Every thread of the block takes part.
template <int threads> __device__ int count_before(bool flag, int* warps, int* total) {
  const unsigned ballot = __ballot_sync(0xFFFFFFFFu, flag);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  __syncthreads();  // the counts of the call before have been read
  if (lane == 0) warps[warp] = __popc(ballot);
  __syncthreads();
  int before = __popc(ballot & ((1u << lane) - 1));
  int sum = 0;
  for (int w = 0; w < threads / 32; ++w) {
    before += w < warp ? warps[w] : 0;
    sum += warps[w];
  }
  *total = sum;
  return before;
}

// The highest digit d such that at least `wanted` counted keys have digit d or above; takes off `wanted` those above d.
// `counts` is [kDigits] in shared memory, `found` two shared ints.
template <int threads> __device__ int pick_digit(const int* counts, int* warps, int* found, int* wanted) {
  constexpr int each = kDigits / threads;
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
template <int threads, class Key>
__device__ Cut<Key> cut_by_digits(const Key* bits, int n, int k, Key infinity, Shared<Key, threads>& shared) {
  int *counts = shared.counts, *warps = shared.warps, *found = shared.found;
  constexpr int key_bits = 8 * static_cast<int>(sizeof(Key)) - 1;
  constexpr int passes = (key_bits + kDigitBits - 1) / kDigitBits;
  Unsigned<Key> known = 0;  // the digits of the cut that are found, the rest zero
  int wanted = k, equal = 0;
  int shift = key_bits;
  for (int pass = 0; pass < passes; ++pass) {
    const int before = shift;  // bits from here up are known
    shift = before > kDigitBits ? before - kDigitBits : 0;
    for (int i = threadIdx.x; i < kDigits; i += threads) counts[i] = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < n; i += threads) {
      const Unsigned<Key> key = ordered(bits[i], infinity);
      if ((key >> before) == (known >> before)) atomicAdd(&counts[static_cast<int>(key >> shift) & (kDigits - 1)], 1);
    }
    __syncthreads();
    const int digit = pick_digit<threads>(counts, warps, found, &wanted);
    known |= static_cast<Unsigned<Key>>(digit) << shift;
    equal = counts[digit];
    __syncthreads();
  }
  Cut<Key> cut{static_cast<Key>(static_cast<int64_t>(known) - 1), n};
  if (equal == wanted) return cut;
  int seen = 0;
  for (int start = 0; start < n; start += threads) {
    const int i = start + static_cast<int>(threadIdx.x);
    const bool tie = i < n && ordered(bits[i], infinity) == known;
    int total;
    const int before = count_before<threads>(tie, warps, &total);
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

// How many of `count` numbers are above `own`.
template <class T> __device__ __forceinline__ int above(const T* all, int count, T own) {
  int n = 0;
#pragma unroll 4
  for (int i = 0; i < count; ++i) n += all[i] > own;
  return n;
}

// The results of a row by its candidates alone, `shared.count` entries with all k largest among them. They are few:
// each is compared with all others, and kept where fewer than k come before it.
template <class Key, class Index, int threads>
__device__ void keep_candidates(const Topk& job, int64_t row, Shared<Key, threads>& shared) {
  const int n = static_cast<int>(job.J * job.K), k = static_cast<int>(job.k), count = shared.count;
  for (int c = threadIdx.x; c < count; c += threads) {
    const Word<Key> own = shared.candidates[c];
    if (above(shared.candidates, count, own) >= k) continue;
    const int position = position_of(own);
    if (job.dense) static_cast<Key*>(job.dense)[row * n + position] = bits_of<Key>(own);
    if (job.mask) job.mask[row * n + position] = true;
    if (job.values) shared.kept[atomicAdd(&shared.kept_count, 1)] = own;
  }
  if (!job.values) return;
  __syncthreads();
  for (int c = threadIdx.x; c < k; c += threads) {
    const Word<Key> own = shared.kept[c];
    int before = 0;
    for (int o = 0; o < k; ++o) before += static_cast<uint32_t>(shared.kept[o]) > static_cast<uint32_t>(own);
    write_entry<Key, Index>(job, row * k + before, bits_of<Key>(own), position_of(own));
  }
}

// The results of a row by its cut, entry by entry.
template <class Key, class Index, int threads>
__device__ void keep_by_cut(const Topk& job, int64_t row, Cut<Key> cut, Key infinity, int* warps) {
  const int n = static_cast<int>(job.J * job.K), k = static_cast<int>(job.k);
  const Key* bits = static_cast<const Key*>(job.scm) + row * n;
  int written = 0;
  for (int start = 0; start < n; start += threads) {
    const int i = start + static_cast<int>(threadIdx.x);
    const Key value = i < n ? bits[i] : Key{0};
    const bool kept = i < n && keeps(cut, rank_key(value, infinity), i);
    if (i < n && job.dense) static_cast<Key*>(job.dense)[row * n + i] = kept ? value : Key{0};
    if (i < n && job.mask) job.mask[row * n + i] = kept;
    if (!job.values) continue;
    int total;
    const int before = count_before<threads>(kept, warps, &total);
    if (kept) write_entry<Key, Index>(job, row * k + written + before, value, i);
    written += total;
  }
}

// The way that suits every row; a call, so that its registers are not those of the ways that are taken more often.
template <class Key, class Index, int threads>
__device__ __noinline__ void keep_by_digits(const Topk& job, int64_t row, Key infinity, Shared<Key, threads>& shared) {
  const int n = static_cast<int>(job.J * job.K), k = static_cast<int>(job.k);
  const Key* bits = static_cast<const Key*>(job.scm) + row * n;
  const Cut<Key> cut = k ? cut_by_digits<threads>(bits, n, k, infinity, shared) : Cut<Key>{infinity, -1};
  keep_by_cut<Key, Index, threads>(job, row, cut, infinity, shared.warps);
}

template <class Key, class Index, int threads, int blocks>
__global__ void __launch_bounds__(threads, blocks) topk_kernel(Topk job, int* nan) {
  __shared__ Shared<Key, threads> shared;
  const int n = static_cast<int>(job.J * job.K), k = static_cast<int>(job.k);
  const int64_t row = blockIdx.x;
  const Key infinity = infinity_key<Key>(job.dtype);
  const Key* bits = static_cast<const Key*>(job.scm) + row * n;
  Key top = -1;
  each_of_share<threads, false>(bits, n, [&](int, Key value) {
    const Key key = magnitude_key(value);
    top = key > top ? key : top;
  });
  if (threadIdx.x == 0) shared.count = shared.kept_count = 0;
  const bool bad = __syncthreads_or(top > infinity);
  if (bad && nan && threadIdx.x == 0) *nan = 1;  // every block writes the same
  if (!bad && k > 0 && k <= kBounded<threads>) {
    // Of the threads' maxima, one each: all of the block take part.
    const Key low = bound_of(0, k, Key{-1}, infinity, [top](Key bound) { return __syncthreads_count(top >= bound); });
    each_of_share<threads, true>(bits, n, [&](int position, Key value) {
      if (magnitude_key(value) < low) return;
      const int at = atomicAdd(&shared.count, 1);
      if (at < kCandidates) shared.candidates[at] = word_of(value, position);
    });
    if (job.dense) {
      constexpr auto size = static_cast<int64_t>(sizeof(Key));
      clear<threads, true>(static_cast<Key*>(job.dense) + row * n, n * size);
    }
    if (job.mask) clear<threads, true>(job.mask + row * n, n);
    __syncthreads();
    if (shared.count <= kCandidates) return keep_candidates<Key, Index, threads>(job, row, shared);
    __syncthreads();  // all have read the count, and nobody reads candidates
  }
  keep_by_digits<Key, Index, threads>(job, row, infinity, shared);
}

}  // namespace
}  // namespace speedk
