// Fold and unfold: images [N, C, rows patch, columns patch] <-> tokens [N, rows columns, patch patch C], the values of
// a token ordered (row, column, channel), channel fastest. Elements are moved, never computed on.
#pragma once
#include <cstdint>

#include "isa.h"

namespace speedk {

struct Patches {
  int element_bytes;  // 2, 4 or 8
  int64_t N, C, rows, columns, patch;
};

SPEEDK_DECLARE(void patchify(const Patches& shape, const void* images, void* tokens, int threads))
SPEEDK_DECLARE(void unpatchify(const Patches& shape, const void* tokens, void* images, int threads))

}  // namespace speedk
