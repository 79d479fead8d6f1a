// One parallel loop for every CPU kernel.
#pragma once
#include <cstdint>

namespace speedk {

using Body = void (*)(void* context, int64_t begin, int64_t end);

// Calls body(context, begin, end) over [0, count) in pieces of `grain`, on at most `threads` threads, the caller among
// them. Pieces are handed out as threads come free; each index is visited once. Where a body throws, no more are handed
// out, and once all threads are through their own, the first exception goes on from here.
//
// Where the process already holds an OpenMP runtime (PyTorch loads its own into the global scope) its pool is used, so
// that two pools never fight for the same cores; elsewhere plain threads are started for the call.
void parallel_for(int threads, int64_t count, int64_t grain, Body body, void* context);

// "openmp" or "threads": what parallel_for runs on in this process.
const char* parallel_backend();

template <class F>
void parallel_for(int threads, int64_t count, int64_t grain, F&& function) {
  auto call = [](void* context, int64_t begin, int64_t end) { (*static_cast<F*>(context))(begin, end); };
  parallel_for(threads, count, grain, static_cast<Body>(call), static_cast<void*>(&function));
}

}  // namespace speedk
