// Products of float32 matrices on the matrix unit of a processor with AMX, which multiplies bfloat16 and adds up in
// float32: sixteen times as many a cycle as the vectors do of float32. A float32 is the sum of three bfloat16, of eight
// bits each, so a product of two is nine of these. The six largest are added up; the others are 2^-24 of it at most,
// which is what float32 rounds away. A value that is infinite, or beyond 3.396e38, leaves a NaN; of one below 7.7e-34
// the unit loses digits, as it takes what is below 1.2e-38 in a piece for zero.
//
// Both sides of a product are tiles, of 16 rows of 16 pairs: tile (block, slab) of the left holds 16 of its rows and 32
// of the depth, that of the right 32 of the depth and 16 of its columns. The unit takes any order of the depth that is
// the same on both sides: value i is a pair with value i + 16 here, as vectors are put together. Three pieces follow
// each other, the leading one first, and two blocks do, slab by slab, as products take them. What is past the edges of
// depth and columns is zero.
#pragma once
#include <cstdint>

#include "simd.h"

#if defined(__AVX512F__) && defined(SPEEDK_KNOWS_AMX)
#define SPEEDK_AMX
#include <immintrin.h>

namespace speedk {
namespace {

using Piece = uint16_t;  // a bfloat16
using Words = uint32_t __attribute__((vector_size(64)));
constexpr int64_t kTileSide = 16, kTileDepth = 32, kTile = kTileSide * kTileDepth, kPieces = 3;

SPEEDK_SHARED int64_t tiles_for(int64_t size, int64_t tile) { return (size + tile - 1) / tile; }

// Pieces of one tile, and of the two that are side by side in a slab.
constexpr int64_t kOne = kPieces * kTile, kTwo = 2 * kOne;

// A side of a product, `slabs` tiles deep.
struct Tiles {
  const Piece* at;
  int64_t slabs;
  // The pair of blocks in one slab.
  SPEEDK_SHARED const Piece* two(int64_t pair, int64_t slab) const { return at + (pair * slabs + slab) * kTwo; }
};

// How many pieces a side takes that is `side` rows or columns wide.
SPEEDK_SHARED int64_t room_for_tiles(int64_t side, int64_t depth) {
  return tiles_for(side, 2 * kTileSide) * tiles_for(depth, kTileDepth) * kTwo;
}

// What the unit's instructions read, compilers do not know to be read: what was written stands in memory after this.
SPEEDK_SHARED void written(const void* memory) { __asm__ volatile("" : : "r"(memory) : "memory"); }

// Tells this thread's matrix unit the shape of its tiles, and lets go of them in the end.
class TileUnit {
 public:
  __attribute__((target("amx-tile"))) TileUnit() {
    struct alignas(64) {
      uint8_t palette, start, none[14];
      uint16_t row_bytes[16];
      uint8_t rows[16];
    } shape{};
    shape.palette = 1;
    for (int i = 0; i < 8; ++i) {
      shape.row_bytes[i] = 64;
      shape.rows[i] = kTileSide;
    }
    written(&shape);
    _tile_loadconfig(&shape);
  }
  __attribute__((target("amx-tile"))) ~TileUnit() { _tile_release(); }
  TileUnit(const TileUnit&) = delete;
};

// The pieces of 16 values, each in the upper half of its 32 bits, rounded to nearest but for the last, which is what is
// left. Below 7.7e-34 that is more than its upper half.
struct Split {
  __m512i piece[kPieces];
  explicit SPEEDK_SHARED Split(__m512 x) {
    piece[0] = rounded(x);
    const __m512 rest = _mm512_sub_ps(x, _mm512_castsi512_ps(piece[0]));
    piece[1] = rounded(rest);
    piece[2] = _mm512_castps_si512(_mm512_sub_ps(rest, _mm512_castsi512_ps(piece[1])));
  }
  static SPEEDK_SHARED __m512i upper() { return _mm512_set1_epi32(static_cast<int>(0xFFFF0000u)); }
  static SPEEDK_SHARED __m512i rounded(__m512 x) {
    return _mm512_and_si512(_mm512_add_epi32(_mm512_castps_si512(x), _mm512_set1_epi32(0x8000)), upper());
  }
};

// Piece p of two times 16 values, as pairs.
SPEEDK_SHARED __m512i pairs(const Split& first, const Split& second, int p) {
  const auto low = reinterpret_cast<__m512i>(reinterpret_cast<Words>(first.piece[p]) >> 16);
  return _mm512_ternarylogic_epi32(low, second.piece[p], Split::upper(), 0xF8);  // low | (second & upper)
}

SPEEDK_SHARED __mmask16 first_of(int64_t count) {
  return static_cast<__mmask16>(count >= 16 ? 0xFFFF : count <= 0 ? 0 : (1 << count) - 1);
}

// The left side whose rows are those of x [rows, depth].
inline Tiles left_of_rows(Piece* to, const float* x, int64_t ld, int64_t rows, int64_t depth) {
  const int64_t slabs = tiles_for(depth, kTileDepth), whole = depth / kTileDepth * kTileDepth;
  const auto put = [](Piece* row, const Split& first, const Split& second) __attribute__((always_inline)) {
    for (int p = 0; p < kPieces; ++p) _mm512_store_si512(row + p * kTile, pairs(first, second, p));
  };
  for (int64_t r = 0; r < rows; ++r, x += ld) {
    const int64_t block = r / kTileSide;
    Piece* row = to + block / 2 * slabs * kTwo + block % 2 * kOne + r % kTileSide * kTileDepth;
    for (int64_t k = 0; k < whole; k += kTileDepth, row += kTwo) {
      put(row, Split(_mm512_loadu_ps(x + k)), Split(_mm512_loadu_ps(x + k + 16)));
    }
    if (whole == depth) continue;
    put(row, Split(_mm512_maskz_loadu_ps(first_of(depth - whole), x + whole)),
        Split(_mm512_maskz_loadu_ps(first_of(depth - whole - 16), x + whole + 16)));
  }
  return {to, slabs};
}

// One tile of the right side, for each piece: columns c to c + 16 of rows k to k + 32 of x [depth, columns].
SPEEDK_SHARED void right_tile(Piece* to, const float* x, int64_t ld, int64_t depth, int64_t columns) {
  const __mmask16 some = first_of(columns);
  const bool whole = depth >= kTileDepth;
  for (int64_t k = 0; k < kTileSide; ++k, x += ld, to += kTileDepth) {
    const Split first(_mm512_maskz_loadu_ps(whole || k < depth ? some : 0, x));
    const Split second(_mm512_maskz_loadu_ps(whole || k + 16 < depth ? some : 0, x + 16 * ld));
    for (int p = 0; p < kPieces; ++p) _mm512_store_si512(to + p * kTile, pairs(first, second, p));
  }
}

// Rows and columns of 16 x 16 pairs change places.
SPEEDK_SHARED void turn_tile(Piece* tile) {
  __m512i a[16], b[16];
  for (int i = 0; i < 16; ++i) a[i] = _mm512_load_si512(tile + i * kTileDepth);
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
    a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
    a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
    a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    b[i] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0x88);
    b[i + 4] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0xDD);
    b[i + 8] = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0x88);
    b[i + 12] = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0xDD);
  }
  for (int i = 0; i < 8; ++i) {
    _mm512_store_si512(tile + i * kTileDepth, _mm512_shuffle_i32x4(b[i], b[i + 8], 0x88));
    _mm512_store_si512(tile + (i + 8) * kTileDepth, _mm512_shuffle_i32x4(b[i], b[i + 8], 0xDD));
  }
}

