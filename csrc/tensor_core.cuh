// What the lanes of a warp do together: sums across lanes, and matrix products on the tensor cores.
//
// A warp holds 16 rows of a matrix [16, D] as float x[D / 8][4]: lane 4 g + t has of rows g (the first two) and g + 8
// (the last two) the values at positions 8 n + 2 t and 8 n + 2 t + 1. Positions are columns in another order, so that a
// lane's values lie side by side in memory: position 32 q + 8 i + 2 t + e is column 32 q + 8 t + 4 e + i. A product's
// result has the same form as its left operand, so that one product feeds the next from registers.
//
// The right operand is a matrix of weights [D, D] in shared memory, laid out so that a warp reads it without bank
// conflicts: 16-bit values in the order of positions, both ways, with 16 bytes between rows; float32 values in their
// own order, each 16 bytes of row r at their place with the lowest three bits changed by r / 4.
//
// SPEEDK_EMULATED: the primitives are those of tests/ops, which run the kernels without a GPU.
#pragma once
#include <cstdint>
#include "product.h"
#ifndef SPEEDK_EMULATED
#include <cuda_runtime.h>
#endif

namespace speedk {

template <Product P> constexpr bool kShort = P == Product::bfloat16 || P == Product::float16;

#ifndef SPEEDK_EMULATED
// The shared memory that a block was launched with.
__device__ __forceinline__ char* block_memory() {
  extern __shared__ __align__(16) char memory[];
  return memory;
}

__device__ __forceinline__ float across(float value, int lanes) { return __shfl_xor_sync(0xffffffffu, value, lanes); }

template <Product P> __device__ __forceinline__ uint32_t packed(float low, float high) {
  uint32_t both;
  if constexpr (P == Product::bfloat16) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  }
  return both;
}

template <Product P> __device__ __forceinline__ float2 unpacked(uint32_t both) {
  if constexpr (P == Product::bfloat16) return {__uint_as_float(both << 16), __uint_as_float(both & 0xffff0000u)};
  float2 value;
  asm("{ .reg .f16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h; }"
      : "=f"(value.x), "=f"(value.y) : "r"(both));
  return value;
}

__device__ __forceinline__ float rounded(float value) {  // to tf32
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
  return __uint_as_float(bits);
}

// Two halves of b's words after halves of a's: low ones (0x5410), high ones (0x7632).
__device__ __forceinline__ uint32_t halves(uint32_t a, uint32_t b, uint32_t which) { return __byte_perm(a, b, which); }

// acc += a b, 16 x 16 times 16 x 8 values of 16 bits.
template <Product P>
__device__ __forceinline__ void multiply_16(float (&acc)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (P == Product::bfloat16) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                 "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
                 "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

// acc += a b, 16 x 8 times 8 x 8 values of tf32.
__device__ __forceinline__ void multiply_8(float (&acc)[4], const float (&a)[4], float b0, float b1) {
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
               "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
               : "r"(__float_as_uint(a[0])), "r"(__float_as_uint(a[1])), "r"(__float_as_uint(a[2])),
                 "r"(__float_as_uint(a[3])), "r"(__float_as_uint(b0)), "r"(__float_as_uint(b1)));
}

// Four matrices of 8 x 8 values of 16 bits, of which each lane names a row: lane 4 g + t gets of each its row g at 2 t
// and 2 t + 1; `turned`: its column g of rows 2 t and 2 t + 1.
template <bool turned> __device__ __forceinline__ void load_matrices(uint32_t (&m)[4], const void* row) {
  const auto at = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  if constexpr (turned) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3]) : "r"(at));
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3]) : "r"(at));
  }
}
#endif

// 16 rows as they are kept and multiplied: 16-bit pairs, or float32.
template <Product P, int D, bool Short = kShort<P>> struct Rows;

template <Product P, int D> struct Rows<P, D, true> {
  uint32_t pair[D / 8][2];

  __device__ __forceinline__ float2 of(int n, int half) const { return unpacked<P>(pair[n][half]); }
  __device__ __forceinline__ void set(int n, int half, float low, float high) { pair[n][half] = packed<P>(low, high); }

  // The 8 values of a row at columns 32 q + 8 t, and back.
  __device__ __forceinline__ void put(int q, int half, const uint4& w) {
    pair[4 * q][half] = halves(w.x, w.z, 0x5410), pair[4 * q + 1][half] = halves(w.x, w.z, 0x7632);
    pair[4 * q + 2][half] = halves(w.y, w.w, 0x5410), pair[4 * q + 3][half] = halves(w.y, w.w, 0x7632);
  }
  __device__ __forceinline__ uint4 get(int q, int half) const {
    const uint32_t a = pair[4 * q][half], b = pair[4 * q + 1][half], c = pair[4 * q + 2][half],
                   d = pair[4 * q + 3][half];
    return {halves(a, b, 0x5410), halves(c, d, 0x5410), halves(a, b, 0x7632), halves(c, d, 0x7632)};
  }
};

template <Product P, int D> struct Rows<P, D, false> {
  float value[D / 8][4];

  __device__ __forceinline__ float2 of(int n, int half) const { return {value[n][2 * half], value[n][2 * half + 1]}; }
  __device__ __forceinline__ void set(int n, int half, float low, float high) {
    value[n][2 * half] = low, value[n][2 * half + 1] = high;
  }
};

