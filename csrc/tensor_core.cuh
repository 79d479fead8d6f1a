// What the lanes of a warp do together: sums across lanes, and matrix products on the tensor cores.
//
// A warp holds 16 rows of a matrix [16, D] as float x[D / 8][4]: lane 4 g + t has of rows g (the first two) and g + 8
// (the last two) the values at positions 8 n + 2 t and 8 n + 2 t + 1. Positions are columns in another order, so that a
// lane's values lie side by side in memory: position 32 q + 8 i + 2 t + e is column 32 q + 8 t + 2 i + e. A product's
// result has the same form as its left operand, so that one product feeds the next from registers.
//
// The right operand is a matrix of weights [D, D] in shared memory, laid out so that a warp reads it without bank
// conflicts, and pairs of values into pairs of registers: 16-bit values in the order of positions, both ways, with 16
// bytes between rows; float32 values in their own order, but the pairs of row r at their place with two bits changed.
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

__device__ __forceinline__ float power_of_2(float x) {
  float value;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(value) : "f"(x));
  return value;
}

__device__ __forceinline__ float inverse(float x) {
  float value;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(value) : "f"(x));
  return value;
}

// Memory that will be read soon.
__device__ __forceinline__ void ask_for(const void* memory) { asm volatile("prefetch.global.L2 [%0];" :: "l"(memory)); }

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

// So many bytes from memory to shared memory, behind the thread's back; zeros unless `there`.
template <int bytes = 16> __device__ __forceinline__ void fetch(void* to, const void* from, bool there = true) {
  const auto at = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  const int given = there ? bytes : 0;
  if constexpr (bytes == 16) {  // what is smaller has to go through the first-level cache
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" :: "r"(at), "l"(from), "r"(given) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %3, %2;" :: "r"(at), "l"(from), "r"(given), "n"(bytes)
                 : "memory");
  }
}
__device__ __forceinline__ void end_of_stage() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int left> __device__ __forceinline__ void await_all_but() {  // so many of the last stages
  asm volatile("cp.async.wait_group %0;" :: "n"(left) : "memory");
}
#endif

// The nearest value of tf32. NaN may become zero; what is left of it then is NaN.
__device__ __forceinline__ float to_tf32(float value) {
  return __uint_as_float((__float_as_uint(value) + 0x1000u) & 0xffffe000u);
}

// A product in tf32 cuts off what is beyond 10 bits of its operands, 1 / 3072 of each on average. To make one operand
// larger by that is about as good as to round it, in one instruction, and NaN stays NaN; by twice that, to round both.
constexpr float kCutOff = 1.0f / 3072;

// 16 rows as they are kept and multiplied: 16-bit pairs, or float32.
template <Product P, int D, bool Short = kShort<P>> struct Rows;

