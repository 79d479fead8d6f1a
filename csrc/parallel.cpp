#include "parallel.h"

#include <dlfcn.h>

#include <algorithm>
#include <atomic>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

namespace speedk {
namespace {

struct Loop {
  Body body;
  void* context;
  int64_t count, grain;
  std::atomic<int64_t> next{0};
  std::mutex mutex{};
  std::exception_ptr error{};  // the first

  // Nothing may leave it: an exception in a thread of a pool ends the process.
  static void work(void* self) {
    auto& loop = *static_cast<Loop*>(self);
    try {
      for (;;) {
        const int64_t begin = loop.next.fetch_add(loop.grain, std::memory_order_relaxed);
        if (begin >= loop.count) return;
        loop.body(loop.context, begin, std::min(begin + loop.grain, loop.count));
      }
    } catch (...) {
      loop.next.store(loop.count, std::memory_order_relaxed);  // the others need not go on
      const std::lock_guard<std::mutex> lock(loop.mutex);
      if (!loop.error) loop.error = std::current_exception();
    }
  }
};

// libgomp's entry point for `#pragma omp parallel`, which LLVM's and Intel's runtimes export too.
using Gomp = void (*)(void (*)(void*), void*, unsigned threads, unsigned flags);

Gomp gomp() {
  static const Gomp found = reinterpret_cast<Gomp>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  return found;
}

}  // namespace

const char* parallel_backend() { return gomp() ? "openmp" : "threads"; }

void parallel_for(int threads, int64_t count, int64_t grain, Body body, void* context) {
  if (count <= 0) return;
  Loop loop{body, context, count, std::max<int64_t>(grain, 1)};
  const int64_t pieces = (count + loop.grain - 1) / loop.grain;
  const int team = static_cast<int>(std::min<int64_t>(std::max(threads, 1), pieces));
  if (team == 1) {
    body(context, 0, count);
  } else if (gomp()) {
    gomp()(Loop::work, &loop, static_cast<unsigned>(team), 0);
  } else {
    std::vector<std::thread> others;
    others.reserve(team - 1);
    try {
      for (int i = 1; i < team; ++i) others.emplace_back(Loop::work, &loop);
    } catch (const std::exception&) {
      // No more threads to be had: those that started and this one share the work.
    }
    Loop::work(&loop);
    for (auto& thread : others) thread.join();
  }
  if (loop.error) std::rethrow_exception(loop.error);
}

}  // namespace speedk