// The right side that is x [depth, columns]; or, with `turned`, the left side whose rows are x's columns.
template <bool turned>
inline Tiles sides_of(Piece* to, const float* x, int64_t ld, int64_t depth, int64_t columns) {
  const int64_t slabs = tiles_for(depth, kTileDepth);
  for (int64_t c = 0; c < columns; c += kTileSide) {
    const int64_t block = c / kTileSide;
    Piece* tile = to + block / 2 * slabs * kTwo + block % 2 * kOne;
    for (int64_t k = 0; k < depth; k += kTileDepth, tile += kTwo) {
      right_tile(tile, x + k * ld + c, ld, depth - k, columns - c);
      for (int p = 0; turned && p < kPieces; ++p) turn_tile(tile + p * kTile);
    }
  }
  return {to, slabs};
}

// Memory that is read after the product at hand: asked for a line at a time, as a processor that is asked for many at
// once does nothing else until they come.
struct Ahead {
  const char* at;
  int64_t lines;
  SPEEDK_SHARED void ask(int64_t some) {
    for (; some > 0 && lines > 0; --some, --lines, at += 64) __builtin_prefetch(at, 0, 2);
  }
};

SPEEDK_SHARED void copy_edge(float* to, int64_t ld_to, const float* from, int64_t ld, int64_t rows, int64_t columns) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < columns; c += kTileSide) {
      const __mmask16 some = first_of(columns - c);
      _mm512_mask_storeu_ps(to + r * ld_to + c, some, _mm512_maskz_loadu_ps(some, from + r * ld + c));
    }
  }
}