template <Product P, int D> struct Rows<P, D, true> {
  uint32_t pair[D / 8][2];

  __device__ __forceinline__ float2 of(int n, int half) const { return unpacked<P>(pair[n][half]); }
  __device__ __forceinline__ void set(int n, int half, float low, float high) { pair[n][half] = packed<P>(low, high); }

  // The 8 values of a row at columns 32 q + 8 t, and back.
  __device__ __forceinline__ void put(int q, int half, const uint4& w) {
    pair[4 * q][half] = w.x, pair[4 * q + 1][half] = w.y, pair[4 * q + 2][half] = w.z, pair[4 * q + 3][half] = w.w;
  }
  __device__ __forceinline__ uint4 get(int q, int half) const {
    return {pair[4 * q][half], pair[4 * q + 1][half], pair[4 * q + 2][half], pair[4 * q + 3][half]};
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

// Where the pair of float32 values `pair` of row r lies in its row.
__device__ __forceinline__ int place_of(int row, int pair) { return pair ^ (row >> 3 & 3) ^ (row & 1) << 1; }

// The position of a column, or of a row of 16-bit values: each bit of one is a bit of the other.
__device__ __forceinline__ constexpr int position_of(int column) {
  return (column & ~31) + 8 * (column >> 1 & 3) + 2 * (column >> 3 & 3) + (column & 1);
}

// Fetch `weight` [D, D], contiguous in memory, into its place in shared memory, all `threads` of a block together, a
// pair of values at a time. A warp takes 16 pairs of two rows 16 apart, which have no bank in common.
template <Product P, int D, int threads>
__device__ __forceinline__ void fetch_weight(const void* weight, char* shared) {
  constexpr int kPair = kShort<P> ? 4 : 8, kStride = kWeightBytes<P, D> / D, kWarps = threads / 32;
  constexpr int kAcross = kWarps % (D / 32) == 0 ? D / 32 : 1, kRows = kWarps / kAcross;  // warps of a row, and rows
  static_assert(16 % kRows == 0, "those of a thread differ in bits that its first one has not");
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int row = warp / kAcross + (lane & 16), pair = 16 * (warp % kAcross) + (lane & 15);
  const char* from = static_cast<const char*>(weight) + (row * (D / 2) + pair) * kPair;
#pragma unroll
  for (int i = 0; i < D / 2 / kRows; ++i) {
    const int r = i * kRows / 16 * 32 + i * kRows % 16;
    char* to = shared;
    if constexpr (kShort<P>) to += (position_of(row) + position_of(r)) * kStride + 2 * position_of(2 * pair);
    else to += (row + r) * kStride + 8 * (place_of(row, pair) ^ place_of(r, 0));
#pragma unroll
    for (int p = 0; p < D / 2; p += 16 * kAcross) fetch<kPair>(to + kPair * p, from + (r * (D / 2) + p) * kPair);
  }
}

// One operand of a product of float32 values: as it is multiplied, and, where halves are, what that leaves of it.
template <Product P, int size> struct Split {
  float value[size], rest[size];

  __device__ __forceinline__ void set(int i, float given) {
    value[i] = P == Product::float32 ? to_tf32(given) : given;
    rest[i] = P == Product::float32 ? given - value[i] : 0.0f;
  }
};

// acc += a b for 8 of k.
template <Product P>
__device__ __forceinline__ void add_product_8(float (&acc)[4], const Split<P, 4>& a, float b0, float b1) {
  if constexpr (P == Product::float32) {
    Split<P, 2> b;
    b.set(0, b0), b.set(1, b1);
    multiply_8(acc, a.rest, b.value[0], b.value[1]);
    multiply_8(acc, a.value, b.rest[0], b.rest[1]);
    multiply_8(acc, a.value, b.value[0], b.value[1]);
  } else {
    multiply_8(acc, a.value, b0, b1);
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
      for (int n = 0; n < D / 8; n += 4) {  // four at a time: a product waits for the one before it with the same sum
        uint32_t b[4][4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int from = turned ? 32 * q * kStride + 16 * (n + i) : 8 * (n + i) * kStride + 64 * q;
          load_matrices<turned>(b[i], at + from);
        }
#pragma unroll
        for (int k = 0; k < 4; k += 2) {
          const uint32_t(&low)[2] = left.pair[4 * q + k], (&high)[2] = left.pair[4 * q + k + 1];
          const uint32_t a[4] = {low[0], low[1], high[0], high[1]};
#pragma unroll
          for (int i = 0; i < 4; ++i) multiply_16<P>(acc[n + i], a, b[i][k], b[i][k + 1]);
        }
      }
    }
  } else {
    // Lane 4 g + t asks of eight columns for g's and of eight of k for 2 t and 2 t + 1.
    const int g = lane >> 2, t = lane & 3, odd = g & 1, turn = place_of(8 * (g >> 1) + odd, 0);
    const auto* w = reinterpret_cast<const float*>(weight);
#pragma unroll
    for (int q = 0; q < D / 32; ++q) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        Split<P, 4> a;
        const float(&x)[4] = left.value[4 * q + j];
        constexpr float by = P == Product::tf32 ? 1.0f + 2 * kCutOff : 1.0f;  // for the weights, too
        a.set(0, by * x[0]), a.set(1, by * x[2]), a.set(2, by * x[1]), a.set(3, by * x[3]);
#pragma unroll
        for (int n = 0; n < D / 8; ++n) {
          const int group = n / 4 * 32, i = n % 4;
          float2 b;
          if constexpr (turned) {  // rows of k, a column of g
            const float* at = w + (32 * q + 8 * t + 2 * j) * D + group + 8 * (g >> 1) + odd;
            b = {at[2 * (i ^ t)], at[D + 2 * (i ^ t ^ 2)]};
          } else {  // a row of g, columns of k
            const float* at = w + (group + 8 * (g >> 1) + 2 * i + odd) * D + 32 * q + 8 * t;
            b = *reinterpret_cast<const float2*>(at + 2 * (j ^ turn));
          }
          add_product_8<P>(acc[n], a, b.x, b.y);
        }
      }
    }
  }
}

}  // namespace speedk
