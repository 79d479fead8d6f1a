// The GPU's topk: one thread block takes one row from end to end, with the order and the cut of topk.h.
//   1. The cut: the k-th largest key, 11 bits at a time. Each pass counts, in shared memory, the digits of the keys that
//      agree with what is known of it; a row stays in the L2 cache between passes.
//   2. Where more entries equal the cut than may be kept, the position of the last one that is.
//   3. The results: coalesced, entries in order of position.
// Nothing depends on the order in which threads run: equal inputs give equal bits.
#include "topk.h"

#include <type_traits>

namespace speedk {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;
constexpr int kDigitBits = 11;
constexpr int kDigits = 1 << kDigitBits;

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

template <class Key> __device__ Cut<Key> find_cut(const Key* bits, int n, int k, Key infinity, int* shared) {
  int *counts = shared, *warps = shared + kDigits, *found = warps + kWarps;
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

template <class Key, class Index> __global__ void __launch_bounds__(kThreads) topk_kernel(Topk job, int* nan) {
  __shared__ int shared[kDigits + kWarps + 2];
  const int n = static_cast<int>(job.J * job.K), k = static_cast<int>(job.k), K = static_cast<int>(job.K);
  const int64_t row = blockIdx.x;
  const Key infinity = infinity_key<Key>(job.dtype);
  const Key* bits = static_cast<const Key*>(job.scm) + row * n;
  bool bad = false;
  for (int i = threadIdx.x; i < n; i += kThreads) bad |= magnitude_key(bits[i]) > infinity;
  if (__syncthreads_or(bad) && threadIdx.x == 0) *nan = 1;  // every block writes the same
  const Cut<Key> cut = k ? find_cut(bits, n, k, infinity, shared) : Cut<Key>{infinity, -1};
  int written = 0;
  for (int start = 0; start < n; start += kThreads) {
    const int i = start + static_cast<int>(threadIdx.x);
    const Key value = i < n ? bits[i] : Key{0};
    const bool kept = i < n && keeps(cut, rank_key(value, infinity), i);
    if (i < n && job.dense) static_cast<Key*>(job.dense)[row * n + i] = kept ? value : Key{0};
    if (i < n && job.mask) job.mask[row * n + i] = kept;
    if (!job.values) continue;
    int total;
    const int64_t at = row * k + written + count_before(kept, shared + kDigits, &total);
    if (kept) {
      static_cast<Key*>(job.values)[at] = value;
      static_cast<Index*>(job.row_index)[at] = static_cast<Index>(i / K);
      static_cast<Index*>(job.col_index)[at] = static_cast<Index>(i % K);
    }
    written += total;
  }
}

template <class Key> int launch(const Topk& job, int* nan, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>(job.rows);
  if (job.index_bytes == 2) topk_kernel<Key, uint16_t><<<blocks, kThreads, 0, stream>>>(job, nan);
  else topk_kernel<Key, uint8_t><<<blocks, kThreads, 0, stream>>>(job, nan);
  return static_cast<int>(cudaGetLastError());
}

}  // namespace

int topk_cuda(const Topk& job, int* nan, void* stream) {
  if (job.rows == 0 || job.J * job.K == 0) return 0;
  auto* on = static_cast<cudaStream_t>(stream);
  switch (job.dtype) {
    case Dtype::float32: return launch<int32_t>(job, nan, on);
    case Dtype::float64: return launch<int64_t>(job, nan, on);
    default: return launch<int16_t>(job, nan, on);
  }
}

}  // namespace speedk
