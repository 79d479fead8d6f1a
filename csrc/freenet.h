// Eq. 4 from the features of `mhsc` to images, all blocks and the final projection in one pass over the tokens.
// float32.
//
// A token's way through the network depends on no other token, so a block of tokens is taken from end to end while it
// sits in the cache. For the way back, two arrays of the size of the features are kept for each recurrent block: both
// normalised results. All else follows from them with one more product, that of the MLP's first layer: it costs less
// than a tenth of the time and saves a third of the memory. Without blocks (R = 0) the features are the state, and the
// projection is all.
#pragma once
#include <cstdint>

#include "isa.h"

namespace speedk {

constexpr int kBlockTensors = 10;  // in the order of BlockWeights
constexpr int kMaxBlocks = 64;

struct Decoder {
  int64_t N, J, D, L, R;      // R <= kMaxBlocks
  int64_t C, patch, columns;  // J = (J / columns) x columns patches; L = patch patch C
  bool sum;                   // Z' = LN1(P + Z) instead of LN1(P) + Z
  const float* features;      // [N, J, D]
  // R x 10 pointers (proj w b, norm1 w b, fc1 w b, fc2 w b, norm2 w b), then the final weight [L, D] and bias [L].
  const float* const* weights;
  int threads;
};

SPEEDK_SHARED int64_t block_weights(const Decoder& net) { return 3 * net.D * net.D + 7 * net.D; }
SPEEDK_SHARED int64_t all_weights(const Decoder& net) { return net.R * block_weights(net) + net.L * (net.D + 1); }

// How many partial sums of the weights' gradients: enough for 16 cores, at most 32 MiB, never more than pay.
SPEEDK_SHARED int64_t decoder_parts(const Decoder& net) {
  int64_t parts = (int64_t{8} << 20) / (all_weights(net) + 1);
  parts = parts < 4 ? 4 : parts > 16 ? 16 : parts;
  const int64_t useful = net.N * net.J / 128 + 1;
  return parts < useful ? parts : useful;
}

// Values to keep for the way back: what `tokens` of them leave behind in one recurrent block, and all in all.
SPEEDK_SHARED int64_t kept_of_block(const Decoder& net, int64_t tokens) { return tokens * (2 * net.D + 2); }
SPEEDK_SHARED int64_t kept_values(const Decoder& net) { return net.R * kept_of_block(net, net.N * net.J); }

// images [N, C, rows patch, columns patch]; `kept` is null where no way back follows.
SPEEDK_DECLARE(void decode(const Decoder& net, float* images, float* kept))

// d_features [N, J, D] and the gradient of all weights, one after another in `d_weights`, from d_images. `partial`
// holds `decoder_parts(net)` arrays of that length: they are summed in a fixed order, whatever the number of threads.
SPEEDK_DECLARE(void decode_backward(const Decoder& net, const float* d_images, const float* kept, float* d_features,
                                    float* d_weights, float* partial))

}  // namespace speedk
