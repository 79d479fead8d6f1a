#include "coo.h"

#include <cstring>
#include <type_traits>

#include "memory.h"
#include "parallel.h"

namespace speedk {
namespace SPEEDK_ISA {
namespace {

// Pieces of about this many bytes of results, so that what a thread allocates is paid for.
constexpr int64_t kPieceBytes = int64_t{1} << 20;

int64_t grain_for(int64_t bytes) { return bytes > 0 && bytes < kPieceBytes ? kPieceBytes / bytes : 1; }

void raise(int* flag) { __atomic_store_n(flag, 1, __ATOMIC_RELAXED); }

// Calls `run` with the value and index types of the entries as two null pointers.
template <class F> void with_types(const Entries& e, F&& run) {
  if (e.dtype == Dtype::float32) {
    if (e.index_bytes == 1) run(static_cast<float*>(nullptr), static_cast<uint8_t*>(nullptr));
    else run(static_cast<float*>(nullptr), static_cast<uint16_t*>(nullptr));
  } else {
    if (e.index_bytes == 1) run(static_cast<double*>(nullptr), static_cast<uint8_t*>(nullptr));
    else run(static_cast<double*>(nullptr), static_cast<uint16_t*>(nullptr));
  }
}

template <class T, class Index> bool decode(const Entries& e, void* dense, int threads) {
  const int64_t size = e.J * e.K, bytes = size * static_cast<int64_t>(sizeof(T));
  const auto* values = static_cast<const T*>(e.values);
  const auto* rows = static_cast<const Index*>(e.rows);
  const auto* cols = static_cast<const Index*>(e.cols);
  const bool stream = e.matrices * bytes > kStreamBytes;
  if (stream) prefer_large_pages(dense, e.matrices * bytes);
  int bad = 0;
  parallel_for(threads, e.matrices, grain_for(bytes), [&](int64_t begin, int64_t end) {
    // A matrix is put together in the cache and written once; the buffer is zero again after each.
    const Buffer<T> matrix(size, true);
    for (int64_t m = begin; m < end; ++m) {
      for (int64_t i = m * e.k; i < (m + 1) * e.k; ++i) {
        if (rows[i] >= e.J || cols[i] >= e.K) raise(&bad);
        else matrix[rows[i] * e.K + cols[i]] += values[i];
      }
      write_out(static_cast<T*>(dense) + m * size, matrix, bytes, stream);
      for (int64_t i = m * e.k; i < (m + 1) * e.k; ++i) {
        if (rows[i] < e.J && cols[i] < e.K) matrix[rows[i] * e.K + cols[i]] = 0;
      }
    }
    finish_stream(stream);
  });
  return bad != 0;
}

template <class T, class Index> bool decode_backward(const Entries& e, const T* d_dense, T* d_values, int threads) {
  const auto* rows = static_cast<const Index*>(e.rows);
  const auto* cols = static_cast<const Index*>(e.cols);
  int bad = 0;
  parallel_for(threads, e.matrices, 64, [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m) {
      for (int64_t i = m * e.k; i < (m + 1) * e.k; ++i) {
        const bool inside = rows[i] < e.J && cols[i] < e.K;
        if (!inside) raise(&bad);
        d_values[i] = inside ? d_dense[(m * e.J + rows[i]) * e.K + cols[i]] : T{0};
      }
    }
  });
  return bad != 0;
}

// target += scale source over `width` values: a head of the recipes is 16, 24, 32, 48 or 64 wide.
template <class T> inline void accumulate(T* target, const T* source, T scale, int64_t width) {
  for (int64_t i = 0; i < width; ++i) target[i] += scale * source[i];
}

template <class T> inline T dot(const T* a, const T* b, int64_t width) {
  T lanes[8] = {};
  int64_t i = 0;
  for (; i + 8 <= width; i += 8) {
    for (int l = 0; l < 8; ++l) lanes[l] += a[i + l] * b[i + l];
  }
  for (; i < width; ++i) lanes[0] += a[i] * b[i];
  return ((lanes[0] + lanes[4]) + (lanes[1] + lanes[5])) + ((lanes[2] + lanes[6]) + (lanes[3] + lanes[7]));
}

template <class T, class Index, class Width>
bool combine(const Entries& e, const T* saet, int64_t H, int64_t D, T* out, int threads, Width width) {
  const auto* values = static_cast<const T*>(e.values);
  const auto* rows = static_cast<const Index*>(e.rows);
  const auto* cols = static_cast<const Index*>(e.cols);
  const int64_t images = H ? e.matrices / H : 0, size = e.J * D, bytes = size * static_cast<int64_t>(sizeof(T));
  const bool stream = images * bytes > kStreamBytes;
  if (stream) prefer_large_pages(out, images * bytes);
  int bad = 0;
  parallel_for(threads, images, grain_for(bytes), [&](int64_t begin, int64_t end) {
    const Buffer<T> features(size);
    for (int64_t n = begin; n < end; ++n) {
      std::memset(features, 0, static_cast<size_t>(bytes));
      for (int64_t h = 0; h < H; ++h) {
        const int64_t first = (n * H + h) * e.k;
        for (int64_t i = first; i < first + e.k; ++i) {
          if (rows[i] >= e.J || cols[i] >= e.K) raise(&bad);
          else accumulate(features + rows[i] * D + h * width, saet + cols[i] * D + h * width, values[i], width);
        }
      }
      write_out(out + n * size, features, bytes, stream);
    }
    finish_stream(stream);
  });
  return bad != 0;
}

template <class T, class Index>
bool combine_backward(const Entries& e, const T* saet, const T* d_out, int64_t H, int64_t D, T* d_values, T* d_saet,
                      T* partial, int threads) {
  const auto* values = static_cast<const T*>(e.values);
  const auto* rows = static_cast<const Index*>(e.rows);
  const auto* cols = static_cast<const Index*>(e.cols);
  const int64_t width = D / H, images = e.matrices / H;
  int bad = 0;
  parallel_for(threads, kParts * H, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t part = task / H, h = task % H;
      T* sum = d_saet ? partial + part * e.K * D + h * width : nullptr;
      if (sum) {
        for (int64_t c = 0; c < e.K; ++c) std::memset(sum + c * D, 0, static_cast<size_t>(width) * sizeof(T));
      }
      for (int64_t n = images * part / kParts; n < images * (part + 1) / kParts; ++n) {
        const int64_t first = (n * H + h) * e.k;
        for (int64_t i = first; i < first + e.k; ++i) {
          if (rows[i] >= e.J || cols[i] >= e.K) {
            raise(&bad);
            if (d_values) d_values[i] = 0;
            continue;
          }
          const T* gradient = d_out + (n * e.J + rows[i]) * D + h * width;
          if (d_values) d_values[i] = dot(gradient, saet + cols[i] * D + h * width, width);
          if (sum) accumulate(sum + cols[i] * D, gradient, values[i], width);
        }
      }
    }
  });
  if (d_saet) {
    parallel_for(threads, e.K, 8, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin * D; i < end * D; ++i) {
        T sum = 0;
        for (int64_t part = 0; part < kParts; ++part) sum += partial[part * e.K * D + i];
        d_saet[i] = sum;
      }
    });
  }
  return bad != 0;
}

}  // namespace

