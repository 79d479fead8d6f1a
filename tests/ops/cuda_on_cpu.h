// Enough of CUDA to run a kernel on the CPU, one block after the other: a thread is a fibre, and all of a block's run to
// their next barrier in turns. A barrier that not all threads reach is found.
#pragma once
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static

namespace emulated {

struct Index {
  unsigned x, y;
};
struct Fibre {
  ucontext_t context;
  std::vector<char> stack;
  bool done;
};
inline Index thread, block;
inline std::vector<Fibre> fibres;
inline std::vector<uint64_t> lanes;
inline ucontext_t scheduler;
inline unsigned current;
inline std::function<void()> body;

inline void yield() { swapcontext(&fibres[current].context, &scheduler); }
inline void enter() {
  body();
  fibres[current].done = true;
  yield();
}

// Runs `kernel` on `blocks` blocks of 32 x rows threads; false where some threads of a block wait for others that ended.
inline bool run(int64_t blocks, unsigned rows, std::function<void()> kernel) {
  body = kernel;
  fibres.assign(32 * rows, {});
  lanes.assign(32 * rows, 0);
  for (int64_t b = 0; b < blocks; ++b) {
    block = {static_cast<unsigned>(b), 0};
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
      for (current = 0; current < fibres.size(); ++current) {
        thread = {current % 32, current / 32};
        swapcontext(&scheduler, &fibres[current].context);
        done += fibres[current].done;
      }
      if (done != 0 && done != fibres.size()) return false;
    }
  }
  return true;
}

}  // namespace emulated

#define threadIdx emulated::thread
#define blockIdx emulated::block

inline void __syncthreads() { emulated::yield(); }

// Every warp shuffles as often as every other here, so that the block's barrier serves.
template <class T> T __shfl_xor_sync(unsigned, T value, int mask) {
  const unsigned me = emulated::current;
  std::memcpy(&emulated::lanes[me], &value, sizeof(T));
  emulated::yield();
  std::memcpy(&value, &emulated::lanes[me ^ mask], sizeof(T));
  emulated::yield();
  return value;
}
