// topk for short rows: the steps of topk.cuh with the row in registers from the first to the second, so that memory is
// read once, and a bound that costs one barrier (docs/math/topk.md).
#pragma once
#include "topk.cuh"

namespace speedk {
namespace {

constexpr int kShortThreads = 256;
template <class Key> constexpr int kShortBlocks = sizeof(Key) == 4 ? 5 : 4;  // a fifth would spill at other sizes
// Of 16 bytes, how many a thread holds, so that a block holds a row of 4,096 entries or 16 KiB.
template <class Key, int threads> constexpr int kPacks = (sizeof(Key) == 2 ? 4 : 8) * 128 / threads;

// Whether short_topk_kernel takes the rows: they fit, and begin and end at multiples of 16 bytes.
template <class Key, int threads> bool is_short(const Topk& job) {
  const int64_t bytes = job.J * job.K * static_cast<int64_t>(sizeof(Key));
  const auto places = reinterpret_cast<uintptr_t>(job.scm) | reinterpret_cast<uintptr_t>(job.dense);
  return bytes <= 16 * threads * kPacks<Key, threads> && (bytes | static_cast<int64_t>(places)) % 16 == 0 &&
         job.k > 0 && job.k <= kBounded<threads>;
}

// The values of a warp, from the largest in its first lane down.
template <class T> __device__ __forceinline__ T sorted(T value) {
  const int lane = static_cast<int>(threadIdx.x % 32);
#pragma unroll
  for (int size = 2; size <= 32; size *= 2) {
#pragma unroll
    for (int step = size / 2; step > 0; step /= 2) {
      const T other = __shfl_xor_sync(0xFFFFFFFFu, value, step);
      const bool larger = ((lane & step) == 0) == ((lane & size) == 0);
      value = larger == (other > value) ? other : value;
    }
  }
  return value;
}

// Each of W warps sorts its threads' maxima; the least of their ceil(k / W)-th is a lower bound of the k-th largest
// entry.
template <class Key, class Index, int threads, int blocks>
__global__ void __launch_bounds__(threads, blocks) short_topk_kernel(const __grid_constant__ Topk job, int* nan) {
  using T = std::conditional_t<sizeof(Key) == 8, int64_t, int32_t>;
  constexpr int size = Pack<Key>::size, warps = threads / 32, packs = kPacks<Key, threads>;
  __shared__ Shared<Key, threads> shared;
  const int n = static_cast<int>(job.J * job.K), k = static_cast<int>(job.k), count = n / size;
  const int me = static_cast<int>(threadIdx.x), warp = me / 32, lane = me % 32;
  const int64_t row = blockIdx.x;
  const Key infinity = infinity_key<Key>(job.dtype);
  const Key* bits = static_cast<const Key*>(job.scm) + row * n;

  Pack<Key> mine[packs];
#pragma unroll
  for (int p = 0; p < packs; ++p) {
    if (p * threads + me < count) mine[p] = reinterpret_cast<const Pack<Key>*>(bits)[p * threads + me];
  }
  if (job.dense) {  // while the row is on its way
    auto* to = reinterpret_cast<Pack<Key>*>(static_cast<Key*>(job.dense) + row * n);
#pragma unroll
    for (int p = 0; p < packs; ++p) {
      if (p * threads + me < count) to[p * threads + me] = Pack<Key>{};
    }
  }
  if (job.mask) clear<threads, false>(job.mask + row * n, n);
  if (me == 0) shared.count = shared.kept_count = 0;
  const auto each = [&](auto&& do_with) {  // (number, bits) of what this thread holds
#pragma unroll
    for (int p = 0; p < packs; ++p) {
      if (p * threads + me >= count) break;
#pragma unroll
      for (int e = 0; e < size; ++e) do_with(size * p + e, mine[p].keys[e]);
    }
  };

  T top = -1;
  each([&](int, Key value) {
    const T key = magnitude_key(value);
    top = key > top ? key : top;
  });
  top = sorted(top);
  if (lane == 0) shared.top[warp] = static_cast<Key>(top);
  if (lane == (k + warps - 1) / warps - 1) shared.bound[warp] = static_cast<Key>(top);
  __syncthreads();
  T low = shared.bound[0], high = shared.top[0];
#pragma unroll
  for (int w = 1; w < warps; ++w) {
    low = shared.bound[w] < low ? shared.bound[w] : low;
    high = shared.top[w] > high ? shared.top[w] : high;
  }
  const bool bad = high > infinity;
  if (bad && nan && me == 0) *nan = 1;  // every block writes the same

  // Which of this thread's entries are candidates, a bit each. The sign is shifted out here, not masked: of the same
  // expression the compiler would keep a second copy of the row from above.
  uint32_t reach = 0;
  constexpr int shift = 8 * static_cast<int>(sizeof(T) - sizeof(Key)) + 1;
  const auto bound = static_cast<Unsigned<Key>>(low > 0 ? low : 0) << shift;
  each([&](int i, Key value) {
    if (static_cast<Unsigned<Key>>(value) << shift >= bound) reach |= 1u << i;
  });
  const int hits = __popc(reach);
  int at = hits;  // an inclusive sum over the warp, and then where this thread's candidates go
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int other = __shfl_up_sync(0xFFFFFFFFu, at, step);
    at += lane >= step ? other : 0;
  }
  int begin = lane == 31 ? atomicAdd(&shared.count, at) : 0;
  begin = __shfl_sync(0xFFFFFFFFu, begin, 31);
  at += begin - hits;
  for (; reach && at < kCandidates; reach &= reach - 1) {  // few: read again what registers cannot be asked for
    const int i = __ffs(static_cast<int>(reach)) - 1;
    const int position = size * (i / size * threads + me) + i % size;
    shared.candidates[at++] = word_of(bits[position], position);
  }
  __syncthreads();
  if (!bad && shared.count <= kCandidates) return keep_candidates<Key, Index, threads>(job, row, shared);
  __syncthreads();  // all have read the count, and nobody reads candidates
  keep_by_digits<Key, Index, threads>(job, row, infinity, shared);
}

}  // namespace
}  // namespace speedk
