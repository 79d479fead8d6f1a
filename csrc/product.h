// How products are computed on a GPU's tensor cores.
#pragma once

namespace speedk {

// tf32 takes 10 bits of float32 values; float32 splits each into two such values, and a product into three, which is as
// close as float32.
enum class Product { bfloat16, float16, tf32, float32 };

constexpr int kInvalidValue = 1;  // cudaErrorInvalidValue

}  // namespace speedk