// C [rows, columns], at most 32 x 32: from a pair of blocks of each side, or the first of a pair, `slabs` of each. A
// bias is as long as the blocks are wide.
template <int down, int across, bool add>
__attribute__((target("amx-tile,amx-bf16"))) inline void multiply_tiles(
    const Piece* a, const Piece* b, int64_t slabs, float* C, int64_t ldc, int64_t rows, int64_t columns,
    const float* bias, Ahead ahead) {
  const bool whole = rows == down * kTileSide && columns == across * kTileSide;
  // What is smaller is made of all its tiles like the rest, beside C: the same bits wherever a row is.
  alignas(64) float edge[4 * kTileSide * kTileSide];
  float* const to = whole ? C : edge;
  const int64_t ld = whole ? ldc : 2 * kTileSide, bytes = ld * static_cast<int64_t>(sizeof(float));
  const int64_t some = slabs ? tiles_for(ahead.lines, 6 * slabs) : 0;
  if (add && !whole) copy_edge(edge, ld, C, ldc, rows, columns);
  written(to);
  if (add) {
    _tile_loadd(0, to, bytes);
    if constexpr (across == 2) _tile_loadd(1, to + kTileSide, bytes);
    if constexpr (down == 2) _tile_loadd(2, to + kTileSide * ld, bytes);
    if constexpr (down == 2 && across == 2) _tile_loadd(3, to + kTileSide * ld + kTileSide, bytes);
  } else if (bias) {  // the same row sixteen times
    _tile_loadd(0, bias, 0);
    if constexpr (across == 2) _tile_loadd(1, bias + kTileSide, 0);
    if constexpr (down == 2) _tile_loadd(2, bias, 0);
    if constexpr (down == 2 && across == 2) _tile_loadd(3, bias + kTileSide, 0);
  } else {
    _tile_zero(0);
    if constexpr (across == 2) _tile_zero(1);
    if constexpr (down == 2) _tile_zero(2);
    if constexpr (down == 2 && across == 2) _tile_zero(3);
  }
  for (int64_t slab = 0; slab < slabs; ++slab, a += kTwo, b += kTwo) {
    const auto left = [&](int piece) __attribute__((target("amx-tile,amx-bf16"), always_inline)) {
      _tile_loadd(4, a + piece * kTile, 64);
      if constexpr (down == 2) _tile_loadd(5, a + kOne + piece * kTile, 64);
    };
    const auto right = [&](int piece) __attribute__((target("amx-tile,amx-bf16"), always_inline)) {
      _tile_loadd(6, b + piece * kTile, 64);
      if constexpr (across == 2) _tile_loadd(7, b + kOne + piece * kTile, 64);
    };
    const auto product = [&]() __attribute__((target("amx-tile,amx-bf16"), always_inline)) {
      _tile_dpbf16ps(0, 4, 6);
      if constexpr (across == 2) _tile_dpbf16ps(1, 4, 7);
      if constexpr (down == 2) _tile_dpbf16ps(2, 5, 6);
      if constexpr (down == 2 && across == 2) _tile_dpbf16ps(3, 5, 7);
      ahead.ask(some);
    };
    left(0), right(2), product();
    right(1), product();
    right(0), product();
    left(1), product();
    right(1), product();
    left(2), right(0), product();
  }
  _tile_stored(0, to, bytes);
  if constexpr (across == 2) _tile_stored(1, to + kTileSide, bytes);
  if constexpr (down == 2) _tile_stored(2, to + kTileSide * ld, bytes);
  if constexpr (down == 2 && across == 2) _tile_stored(3, to + kTileSide * ld + kTileSide, bytes);
  if (!whole) copy_edge(C, ldc, edge, ld, rows, columns);
}

