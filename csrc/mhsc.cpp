#include "mhsc.h"

#include "amx.h"
#include "codes.h"
#include "gemm.h"
#include "memory.h"
#include "parallel.h"

namespace speedk {
namespace SPEEDK_ISA {
namespace {

constexpr int64_t kRows = 32;  // of codes, taken at a time: they stay in the first cache for both products

template <class Products> void forward(const Mhsc& s, void* to) {
  using T = typename Products::Value;
  auto* out = static_cast<T*>(to);
  const int64_t bytes = s.J * s.D * static_cast<int64_t>(sizeof(T));
  const Pools<Products> pools(s, false);
  const bool stream = s.N * bytes > kStreamBytes;
  if (stream) prefer_large_pages(out, s.N * bytes);
  parallel_for(s.threads, s.N, (int64_t{1} << 18) / (bytes + 1) + 1, [&](int64_t begin, int64_t end) {
    const Buffer<T> features(s.J * s.D);
    const Buffer<typename Products::Scratch> left(pools.left_room(kRows));
    const typename Products::Unit unit;
    for (int64_t n = begin; n < end; ++n) {
      for (int64_t j = 0; j < s.J; j += kRows) {
        pools.features(n, j, s.J - j < kRows ? s.J - j : kRows, features + j * s.D, s.D, left);
      }
      write_out(out + n * s.J * s.D, features, bytes, stream);
    }
    finish_stream(stream);
  });
}

template <class T> void backward(const Mhsc& s, const void* from, void* to_scm, void* to_saet, void* parts) {
  const auto* d_out = static_cast<const T*>(from);
  auto *d_scm = static_cast<T*>(to_scm), *d_saet = static_cast<T*>(to_saet), *partial = static_cast<T*>(parts);
  const int64_t d = s.D / s.H;
  const Pools<Vectors<T>> pools(s, true);
  const int64_t all = s.N * s.H * s.J * s.K * static_cast<int64_t>(sizeof(T));
  const bool stream = d_scm && all > kStreamBytes;
  if (stream) prefer_large_pages(d_scm, all);
  parallel_for(s.threads, kMhscParts * s.H, 1, [&](int64_t begin, int64_t end) {
    const Buffer<T> piece(kRows * s.K);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t part = task / s.H, h = task % s.H;
      T* sum = d_saet ? partial + part * s.K * s.D + h * s.K * d : nullptr;  // [H, K, d] within a part
      for (int64_t i = 0; sum && i < s.K * d; ++i) sum[i] = 0;
      for (int64_t n = s.N * part / kMhscParts; n < s.N * (part + 1) / kMhscParts; ++n) {
        for (int64_t j = 0; j < s.J; j += kRows) {
          pools.gradients(h, n, j, s.J - j < kRows ? s.J - j : kRows, d_out + (n * s.J + j) * s.D + h * d, s.D, d_scm,
                          sum, nullptr, nullptr, piece, stream);
        }
      }
    }
    finish_stream(stream);
  });
  for (int64_t k = 0; d_saet && k < s.K; ++k) {
    for (int64_t h = 0; h < s.H; ++h) {
      for (int64_t i = 0; i < d; ++i) {
        T sum = 0;
        for (int64_t part = 0; part < kMhscParts; ++part) {
          sum += partial[part * s.K * s.D + (h * s.K + k) * d + i];
        }
        d_saet[k * s.D + h * d + i] = sum;
      }
    }
  }
}

}  // namespace

void mhsc(const Mhsc& job, void* out) {
#ifdef SPEEDK_AMX
  // Of fewer tokens its forms cost more than its products save, as they do on the way back.
  if (job.dtype == Dtype::float32 && matrix_unit() && job.K >= 32) return forward<MatrixUnit>(job, out);
#endif
  if (job.dtype == Dtype::float32) forward<Vectors<float>>(job, out);
  else forward<Vectors<double>>(job, out);
}

void mhsc_backward(const Mhsc& job, const void* d_out, void* d_scm, void* d_saet, void* partial) {
  if (job.dtype == Dtype::float32) backward<float>(job, d_out, d_scm, d_saet, partial);
  else backward<double>(job, d_out, d_scm, d_saet, partial);
}

}  // namespace SPEEDK_ISA
}  // namespace speedk
