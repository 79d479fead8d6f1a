#include "patches.h"

#include "memory.h"
#include "parallel.h"

namespace speedk {
namespace SPEEDK_ISA {
namespace {

// A task is one row of patches of one image: C bands of `patch` image rows on the one side, `columns` tokens, which are
// contiguous, on the other. Both fit the first cache level, whatever the order they are walked in.
template <bool fold, class T, class Channels, class Side>
void move(const Patches& s, const T* from, T* to, int threads, Channels C, Side P) {
  const int64_t width = s.columns * P, plane = s.rows * P * width, length = P * P * C;
  const int64_t bytes = s.N * C * plane * static_cast<int64_t>(sizeof(T));
  if (bytes > kStreamBytes) prefer_large_pages(to, bytes);
  const int64_t grain = (int64_t{1} << 16) / (C * P * width * static_cast<int64_t>(sizeof(T)) + 1) + 1;
  parallel_for(threads, s.N * s.rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t n = task / s.rows, row = task % s.rows;
      const int64_t image = n * C * plane + row * P * width, token = task * s.columns * length;
      for (int64_t y = 0; y < P; ++y) {
        for (int64_t column = 0; column < s.columns; ++column) {
          for (int64_t x = 0; x < P; ++x) {
            for (int64_t c = 0; c < C; ++c) {
              const int64_t i = image + c * plane + y * width + column * P + x;
              const int64_t t = token + column * length + (y * P + x) * C + c;
              if (fold) to[t] = from[i];
              else to[i] = from[t];
            }
          }
        }
      }
    }
  });
}

template <bool fold, class T> void sized(const Patches& s, const void* from, void* to, int threads) {
  const auto* source = static_cast<const T*>(from);
  auto* target = static_cast<T*>(to);
  if (s.N * s.C * s.rows * s.columns * s.patch == 0) return;
  // The recipes' own shapes, unrolled.
  if (s.C == 3 && s.patch == 4) move<fold>(s, source, target, threads, Fixed<3>(), Fixed<4>());
  else if (s.C == 3 && s.patch == 8) move<fold>(s, source, target, threads, Fixed<3>(), Fixed<8>());
  else if (s.C == 1 && s.patch == 4) move<fold>(s, source, target, threads, Fixed<1>(), Fixed<4>());
  else move<fold>(s, source, target, threads, s.C, s.patch);
}

template <bool fold> void any(const Patches& s, const void* from, void* to, int threads) {
  if (s.element_bytes == 2) sized<fold, uint16_t>(s, from, to, threads);
  else if (s.element_bytes == 4) sized<fold, uint32_t>(s, from, to, threads);
  else sized<fold, uint64_t>(s, from, to, threads);
}

}  // namespace

void patchify(const Patches& shape, const void* images, void* tokens, int threads) {
  any<true>(shape, images, tokens, threads);
}

void unpatchify(const Patches& shape, const void* tokens, void* images, int threads) {
  any<false>(shape, tokens, images, threads);
}

}  // namespace SPEEDK_ISA
}  // namespace speedk
