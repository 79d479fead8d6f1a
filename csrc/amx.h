// Products of float32 matrices on the matrix unit of a processor with AMX, which multiplies bfloat16 and adds up in
// float32: sixteen times as many a cycle as the vectors do of float32. A float32 is the sum of three bfloat16, of eight
// bits each, so a product of two is nine of these; the six largest, more than five times as many multiplications, leave
// out 2^-23 of it, which is what float32 rounds away. (A value that is infinite leaves a NaN: infinity less infinity.)
//
// Both sides of a product are tiles, of 16 rows of 16 pairs: tile (block, slab) of the left holds 16 of its rows and 32
// of the depth, that of the right 32 of the depth and 16 of its columns. The unit takes any order of the depth that is
// the same on both sides: value i is a pair with value i + 16 here, as vectors are put together. Three pieces follow
// each other, the leading one first. What is past the edges is zero.
#pragma once
#include <cstdint>

#include "simd.h"

#if defined(__AVX512F__) && (defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11)
#define SPEEDK_AMX
#include <immintrin.h>

namespace speedk {
namespace {

using Piece = uint16_t;  // a bfloat16
using Words = uint32_t __attribute__((vector_size(64)));
constexpr int64_t kTileSide = 16, kTileDepth = 32, kTile = kTileSide * kTileDepth, kPieces = 3;

SPEEDK_SHARED int64_t tiles_for(int64_t size, int64_t tile) { return (size + tile - 1) / tile; }

// A side of a product, `slabs` tiles deep.
struct Tiles {
  const Piece* at;
  int64_t slabs;
  SPEEDK_SHARED const Piece* tile(int64_t block, int64_t slab) const {
    return at + (block * slabs + slab) * kPieces * kTile;
  }
};

// How many pieces a side takes that is `side` rows or columns wide.
SPEEDK_SHARED int64_t room_for_tiles(int64_t side, int64_t depth) {
  return tiles_for(side, kTileSide) * tiles_for(depth, kTileDepth) * kPieces * kTile;
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

// The pieces of 16 values, each in the upper half of its 32 bits.
struct Split {
  __m512i piece[kPieces];
  explicit SPEEDK_SHARED Split(__m512 x) {
    const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xFFFF0000u));
    piece[0] = _mm512_and_si512(_mm512_castps_si512(x), upper);
    const __m512 rest = _mm512_sub_ps(x, _mm512_castsi512_ps(piece[0]));
    piece[1] = _mm512_and_si512(_mm512_castps_si512(rest), upper);
    piece[2] = _mm512_castps_si512(_mm512_sub_ps(rest, _mm512_castsi512_ps(piece[1])));
  }
};

// Piece p of two times 16 values, as pairs.
SPEEDK_SHARED __m512i pairs(const Split& first, const Split& second, int p) {
  return _mm512_or_si512(reinterpret_cast<__m512i>(reinterpret_cast<Words>(first.piece[p]) >> 16), second.piece[p]);
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
    Piece* row = to + r / kTileSide * slabs * kPieces * kTile + r % kTileSide * kTileDepth;
    for (int64_t k = 0; k < whole; k += kTileDepth, row += kPieces * kTile) {
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

// The right side that is x [depth, columns].
inline Tiles right_of(Piece* to, const float* x, int64_t ld, int64_t depth, int64_t columns) {
  const int64_t slabs = tiles_for(depth, kTileDepth);
  Piece* tile = to;
  for (int64_t c = 0; c < columns; c += kTileSide) {
    for (int64_t k = 0; k < depth; k += kTileDepth, tile += kPieces * kTile) {
      right_tile(tile, x + k * ld + c, ld, depth - k, columns - c);
    }
  }
  return {to, slabs};
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

// The left side whose rows are the columns of x [depth, columns].
inline Tiles left_of_columns(Piece* to, const float* x, int64_t ld, int64_t depth, int64_t columns) {
  const Tiles all = right_of(to, x, ld, depth, columns);
  for (Piece* tile = to; tile < to + room_for_tiles(columns, depth); tile += kTile) turn_tile(tile);
  return all;
}

// C [rows, columns], at most 32 x 32: from two blocks of each side at most, `slabs` of each; the next block of a side
// that is `deep` slabs deep lies behind the first.
template <int down, int across, bool add>
__attribute__((target("amx-tile,amx-bf16"))) inline void multiply_tiles(
    const Piece* a, const Piece* b, int64_t deep, int64_t slabs, float* C, int64_t ldc, int64_t rows, int64_t columns,
    const float* bias) {
  written(a), written(b), written(C);
  const bool whole = rows == down * kTileSide && columns == across * kTileSide;
  const int64_t next = deep * kPieces * kTile, bytes = ldc * static_cast<int64_t>(sizeof(float));
  if (add && whole) {
    _tile_loadd(0, C, bytes);
    if constexpr (across == 2) _tile_loadd(1, C + kTileSide, bytes);
    if constexpr (down == 2) _tile_loadd(2, C + kTileSide * ldc, bytes);
    if constexpr (down == 2 && across == 2) _tile_loadd(3, C + kTileSide * ldc + kTileSide, bytes);
  } else if (bias && whole) {  // the same row sixteen times
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
  for (int64_t slab = 0; slab < slabs; ++slab, a += kPieces * kTile, b += kPieces * kTile) {
    const auto left = [&](int piece) __attribute__((target("amx-tile,amx-bf16"), always_inline)) {
      _tile_loadd(4, a + piece * kTile, 64);
      if constexpr (down == 2) _tile_loadd(5, a + piece * kTile + next, 64);
    };
    const auto right = [&](int piece) __attribute__((target("amx-tile,amx-bf16"), always_inline)) {
      _tile_loadd(6, b + piece * kTile, 64);
      if constexpr (across == 2) _tile_loadd(7, b + piece * kTile + next, 64);
    };
    const auto product = []() __attribute__((target("amx-tile,amx-bf16"), always_inline)) {
      _tile_dpbf16ps(0, 4, 6);
      if constexpr (across == 2) _tile_dpbf16ps(1, 4, 7);
      if constexpr (down == 2) _tile_dpbf16ps(2, 5, 6);
      if constexpr (down == 2 && across == 2) _tile_dpbf16ps(3, 5, 7);
    };
    left(0), right(2), product();
    right(1), product();
    right(0), product();
    left(1), product();
    right(1), product();
    left(2), right(0), product();
  }
  if (whole) {
    _tile_stored(0, C, bytes);
    if constexpr (across == 2) _tile_stored(1, C + kTileSide, bytes);
    if constexpr (down == 2) _tile_stored(2, C + kTileSide * ldc, bytes);
    if constexpr (down == 2 && across == 2) _tile_stored(3, C + kTileSide * ldc + kTileSide, bytes);
    return;
  }
  alignas(64) float edge[32 * 32];
  _tile_stored(0, edge, 128);
  if constexpr (across == 2) _tile_stored(1, edge + 16, 128);
  if constexpr (down == 2) _tile_stored(2, edge + 16 * 32, 128);
  if constexpr (down == 2 && across == 2) _tile_stored(3, edge + 16 * 32 + 16, 128);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < columns; c += 16) {
      const __mmask16 some = first_of(columns - c);
      float* to = C + r * ldc + c;
      __m512 sum = _mm512_load_ps(edge + r * 32 + c);
      if (bias) sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(some, bias + c));
      if (add) sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(some, to));
      _mm512_mask_storeu_ps(to, some, sum);
    }
  }
}

// C [M, N] = left right + bias [N] where there is one, or C += left right with `add`, for `slabs` from `slab` on.
template <bool add>
inline void multiply_slabs(int64_t M, int64_t N, const Tiles& left, const Tiles& right, int64_t slab, int64_t slabs,
                           float* C, int64_t ldc, const float* bias) {
  for (int64_t n = 0; n < N; n += 2 * kTileSide) {
    const int64_t columns = N - n < 2 * kTileSide ? N - n : 2 * kTileSide;
    const float* b = bias ? bias + n : nullptr;
    for (int64_t m = 0; m < M; m += 2 * kTileSide) {
      const int64_t rows = M - m < 2 * kTileSide ? M - m : 2 * kTileSide;
      const auto block = rows > kTileSide ? columns > kTileSide ? multiply_tiles<2, 2, add> : multiply_tiles<2, 1, add>
                         : columns > kTileSide ? multiply_tiles<1, 2, add> : multiply_tiles<1, 1, add>;
      block(left.tile(m / kTileSide, slab), right.tile(n / kTileSide, slab), left.slabs, slabs, C + m * ldc + n, ldc,
            rows, columns, b);
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
    return left_of_columns(to, x, ld, depth, columns);
  }
  static Right right(Piece* to, const float* x, int64_t ld, int64_t depth, int64_t columns) {
    return right_of(to, x, ld, depth, columns);
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
