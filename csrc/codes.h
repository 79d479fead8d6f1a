// Eq. 3 for a few rows of an image's codes at a time, as `mhsc` and the decoder take them.
#pragma once
#include <cstdint>

#include "memory.h"
#include "mhsc.h"

namespace speedk {
namespace {

inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// The SAETs as products read them: head by head, so that the rows of one head's tokens are neighbours and never compete
// for a cache set. `Products` is Vectors<T> of csrc/gemm.h, or MatrixUnit of csrc/amx.h. Its functions need scratch of
// `left` and `right` for as many rows as they are given.
template <class Products> class Pools {
  using T = typename Products::Value;
  using Scratch = typename Products::Scratch;

 public:
  // backward: for `gradients`, too.
  Pools(const Mhsc& codes, bool backward)
      : s(codes), d(s.H ? s.D / s.H : 0), heads(s.K * s.D), turned(backward ? s.K * s.D : 0),
        sides(s.H * (Products::room(d, s.K) + (backward ? Products::room(s.K, d) : 0))), pool(s.H),
        turned_pool(backward ? s.H : 0) {
    const auto* saet = static_cast<const T*>(s.saet);
    Scratch* next = sides;
    for (int64_t h = 0; h < s.H; ++h) {
      T *head = heads + h * s.K * d, *across = turned + (backward ? h * d * s.K : 0);
      for (int64_t k = 0; k < s.K; ++k) {
        for (int64_t i = 0; i < d; ++i) {
          head[k * d + i] = saet[k * s.D + h * d + i];
          if (backward) across[i * s.K + k] = head[k * d + i];
        }
      }
      pool[h] = Products::right(next, head, d, s.K, d);
      next += Products::room(d, s.K);
      if (!backward) continue;
      turned_pool[h] = Products::right(next, across, s.K, d, s.K);
      next += Products::room(s.K, d);
    }
  }

  int64_t left_room(int64_t rows) const {
    return larger(Products::room(rows, s.K), larger(Products::room(s.K, rows), Products::room(rows, d)));
  }
  int64_t right_room(int64_t rows) const { return Products::room(d, rows); }

  // x [rows, ld], D values in each: the features of rows j, j + 1, ... of image n.
  void features(int64_t n, int64_t j, int64_t rows, T* x, int64_t ld, Scratch* left) const {
    for (int64_t h = 0; h < s.H; ++h) {
      Products::multiply(rows, d, Products::rows(left, codes(n, h, j), s.K, rows, s.K), pool[h], x + h * d, ld);
    }
  }

  // Of head h, from the gradient d_x [rows, ld] of those rows' features, d values in each: that of the codes to their
  // place in `d_scm` by way of `piece` [rows, K], and adds to that of the tokens [K, d]. Either may be null.
  void gradients(int64_t h, int64_t n, int64_t j, int64_t rows, const T* d_x, int64_t ld, T* d_scm, T* d_tokens,
                 Scratch* left, Scratch* right, T* piece, bool stream) const {
    const int64_t bytes = rows * s.K * static_cast<int64_t>(sizeof(T));
    if (d_tokens) prefetch(codes(n, h, j), bytes);  // read across its rows, which no processor foresees
    if (d_scm) {
      Products::multiply(rows, s.K, Products::rows(left, d_x, ld, rows, d), turned_pool[h], piece, s.K);
      write_out(d_scm + (codes(n, h, j) - codes(0, 0, 0)), piece, bytes, stream);
    }
    if (d_tokens) {
      Products::add_product(s.K, d, Products::columns(left, codes(n, h, j), s.K, rows, s.K),
                            Products::right(right, d_x, ld, rows, d), d_tokens, d);
    }
  }

 private:
  const T* codes(int64_t n, int64_t h, int64_t j) const {
    return static_cast<const T*>(s.scm) + ((n * s.H + h) * s.J + j) * s.K;
  }

  const Mhsc s;
  const int64_t d;
  const Buffer<T> heads, turned;  // [H, K, d], [H, d, K]
  const Buffer<Scratch> sides;
  const Buffer<typename Products::Right> pool, turned_pool;
};

}  // namespace
}  // namespace speedk
