// What csrc/tensor_core.cuh takes from a GPU, by PTX's definitions, for kernels on the CPU.
#pragma once
#define SPEEDK_EMULATED
#include "cuda_on_cpu.h"

#include "product.h"

struct float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

inline float __uint_as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline uint32_t __float_as_uint(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }

namespace speedk {

alignas(128) inline char shared_memory[232448];  // what a block of an H100 may have
inline char* block_memory() { return shared_memory; }

inline float across(float value, int lanes) { return __shfl_xor_sync(0xffffffffu, value, lanes); }

inline uint32_t to_bfloat16(float value) {
  const uint32_t bits = __float_as_uint(value);
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
inline uint32_t to_float16(float value) {
  const auto half = static_cast<_Float16>(value);
  uint16_t bits;
  std::memcpy(&bits, &half, 2);
  return bits;
}
inline float from_float16(uint32_t bits) {
  const auto low = static_cast<uint16_t>(bits);
  _Float16 half;
  std::memcpy(&half, &low, 2);
  return static_cast<float>(half);
}
template <Product P> uint32_t packed(float low, float high) {
  if (P == Product::bfloat16) return to_bfloat16(low) | to_bfloat16(high) << 16;
  return to_float16(low) | to_float16(high) << 16;
}
template <Product P> float2 unpacked(uint32_t both) {
  if (P == Product::bfloat16) return {__uint_as_float(both << 16), __uint_as_float(both & 0xffff0000u)};
  return {from_float16(both), from_float16(both >> 16)};
}
inline float power_of_2(float x) { return std::exp2(x); }
inline float inverse(float x) { return 1 / x; }
inline void ask_for(const void*) {}
inline void let_the_next_begin() {}
inline uint64_t awaited;  // by how many threads
inline void await_the_one_before() { ++awaited; }
inline float2 read_anew(const float2* from) { return *from; }

// What this lane gets of a product of 16 x K times K x 8: a(lane, register, place in it) and b likewise; each register
// holds `width` values of k.
template <int K, class A, class B> void multiply(float (&acc)[4], int width, A a, B b) {
  const int lane = static_cast<int>(emulated::current % 32);
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + (i < 2 ? 0 : 8), column = 2 * (lane % 4) + i % 2;
    for (int k = 0; k < K; ++k) {
      const int at = k % (K / 2), quad = at / width, place = at % width, far = k >= K / 2;
      acc[i] += a(4 * (row % 8) + quad, (row >= 8) + 2 * far, place) * b(4 * column + quad, far, place);
    }
  }
}

template <class Register> struct Operands {
  Register a[4], b[2];
};
// The operands of a lane of this warp.
template <class Register> const Operands<Register>& of_lane(int lane) {
  return *emulated::lane<const Operands<Register>*>(emulated::current / 32 * 32 + lane);
}

template <Product P> void multiply_16(float (&acc)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const Operands<uint32_t> mine{{a[0], a[1], a[2], a[3]}, {b0, b1}};
  const auto value = [](uint32_t both, int place) { return place ? unpacked<P>(both).y : unpacked<P>(both).x; };
  emulated::exchange(&mine, [&] {
    multiply<16>(acc, 2, [&](int l, int r, int place) { return value(of_lane<uint32_t>(l).a[r], place); },
                 [&](int l, int r, int place) { return value(of_lane<uint32_t>(l).b[r], place); });
    return 0;
  });
}
inline void multiply_8(float (&acc)[4], const float (&a)[4], float b0, float b1) {
  const Operands<float> mine{{a[0], a[1], a[2], a[3]}, {b0, b1}};
  const auto cut = [](float value) { return __uint_as_float(__float_as_uint(value) & 0xffffe000u); };
  emulated::exchange(&mine, [&] {
    multiply<8>(acc, 1, [&](int l, int r, int) { return cut(of_lane<float>(l).a[r]); },
                [&](int l, int r, int) { return cut(of_lane<float>(l).b[r]); });
    return 0;
  });
}

template <bool turned> void load_matrices(uint32_t (&m)[4], const void* row) {
  const int lane = static_cast<int>(emulated::current % 32), first = static_cast<int>(emulated::current) - lane;
  emulated::exchange(row, [&] {
    for (int i = 0; i < 4; ++i) {
      const auto at = [&](int r, int c) {
        return static_cast<uint32_t>(static_cast<const uint16_t*>(emulated::lane<const void*>(first + 8 * i + r))[c]);
      };
      const int g = lane / 4, t = lane % 4;
      m[i] = turned ? at(2 * t, g) | at(2 * t + 1, g) << 16 : at(g, 2 * t) | at(g, 2 * t + 1) << 16;
    }
    return 0;
  });
}

// Copies behind a thread's back, made when they are asked for or, `late`, when they are waited for: in between, nothing
// may count on either.
struct Copy {
  void* to;
  const void* from;
  size_t bytes;
  bool there;
  void make() const {
    if (there) std::memcpy(to, from, bytes);
    else std::memset(to, 0, bytes);
  }
};
inline bool late;
inline std::vector<std::vector<std::vector<Copy>>> copies;  // of each thread, by stages
inline std::vector<std::vector<Copy>>& own_copies() {
  if (copies.size() < emulated::fibres.size()) copies.resize(emulated::fibres.size());
  auto& own = copies[emulated::current];
  if (own.empty()) own.resize(1);
  return own;
}
template <int bytes = 16> void fetch(void* to, const void* from, bool there = true) {
  own_copies().back().push_back({to, from, bytes, there});
  if (!late) own_copies().back().back().make();
}
inline void end_of_stage() { own_copies().emplace_back(); }
template <int left> void await_all_but() {
  auto& own = own_copies();
  while (static_cast<int>(own.size()) - 1 > left) {
    if (late) for (const Copy& copy : own.front()) copy.make();
    own.erase(own.begin());
  }
}
inline uint64_t count_of(int64_t blocks) { return blocks; }
inline uint64_t count_of(emulated::Index blocks) { return uint64_t{blocks.x} * blocks.y * blocks.z; }
// Runs a kernel that finds NaN in its shared memory, not what one before it left there; false, too, where copies are
// still on the way when it has ended, and where one that begins `early` has not waited in each thread, once.
template <class Blocks, class F> bool launch(Blocks blocks, unsigned threads, F kernel, bool early = false) {
  std::memset(shared_memory, 0xff, sizeof(shared_memory));
  awaited = 0;
  bool ended = emulated::run(blocks, threads, 1, kernel) && awaited == early * threads * count_of(blocks);
  for (const auto& own : copies) for (const auto& stage : own) ended &= stage.empty();
  copies.clear();
  return ended;
}

}  // namespace speedk

// Copies are made late, and the last warp goes first. Of each library that a test makes of such kernels.
extern "C" bool in_the_other_order_on_cpu(bool wanted) {
  speedk::late = emulated::backwards = wanted;
  return true;
}
