// A row is small enough for the caches (16 to 256 KiB), so it is read from memory once and then passed over three
// times:
//   1. the maximum of each of G interleaved groups. The k-th largest of these maxima is a lower bound of the k-th
//      largest entry (k groups each hold an entry at least as large), and with G >= 4 k a close one;
//   2. the candidates: entries that reach the bound, about 1.1 k of them; the exact cut is found among these;
//   3. the result.
#include "topk.h"

#include "memory.h"
#include "parallel.h"

namespace speedk {
namespace SPEEDK_ISA {
namespace {

constexpr int kMaxGroups = 2048;
constexpr int kLanes = 16;

template <class Key> int32_t count_at_least(const Key* keys, int32_t n, Key bound) {
  int32_t count = 0;
  for (int32_t i = 0; i < n; ++i) count += keys[i] >= bound;
  return count;
}

template <class Key> Key bound_of(const Key* keys, int32_t n, int32_t k, Key low, Key high) {
  return speedk::bound_of(n, k, low, high, [&](Key bound) { return count_at_least(keys, n, bound); });
}

// Which of kLanes entries reach the bound, as bits.
template <class Key> inline uint32_t reaching(const Key* bits, Key bound) {
  uint32_t found = 0;
  for (int i = 0; i < kLanes; ++i) found |= static_cast<uint32_t>(magnitude_key(bits[i]) >= bound) << i;
  return found;
}
#if defined(__AVX512F__)
template <> inline uint32_t reaching<int32_t>(const int32_t* bits, int32_t bound) {
  const __m512i keys = _mm512_and_si512(_mm512_loadu_si512(bits), _mm512_set1_epi32(0x7FFFFFFF));
  return _mm512_cmpge_epi32_mask(keys, _mm512_set1_epi32(bound));
}
#elif defined(__AVX2__)
template <> inline uint32_t reaching<int32_t>(const int32_t* bits, int32_t bound) {
  const __m256i below = _mm256_set1_epi32(bound - 1), clear = _mm256_set1_epi32(0x7FFFFFFF);
  uint32_t found = 0;
  for (int half = 0; half < 2; ++half) {
    const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bits + 8 * half));
    const __m256i hit = _mm256_cmpgt_epi32(_mm256_and_si256(x, clear), below);
    found |= static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(hit))) << (8 * half);
  }
  return found;
}
#endif

// Per-thread memory for one row: its candidates, in order of position.
template <class Key> struct Candidates {
  Key* keys;
  int32_t* positions;
  int32_t count;
};

template <class Key> void gather(const Key* bits, int32_t n, Key bound, Candidates<Key>& found) {
  int32_t count = 0;
  int32_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (uint32_t hits = reaching(bits + i, bound); hits; hits &= hits - 1) {
      const int32_t position = i + __builtin_ctz(hits);
      found.keys[count] = magnitude_key(bits[position]);
      found.positions[count++] = position;
    }
  }
  for (; i < n; ++i) {
    if (magnitude_key(bits[i]) >= bound) {
      found.keys[count] = magnitude_key(bits[i]);
      found.positions[count++] = i;
    }
  }
  found.count = count;
}

// The slow way, for rows that hold a NaN and are to be ranked all the same.
template <class Key> void gather_ranked(const Key* bits, int32_t n, Key infinity, Candidates<Key>& found) {
  for (int32_t i = 0; i < n; ++i) {
    found.keys[i] = rank_key(bits[i], infinity);
    found.positions[i] = i;
  }
  found.count = n;
}

// Finds the cut of a row and leaves in `found` a superset of what is kept. Returns whether the row holds a NaN.
template <class Key>
bool cut_row(const Key* bits, int32_t n, int32_t k, Key infinity, Candidates<Key>& found, Cut<Key>* cut) {
  alignas(64) Key maxima[kMaxGroups];
  int32_t groups = 64;
  while (groups < 4 * k && groups < kMaxGroups) groups *= 2;
  const bool grouped = k <= groups / 2 && groups <= n / 2;
  if (!grouped) groups = 64;
  for (int32_t g = 0; g < groups; ++g) maxima[g] = 0;
  int32_t i = 0;
  for (; i + groups <= n; i += groups) {
    for (int32_t g = 0; g < groups; ++g) {
      const Key key = magnitude_key(bits[i + g]);
      maxima[g] = key > maxima[g] ? key : maxima[g];
    }
  }
  for (; i < n; ++i) {
    const Key key = magnitude_key(bits[i]);
    maxima[0] = key > maxima[0] ? key : maxima[0];
  }
  Key high = 0;
  for (int32_t g = 0; g < groups; ++g) high = maxima[g] > high ? maxima[g] : high;

  const bool nan = high > infinity;
  if (k == 0) {
    found.count = 0;
    *cut = {infinity, -1};
    return nan;
  }
  Key low = 0;
  if (nan) {
    gather_ranked(bits, n, infinity, found);
    low = -1;
    high = infinity;
  } else {
    if (grouped) low = bound_of(maxima, groups, k, Key{0}, high);
    gather(bits, n, low, found);
  }
  cut->key = bound_of(found.keys, found.count, k, low, high);
  cut->last = n;
  if (count_at_least(found.keys, found.count, cut->key) > k) {  // ties at the cut: the first ones are kept
    int32_t ties = k - count_at_least(found.keys, found.count, static_cast<Key>(cut->key + 1));
    for (int32_t c = 0; c < found.count && ties; ++c) {
      if (found.keys[c] == cut->key && --ties == 0) cut->last = found.positions[c];
    }
  }
  return nan;
}

