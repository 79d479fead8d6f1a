// Products of matrices that fit the caches: a token block by a weight, a head's codes by its tokens. One thread runs
// one product; the kernels are parallel over images.
#pragma once
#include "simd.h"

namespace speedk {
namespace {

// Three vectors of columns, and as many rows as the registers then hold sums of: 24 of 32, or 12 of 16, beside three
// vectors of B and one value of A.
#if defined(__AVX512F__)
constexpr int kTileRows = 8;
#else
constexpr int kTileRows = 4;
#endif

// rows x (columns vectors) of C, held in registers. `part` is how many values of the last vector count, 0 for all.
template <class T, int rows, int columns, bool add, bool partial>
SPEEDK_SHARED void tile(int64_t K, const T* A, int64_t am, int64_t ak, const T* B, int64_t ldb, T* C, int64_t ldc,
                        int64_t part, const T* bias) {
  constexpr int width = kWidth<T>;
  Simd<T> sum[rows][columns];
  for (int c = 0; c < columns; ++c) {
    const Simd<T> start = !bias ? Simd<T>{} : partial ? load_some(bias, part) : load(bias + c * width);
    for (int r = 0; r < rows; ++r) sum[r][c] = start;
  }
  for (int64_t k = 0; k < K; ++k) {
    Simd<T> b[columns];
    for (int c = 0; c < columns; ++c) {
      b[c] = partial ? load_some(B + k * ldb + c * width, part) : load(B + k * ldb + c * width);
    }
    for (int r = 0; r < rows; ++r) {
      const Simd<T> a = spread(A[r * am + k * ak]);
      for (int c = 0; c < columns; ++c) sum[r][c] += a * b[c];
    }
  }
  for (int r = 0; r < rows; ++r) {
    for (int c = 0; c < columns; ++c) {
      T* to = C + r * ldc + c * width;
      if (partial) {
        store_some(to, add ? load_some<T>(to, part) + sum[r][c] : sum[r][c], part);
      } else {
        store(to, add ? load<T>(to) + sum[r][c] : sum[r][c]);
      }
    }
  }
}

template <class T, int columns, bool add, bool partial>
void column_of_tiles(int64_t M, int64_t K, const T* A, int64_t am, int64_t ak, const T* B, int64_t ldb, T* C,
                     int64_t ldc, int64_t part, const T* bias) {
  int64_t m = 0;
  for (; m + kTileRows <= M; m += kTileRows) {
    tile<T, kTileRows, columns, add, partial>(K, A + m * am, am, ak, B, ldb, C + m * ldc, ldc, part, bias);
  }
  for (; m < M; ++m) tile<T, 1, columns, add, partial>(K, A + m * am, am, ak, B, ldb, C + m * ldc, ldc, part, bias);
}

// C [M, N] = A [M, K] B [K, N] + bias [N] where there is one, or += with `add`. A[m, k] lies at m am + k ak; B and C
// have rows of ldb and ldc.
template <bool add, class T>
void gemm(int64_t M, int64_t N, int64_t K, const T* A, int64_t am, int64_t ak, const T* B, int64_t ldb, T* C,
          int64_t ldc, const T* bias = nullptr) {
  constexpr int width = kWidth<T>;
  for (int64_t n = 0; n < N;) {
    const int64_t left = (N - n) / width;  // whole vectors; four are two and two
    const T* b = bias ? bias + n : nullptr;
    if (left >= 3 && left != 4) {
      column_of_tiles<T, 3, add, false>(M, K, A, am, ak, B + n, ldb, C + n, ldc, 0, b);
      n += 3 * width;
    } else if (left >= 2) {
      column_of_tiles<T, 2, add, false>(M, K, A, am, ak, B + n, ldb, C + n, ldc, 0, b);
      n += 2 * width;
    } else if (left) {
      column_of_tiles<T, 1, add, false>(M, K, A, am, ak, B + n, ldb, C + n, ldc, 0, b);
      n += width;
    } else {
      column_of_tiles<T, 1, add, true>(M, K, A, am, ak, B + n, ldb, C + n, ldc, N - n, b);
      n = N;
    }
  }
}

// The sides of a product, and the product, as kernels ask for them: here in the floating-point type itself, so that a
// side is where its matrix lies. csrc/amx.h has the same for a processor's matrix unit, which reads a form of its own.
template <class T> struct Vectors {
  using Value = T;
  using Scratch = T;
  struct Unit {
    ~Unit() {}  // used by being there
  };
  struct Left {
    const T* at;
    int64_t row, step, depth;
  };
  struct Right {
    const T* at;
    int64_t ld;
  };
  // How many of Scratch a side takes in its own form.
  static constexpr int64_t room(int64_t, int64_t) { return 0; }
  // Rows that are x's [rows, depth], or x's columns, x being [depth, columns].
  static Left rows(Scratch*, const T* x, int64_t ld, int64_t, int64_t depth) { return {x, ld, 1, depth}; }
  static Left columns(Scratch*, const T* x, int64_t ld, int64_t depth, int64_t) { return {x, 1, ld, depth}; }
  // x [depth, columns]
  static Right right(Scratch*, const T* x, int64_t ld, int64_t, int64_t) { return {x, ld}; }
  // C [M, N] = left right + bias [N] where there is one, or C += left right.
  static void multiply(int64_t M, int64_t N, const Left& left, const Right& right, T* C, int64_t ldc,
                       const T* bias = nullptr) {
    gemm<false>(M, N, left.depth, left.at, left.row, left.step, right.at, right.ld, C, ldc, bias);
  }
  static void add_product(int64_t M, int64_t N, const Left& left, const Right& right, T* C, int64_t ldc) {
    gemm<true>(M, N, left.depth, left.at, left.row, left.step, right.at, right.ld, C, ldc);
  }
};

}  // namespace
}  // namespace speedk
