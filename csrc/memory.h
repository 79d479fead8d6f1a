// Memory of the kernels' own, and writing large results: past the caches, and on large pages.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) || defined(__AVX2__) || defined(__SSE2__)
#include <immintrin.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace speedk {

// Results above this many bytes do not stay in the caches, so they are written past them: an ordinary store would first
// read the line that it is about to overwrite.
constexpr int64_t kStreamBytes = int64_t{8} << 20;

// Memory of a kernel's own, lines of the caches that no other thread has a part of; throws std::bad_alloc where there
// is none. What a body of parallel_for throws reaches its caller.
void* allocate(int64_t bytes, bool zeros);
void release(void* memory);

namespace {  // compiled once per instruction set

// `count` values of T, zero at first with `zeros`.
template <class T> class Buffer {
 public:
  explicit Buffer(int64_t count, bool zeros = false)
      : memory(static_cast<T*>(allocate(count * static_cast<int64_t>(sizeof(T)), zeros))) {}
  ~Buffer() { release(memory); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  operator T*() const { return memory; }

 private:
  T* const memory;
};

// Asks the kernel for large pages under memory that has just been allocated. A fresh result costs one page fault per
// 4 KiB otherwise, which is most of the time that a plain copy takes.
inline __attribute__((always_inline)) void prefer_large_pages(void* begin, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t page = uintptr_t{2} << 20;
  const uintptr_t first = (reinterpret_cast<uintptr_t>(begin) + page - 1) & ~(page - 1);
  const uintptr_t last = (reinterpret_cast<uintptr_t>(begin) + static_cast<uintptr_t>(bytes)) & ~(page - 1);
  if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)begin, (void)bytes;
#endif
}

// Asks for memory that is read a little later, and in an order of which the processor would not know the next line.
inline __attribute__((always_inline)) void prefetch(const void* begin, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(begin) + i);
}

// memcpy that bypasses the caches where `stream` is set and the target is aligned.
inline __attribute__((always_inline)) void write_out(void* target, const void* source, int64_t bytes, bool stream) {
  auto* to = static_cast<char*>(target);
  auto* from = static_cast<const char*>(source);
#if defined(__AVX512F__)
  constexpr int64_t step = 64;
#elif defined(__AVX2__)
  constexpr int64_t step = 32;
#else
  constexpr int64_t step = 16;
#endif
  if (!stream || reinterpret_cast<uintptr_t>(to) % step) {
    std::memcpy(to, from, static_cast<size_t>(bytes));
    return;
  }
  int64_t i = 0;
#if defined(__AVX512F__)
  for (; i + step <= bytes; i += step)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to + i), _mm512_loadu_si512(from + i));
#elif defined(__AVX2__)
  for (; i + step <= bytes; i += step)
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to + i),
                        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i)));
#elif defined(__SSE2__)
  for (; i + step <= bytes; i += step)
    _mm_stream_si128(reinterpret_cast<__m128i*>(to + i), _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i)));
#endif
  if (i < bytes) std::memcpy(to + i, from + i, static_cast<size_t>(bytes - i));
}

// Orders streamed stores before whatever the thread does next.
inline __attribute__((always_inline)) void finish_stream(bool stream) {
#if defined(__SSE2__)
  if (stream) _mm_sfence();
#else
  (void)stream;
#endif
}

}  // namespace
}  // namespace speedk
