#include "mhsc.h"

#include "gemm.h"
#include "memory.h"
#include "parallel.h"

namespace speedk {
namespace SPEEDK_ISA {
namespace {

constexpr int64_t kRows = 32;  // of codes, taken at a time: they stay in the first cache for both products

template <class T> void forward(const Mhsc& s, T* out) {
  const auto* scm = static_cast<const T*>(s.scm);
  const auto* saet = static_cast<const T*>(s.saet);
  const int64_t d = s.D / s.H, bytes = s.J * s.D * static_cast<int64_t>(sizeof(T));
  // Heads apart, so that the rows of one head's tokens are neighbours and never compete for a cache set.
  const Buffer<T> pools(s.K * s.D);
  for (int64_t h = 0; h < s.H; ++h) {
    for (int64_t k = 0; k < s.K; ++k) {
      for (int64_t i = 0; i < d; ++i) pools[(h * s.K + k) * d + i] = saet[k * s.D + h * d + i];
    }
  }
  const bool stream = s.N * bytes > kStreamBytes;
  if (stream) prefer_large_pages(out, s.N * bytes);
  parallel_for(s.threads, s.N, (int64_t{1} << 18) / (bytes + 1) + 1, [&](int64_t begin, int64_t end) {
    const Buffer<T> features(s.J * s.D);
    for (int64_t n = begin; n < end; ++n) {
      for (int64_t h = 0; h < s.H; ++h) {
        gemm<false>(s.J, d, s.K, scm + (n * s.H + h) * s.J * s.K, s.K, 1, pools + h * s.K * d, d, features + h * d,
                    s.D);
      }
      write_out(out + n * s.J * s.D, features, bytes, stream);
    }
    finish_stream(stream);
  });
}

template <class T> void backward(const Mhsc& s, const T* d_out, T* d_scm, T* d_saet, T* partial) {
  const auto* scm = static_cast<const T*>(s.scm);
  const auto* saet = static_cast<const T*>(s.saet);
  const int64_t d = s.D / s.H, matrix = s.J * s.K;
  const Buffer<T> turned(s.K * s.D);  // [D, K]
  for (int64_t k = 0; k < s.K; ++k) {
    for (int64_t i = 0; i < s.D; ++i) turned[i * s.K + k] = saet[k * s.D + i];
  }
  const int64_t all = s.N * s.H * matrix * static_cast<int64_t>(sizeof(T));
  const bool stream = d_scm && all > kStreamBytes;
  if (stream) prefer_large_pages(d_scm, all);
  parallel_for(s.threads, kMhscParts * s.H, 1, [&](int64_t begin, int64_t end) {
    const Buffer<T> memory(kRows * s.K);
    T* const piece = memory;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t part = task / s.H, h = task % s.H;
      T* sum = d_saet ? partial + part * s.K * s.D + h * s.K * d : nullptr;  // [H, K, d] within a part
      for (int64_t i = 0; sum && i < s.K * d; ++i) sum[i] = 0;
      for (int64_t n = s.N * part / kMhscParts; n < s.N * (part + 1) / kMhscParts; ++n) {
        for (int64_t j = 0; j < s.J; j += kRows) {
          const int64_t rows = s.J - j < kRows ? s.J - j : kRows, at = (n * s.H + h) * matrix + j * s.K;
          const int64_t bytes = rows * s.K * static_cast<int64_t>(sizeof(T));
          const T* gradient = d_out + (n * s.J + j) * s.D + h * d;
          if (sum) prefetch(scm + at, bytes);  // read across its rows, which no processor foresees
          if (d_scm) {
            gemm<false>(rows, s.K, d, gradient, s.D, 1, turned + h * d * s.K, s.K, piece, s.K);
            write_out(d_scm + at, piece, bytes, stream);
          }
          if (sum) gemm<true>(s.K, d, rows, scm + at, 1, s.K, gradient, s.D, sum, d);
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
  if (job.dtype == Dtype::float32) forward(job, static_cast<float*>(out));
  else forward(job, static_cast<double*>(out));
}

void mhsc_backward(const Mhsc& job, const void* d_out, void* d_scm, void* d_saet, void* partial) {
  if (job.dtype == Dtype::float32) {
    backward(job, static_cast<const float*>(d_out), static_cast<float*>(d_scm), static_cast<float*>(d_saet),
             static_cast<float*>(partial));
  } else {
    backward(job, static_cast<const double*>(d_out), static_cast<double*>(d_scm), static_cast<double*>(d_saet),
             static_cast<double*>(partial));
  }
}

}  // namespace SPEEDK_ISA
}  // namespace speedk