bool coo_decode(const Entries& e, void* dense, int threads) {
  bool bad = false;
  with_types(e, [&](auto* t, auto* i) {
    bad = decode<std::remove_pointer_t<decltype(t)>, std::remove_pointer_t<decltype(i)>>(e, dense, threads);
  });
  return bad;
}

bool coo_decode_backward(const Entries& e, const void* d_dense, void* d_values, int threads) {
  bool bad = false;
  with_types(e, [&](auto* t, auto* i) {
    using T = std::remove_pointer_t<decltype(t)>;
    bad = decode_backward<T, std::remove_pointer_t<decltype(i)>>(e, static_cast<const T*>(d_dense),
                                                                 static_cast<T*>(d_values), threads);
  });
  return bad;
}

bool mhsc_coo(const Entries& e, const void* saet, int64_t H, int64_t D, void* out, int threads) {
  bool bad = false;
  with_types(e, [&](auto* t, auto* i) {
    using T = std::remove_pointer_t<decltype(t)>;
    using Index = std::remove_pointer_t<decltype(i)>;
    auto run = [&](auto width) {
      bad = combine<T, Index>(e, static_cast<const T*>(saet), H, D, static_cast<T*>(out), threads, width);
    };
    switch (D / H) {  // the heads of the recipes, unrolled
      case 16: return run(Fixed<16>());
      case 32: return run(Fixed<32>());
      case 48: return run(Fixed<48>());
      case 64: return run(Fixed<64>());
      default: return run(D / H);
    }
  });
  return bad;
}

bool mhsc_coo_backward(const Entries& e, const void* saet, const void* d_out, int64_t H, int64_t D, void* d_values,
                       void* d_saet, void* partial, int threads) {
  bool bad = false;
  with_types(e, [&](auto* t, auto* i) {
    using T = std::remove_pointer_t<decltype(t)>;
    bad = combine_backward<T, std::remove_pointer_t<decltype(i)>>(
        e, static_cast<const T*>(saet), static_cast<const T*>(d_out), H, D, static_cast<T*>(d_values),
        static_cast<T*>(d_saet), static_cast<T*>(partial), threads);
  });
  return bad;
}

}  // namespace SPEEDK_ISA
}  // namespace speedk
