#include "memory.h"

#include <cstdlib>
#include <cstring>
#include <new>

namespace speedk {

void* allocate(int64_t bytes, bool zeros) {
  const size_t size = (static_cast<size_t>(bytes) + 127) / 64 * 64;  // never 0, and whole lines: nobody shares the last
  void* memory = std::aligned_alloc(64, size);
  if (!memory) throw std::bad_alloc();
  return zeros ? std::memset(memory, 0, size) : memory;
}

void release(void* memory) { std::free(memory); }

}  // namespace speedk