// C [M, N] = left right + bias [N] where there is one, or C += left right with `add`, for `slabs` from `slab` on.
template <bool add>
inline void multiply_slabs(int64_t M, int64_t N, const Tiles& left, const Tiles& right, int64_t slab, int64_t slabs,
                           float* C, int64_t ldc, const float* bias) {
  constexpr int64_t pair = 2 * kTileSide;
  const int64_t down = tiles_for(M, pair), lines = slabs * kTwo * static_cast<int64_t>(sizeof(Piece)) / 64;
  for (int64_t n = 0; n < N; n += pair) {
    const int64_t columns = N - n < pair ? N - n : pair;
    for (int64_t m = 0; m < M; m += pair) {
      const int64_t rows = M - m < pair ? M - m : pair;
      // The right side's next pair, or behind its last the first of the side that lies there, and likely comes next: in
      // all they may be too large for the second cache.
      const int64_t begin = lines * (m / pair) / down, end = lines * (m / pair + 1) / down;
      const Ahead ahead{reinterpret_cast<const char*>(right.two(n / pair + 1, slab)) + 64 * begin, end - begin};
      const auto block = rows > kTileSide ? columns > kTileSide ? multiply_tiles<2, 2, add> : multiply_tiles<2, 1, add>
                         : columns > kTileSide ? multiply_tiles<1, 2, add> : multiply_tiles<1, 1, add>;
      block(left.two(m / pair, slab), right.two(n / pair, slab), slabs, C + m * ldc + n, ldc, rows, columns,
            bias ? bias + n : nullptr, ahead);
    }
  }
}

// The whole depth, no more of it at a time than stays in the first cache: of either side two blocks, 6 KiB a slab.
template <bool add>
inline void multiply_in_tiles(int64_t M, int64_t N, const Tiles& left, const Tiles& right, float* C, int64_t ldc,
                              const float* bias) {
  const int64_t times = tiles_for(left.slabs, 4), slabs = times ? tiles_for(left.slabs, times) : 0;
  multiply_slabs<add>(M, N, left, right, 0, slabs, C, ldc, bias);
  for (int64_t slab = slabs; slab < left.slabs; slab += slabs) {
    const int64_t some = left.slabs - slab < slabs ? left.slabs - slab : slabs;
    multiply_slabs<true>(M, N, left, right, slab, some, C, ldc, nullptr);
  }
}

// What `Vectors` is in csrc/gemm.h.
struct MatrixUnit {
  using Value = float;
  using Scratch = Piece;
  using Unit = TileUnit;
  using Left = Tiles;
  using Right = Tiles;
  static int64_t room(int64_t side, int64_t depth) { return room_for_tiles(side, depth); }
  static Left rows(Piece* to, const float* x, int64_t ld, int64_t rows, int64_t depth) {
    return left_of_rows(to, x, ld, rows, depth);
  }
  static Left columns(Piece* to, const float* x, int64_t ld, int64_t depth, int64_t columns) {
    return sides_of<true>(to, x, ld, depth, columns);
  }
  static Right right(Piece* to, const float* x, int64_t ld, int64_t depth, int64_t columns) {
    return sides_of<false>(to, x, ld, depth, columns);
  }
  static void multiply(int64_t M, int64_t N, const Left& left, const Right& right, float* C, int64_t ldc,
                       const float* bias = nullptr) {
    multiply_in_tiles<false>(M, N, left, right, C, ldc, bias);
  }
  static void add_product(int64_t M, int64_t N, const Left& left, const Right& right, float* C, int64_t ldc) {
    multiply_in_tiles<true>(M, N, left, right, C, ldc, nullptr);
  }
};

}  // namespace
}  // namespace speedk
#endif
