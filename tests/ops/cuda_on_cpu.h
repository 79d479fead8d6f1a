// Enough of CUDA to run a kernel on the CPU, one block after the other: a thread is a fibre, and all of a block's run
// to their next barrier in turns. A barrier that not all threads of a block, or lanes of a warp, reach is found.
#pragma once
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static

namespace emulated {

struct Index {
  unsigned x, y, z;
};
struct Fibre {
  ucontext_t context;
  std::vector<char> stack;
  bool done;
};
struct Barrier {
  unsigned arrived, passed;
};
inline Index thread, block, grid, threads;
inline std::vector<Fibre> fibres;
inline Barrier of_block;
inline std::vector<Barrier> of_warps;
inline bool progress;
inline std::vector<uint64_t> lanes;
inline ucontext_t scheduler;
inline unsigned current;
inline bool backwards;
inline std::function<void()> body;

inline void yield() { swapcontext(&fibres[current].context, &scheduler); }
inline void enter() {
  body();
  fibres[current].done = progress = true;
  yield();
}

inline void meet(Barrier& barrier, unsigned all) {
  const unsigned before = barrier.passed;
  if (++barrier.arrived == all) {
    barrier.arrived = 0, ++barrier.passed;
    progress = true;
  }
  while (barrier.passed == before) yield();
}
inline void meet_block() { meet(of_block, fibres.size()); }
inline void meet_warp() {
  const unsigned warp = current / 32, left = fibres.size() - 32 * warp;
  meet(of_warps[warp], left < 32 ? left : 32);
}

// Runs `kernel` on the blocks of a grid, of columns x rows threads each; false where some threads of a block wait for
// others that ended.
inline bool run(Index blocks, unsigned columns, unsigned rows, std::function<void()> kernel) {
  body = kernel;
  grid = blocks, threads = {columns, rows, 1};
  fibres.assign(columns * rows, {});
  lanes.assign(columns * rows, 0);
  for (unsigned b = 0; b < blocks.x * blocks.y * blocks.z; ++b) {
    block = {b % blocks.x, b / blocks.x % blocks.y, b / (blocks.x * blocks.y)};
    of_block = {};
    of_warps.assign((fibres.size() + 31) / 32, {});
    for (auto& fibre : fibres) {
      fibre.done = false;
      fibre.stack.resize(1 << 16);
      getcontext(&fibre.context);
      fibre.context.uc_stack.ss_sp = fibre.stack.data();
      fibre.context.uc_stack.ss_size = fibre.stack.size();
      makecontext(&fibre.context, enter, 0);
    }
    for (size_t done = 0; done < fibres.size();) {
      done = 0;
      bool moved = false;
      for (size_t i = 0; i < of_warps.size(); ++i) {  // each as far as it comes alone, the first or the last ones first
        const size_t warp = backwards ? of_warps.size() - 1 - i : i;
        do {
          progress = false;
          for (current = 32 * warp; current < std::min(fibres.size(), 32 * warp + 32); ++current) {
            thread = {current % columns, current / columns, 0};
            if (!fibres[current].done) swapcontext(&scheduler, &fibres[current].context);
          }
          moved |= progress;
        } while (progress);
      }
      for (const auto& fibre : fibres) done += fibre.done;
      progress = moved;
      if (!progress) return false;
    }
  }
  return true;
}
inline bool run(int64_t blocks, unsigned columns, unsigned rows, std::function<void()> kernel) {
  return run(Index{static_cast<unsigned>(blocks), 1, 1}, columns, rows, kernel);
}

}  // namespace emulated

#define threadIdx emulated::thread
#define blockIdx emulated::block
#define blockDim emulated::threads
#define gridDim emulated::grid

inline void __syncthreads() { emulated::meet_block(); }

namespace emulated {

// What `read` makes of the values that the threads of a warp give, or, meeting there, of a block, in `lanes`.
template <class T, class F> auto exchange(T value, F&& read, void (*meeting)() = meet_warp) {
  std::memcpy(&lanes[current], &value, sizeof(T));
  meeting();
  const auto result = read();
  meeting();
  return result;
}
template <class T> T lane(unsigned at) {
  T value;
  std::memcpy(&value, &lanes[at], sizeof(T));
  return value;
}

}  // namespace emulated

template <class T> T __shfl_xor_sync(unsigned, T value, int mask) {
  const unsigned me = emulated::current;
  return emulated::exchange(value, [me, mask] { return emulated::lane<T>(me ^ mask); });
}
template <class T> T __shfl_up_sync(unsigned, T value, unsigned step) {
  const unsigned me = emulated::current;
  return emulated::exchange(value, [me, step] { return emulated::lane<T>(me % 32 < step ? me : me - step); });
}
template <class T> T __shfl_sync(unsigned, T value, unsigned from) {
  const unsigned at = emulated::current / 32 * 32 + from;
  return emulated::exchange(value, [at] { return emulated::lane<T>(at); });
}
inline unsigned __ballot_sync(unsigned, bool flag) {
  const unsigned first = emulated::current / 32 * 32;
  return emulated::exchange(flag, [first] {
    unsigned votes = 0;
    for (unsigned i = 0; i < 32; ++i) votes |= static_cast<unsigned>(emulated::lane<bool>(first + i)) << i;
    return votes;
  });
}
inline int __syncthreads_count(bool flag) {
  return emulated::exchange(flag, [] {
    int count = 0;
    for (unsigned i = 0; i < emulated::fibres.size(); ++i) count += emulated::lane<bool>(i);
    return count;
  }, emulated::meet_block);
}
inline int __syncthreads_or(bool flag) { return __syncthreads_count(flag) != 0; }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
struct alignas(16) int4 {
  int x, y, z, w;
};
template <class T> T __ldcs(const T* from) { return *from; }
template <class T> void __stcs(T* to, T value) { *to = value; }
// A fibre is left at barriers alone, so that an addition is never interrupted.
inline int atomicAdd(int* at, int value) { return (*at += value) - value; }