// The kept entries of [begin, end) into `out`, zero elsewhere; `Out` is the storage type or bool.
template <class Out, class Key>
void select(const Key* bits, int32_t begin, int32_t end, Cut<Key> cut, Key infinity, bool nan, Out* out) {
  if (nan) {
    for (int32_t i = begin; i < end; ++i) {
      const bool kept = keeps(cut, rank_key(bits[i], infinity), i);
      out[i - begin] = static_cast<Out>(sizeof(Out) == 1 ? kept : kept ? bits[i] : 0);
    }
    return;
  }
  const int32_t tied = cut.last < begin ? begin : cut.last < end ? cut.last + 1 : end;
  for (int32_t i = begin; i < tied; ++i) {
    const bool kept = magnitude_key(bits[i]) >= cut.key;
    out[i - begin] = static_cast<Out>(sizeof(Out) == 1 ? kept : kept ? bits[i] : 0);
  }
  for (int32_t i = tied; i < end; ++i) {
    const bool kept = magnitude_key(bits[i]) > cut.key;
    out[i - begin] = static_cast<Out>(sizeof(Out) == 1 ? kept : kept ? bits[i] : 0);
  }
}

constexpr int32_t kPiece = 2048;

template <class Out, class Key>
void write_row(const Key* bits, int32_t n, Cut<Key> cut, Key infinity, bool nan, Out* out, bool stream) {
  alignas(64) Out piece[kPiece];
  for (int32_t begin = 0; begin < n; begin += kPiece) {
    const int32_t end = begin + kPiece < n ? begin + kPiece : n;
    select(bits, begin, end, cut, infinity, nan, piece);
    write_out(out + begin, piece, static_cast<int64_t>(end - begin) * static_cast<int64_t>(sizeof(Out)), stream);
  }
}

template <class Index, class Key>
void write_entries(const Key* bits, int32_t K, const Candidates<Key>& found, Cut<Key> cut, Key* values, Index* rows,
                   Index* cols) {
  int64_t kept = 0;
  for (int32_t c = 0; c < found.count; ++c) {
    const int32_t position = found.positions[c];
    if (!keeps(cut, found.keys[c], position)) continue;
    values[kept] = bits[position];
    rows[kept] = static_cast<Index>(position / K);
    cols[kept] = static_cast<Index>(position % K);
    ++kept;
  }
}

template <class Key> bool run(const Topk& job) {
  const auto n = static_cast<int32_t>(job.J * job.K);
  const auto k = static_cast<int32_t>(job.k);
  if (n == 0) return false;
  const Key infinity = infinity_key<Key>(job.dtype);
  const bool stream_dense = job.rows * n * static_cast<int64_t>(sizeof(Key)) > kStreamBytes;
  const bool stream_mask = job.rows * n > kStreamBytes;
  if (job.dense && stream_dense) prefer_large_pages(job.dense, job.rows * n * static_cast<int64_t>(sizeof(Key)));
  if (job.mask && stream_mask) prefer_large_pages(job.mask, job.rows * n);
  int nan_seen = 0;
  const int64_t grain = (int64_t{1} << 17) / (n * static_cast<int64_t>(sizeof(Key))) + 1;
  parallel_for(job.threads, job.rows, grain, [&](int64_t begin, int64_t end) {
    const Buffer<Key> keys(n);
    const Buffer<int32_t> positions(n);
    Candidates<Key> found{keys, positions, 0};
    for (int64_t row = begin; row < end; ++row) {
      const Key* bits = static_cast<const Key*>(job.scm) + row * n;
      Cut<Key> cut;
      const bool nan = cut_row(bits, n, k, infinity, found, &cut);
      if (nan) __atomic_store_n(&nan_seen, 1, __ATOMIC_RELAXED);
      if (job.dense) write_row(bits, n, cut, infinity, nan, static_cast<Key*>(job.dense) + row * n, stream_dense);
      if (job.mask) write_row(bits, n, cut, infinity, nan, reinterpret_cast<uint8_t*>(job.mask) + row * n, stream_mask);
      if (!job.values) continue;
      Key* values = static_cast<Key*>(job.values) + row * k;
      if (job.index_bytes == 1) {
        write_entries(bits, static_cast<int32_t>(job.K), found, cut, values,
                      static_cast<uint8_t*>(job.row_index) + row * k, static_cast<uint8_t*>(job.col_index) + row * k);
      } else {
        write_entries(bits, static_cast<int32_t>(job.K), found, cut, values,
                      static_cast<uint16_t*>(job.row_index) + row * k, static_cast<uint16_t*>(job.col_index) + row * k);
      }
    }
    finish_stream((job.dense && stream_dense) || (job.mask && stream_mask));
  });
  return nan_seen != 0;
}

}  // namespace

bool topk(const Topk& job) {
  switch (job.dtype) {
    case Dtype::float32: return run<int32_t>(job);
    case Dtype::float64: return run<int64_t>(job);
    default: return run<int16_t>(job);
  }
}

}  // namespace SPEEDK_ISA
}  // namespace speedk