// Bytes of a matrix of weights in shared memory.
template <Product P, int D> constexpr int kWeightBytes = kShort<P> ? D * (2 * D + 16) : 4 * D * D;

// Lay `weight` [D, D], contiguous in memory, out in shared memory, all threads of a block together.
template <Product P, int D> __device__ __forceinline__ void stage_weight(const void* weight, char* shared) {
  constexpr int kChunks = D * D * (kShort<P> ? 2 : 4) / 16, kOfRow = kChunks / D;
  for (int c = threadIdx.x; c < kChunks; c += blockDim.x) {
    const uint4 w = static_cast<const uint4*>(weight)[c];
    const int row = c / kOfRow, chunk = c % kOfRow;
    if constexpr (kShort<P>) {
      const int place = (row & ~31) + 8 * (row & 3) + ((row & 31) >> 2);
      auto* to = reinterpret_cast<uint32_t*>(shared + place * (2 * D + 16) + 64 * (chunk >> 2) + 4 * (chunk & 3));
      to[0] = halves(w.x, w.z, 0x5410), to[4] = halves(w.x, w.z, 0x7632);
      to[8] = halves(w.y, w.w, 0x5410), to[12] = halves(w.y, w.w, 0x7632);
    } else {
      float4 v = {__uint_as_float(w.x), __uint_as_float(w.y), __uint_as_float(w.z), __uint_as_float(w.w)};
      if constexpr (P == Product::tf32) v = {rounded(v.x), rounded(v.y), rounded(v.z), rounded(v.w)};
      reinterpret_cast<float4*>(shared)[row * kOfRow + (chunk ^ ((row >> 2) & 7))] = v;
    }
  }
}

// acc += a b for 8 of k, float32 values: as tf32, or as three products of halves. `low` is what `a` lost.
template <Product P>
__device__ __forceinline__ void add_product_8(float (&acc)[4], const float (&a)[4], const float (&low)[4], float b0,
                                              float b1) {
  if constexpr (P == Product::float32) {
    const float h0 = rounded(b0), h1 = rounded(b1);
    multiply_8(acc, low, h0, h1);
    multiply_8(acc, a, rounded(b0 - h0), rounded(b1 - h1));
    multiply_8(acc, a, h0, h1);
  } else {
    multiply_8(acc, a, b0, b1);
  }
}

// acc [16, D] += left [16, D] weight^T, or left weight where `turned`.
template <bool turned, Product P, int D>
__device__ __forceinline__ void add_product(float (&acc)[D / 8][4], const Rows<P, D>& left, const char* weight,
                                            int lane) {
  if constexpr (kShort<P>) {
    constexpr int kStride = 2 * D + 16;
    const char* at = turned ? weight + lane * kStride : weight + (lane & 7) * kStride + 16 * (lane >> 3);
#pragma unroll
    for (int q = 0; q < D / 32; ++q) {
#pragma unroll
      for (int n = 0; n < D / 8; ++n) {
        uint32_t b[4];
        load_matrices<turned>(b, turned ? at + 32 * q * kStride + 16 * n : at + 8 * n * kStride + 64 * q);
#pragma unroll
        for (int k = 4 * q; k < 4 * q + 4; k += 2) {
          const uint32_t a[4] = {left.pair[k][0], left.pair[k][1], left.pair[k + 1][0], left.pair[k + 1][1]};
          multiply_16<P>(acc[n], a, b[k - 4 * q], b[k - 4 * q + 1]);
        }
      }
    }
  } else {
    const int g = lane >> 2, t = lane & 3;
    const auto* w = reinterpret_cast<const float*>(weight);
    const float* first = turned ? w + 8 * t * D + 4 * (g ^ (2 * t)) : w + 4 * g * D + 4 * ((2 * t) ^ g);
    const float* second = turned ? w + (8 * t + 4) * D + 4 * (g ^ (2 * t + 1)) : w + 4 * g * D + 4 * ((2 * t + 1) ^ g);
#pragma unroll
    for (int q = 0; q < D / 32; ++q) {
      float a[4][4], low[4][4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float(&x)[4] = left.value[4 * q + i];
        const float given[4] = {x[0], x[2], x[1], x[3]};
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          a[i][r] = rounded(given[r]);
          low[i][r] = P == Product::float32 ? rounded(given[r] - a[i][r]) : 0.0f;
        }
      }
#pragma unroll
      for (int n = 0; n < D / 32; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {  // of k where `turned`, else of the result's columns
          const int from = turned ? (32 * q + i) * D + 32 * n : (32 * n + i) * D + 32 * q;
          const float4 b0 = *reinterpret_cast<const float4*>(first + from);
          const float4 b1 = *reinterpret_cast<const float4*>(second + from);
          const float low_k[4] = {b0.x, b0.y, b0.z, b0.w}, high_k[4] = {b1.x, b1.y, b1.z, b1.w};
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            const int k = turned ? i : j, column = 4 * n + (turned ? j : i);
            add_product_8<P>(acc[column], a[k], low[k], low_k[j], high_k[j]);
          }
        }
      }
    }
  }
}

}  // namespace speedk
