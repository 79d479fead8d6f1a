// Eq. 4 to images, from codes (Eq. 3, as in `mhsc`) or from the features they make: all blocks and the final projection
// in one pass over the tokens. float32.
//
// A token's way through the network depends on no other token, so a block of tokens is taken from end to end while it
// sits in the cache. For the way back there are two ways. Features and both normalised results of each recurrent block
// are kept, and all else follows with one product more, that of the MLP's first layer; or nothing is, and the way back
// goes forward once more: a fifth of all products, which the matrix unit has done before as much memory is handed out.
// Without blocks (R = 0) the features are the state, and the projection is all.
#pragma once
#include <cstdint>

#include "isa.h"
#include "mhsc.h"

namespace speedk {

constexpr int kBlockTensors = 10;  // in the order of BlockWeights
constexpr int kMaxBlocks = 64;
constexpr int64_t kLeastForUnit = 64;  // D: of less, the matrix unit's forms cost more than its products save

struct Decoder {
  int64_t N, J, D, L, R;      // R <= kMaxBlocks
  int64_t C, patch, columns;  // J = (J / columns) x columns patches; L = patch patch C
  bool sum;                   // Z' = LN1(P + Z) instead of LN1(P) + Z
  const float* features;      // [N, J, D], or
  Mhsc codes;                 // of these N, J and D; H = K = 0 where there are features
  // R x 10 pointers (proj w b, norm1 w b, fc1 w b, fc2 w b, norm2 w b), then the final weight [L, D] and bias [L].
  const float* const* weights;
  int threads;
};

SPEEDK_SHARED bool has_features(const Decoder& net) { return net.codes.H == 0; }
SPEEDK_SHARED bool by_unit(const Decoder& net) { return matrix_unit() && net.D >= kLeastForUnit; }
SPEEDK_SHARED int64_t block_weights(const Decoder& net) { return 3 * net.D * net.D + 7 * net.D; }
// What has a gradient but the codes or features: the weights, and then the SAETs [K, D].
SPEEDK_SHARED int64_t all_weights(const Decoder& net) {
  return net.R * block_weights(net) + net.L * (net.D + 1) + net.codes.K * net.D;
}

// How many partial sums of the weights' gradients: enough for 16 cores, at most 32 MiB, never more than pay.
SPEEDK_SHARED int64_t decoder_parts(const Decoder& net) {
  int64_t parts = (int64_t{8} << 20) / (all_weights(net) + 1);
  parts = parts < 4 ? 4 : parts > 16 ? 16 : parts;
  const int64_t useful = net.N * net.J / 128 + 1;
  return parts < useful ? parts : useful;
}

// Values to keep for the way back: what `tokens` of them leave behind in one recurrent block, and all in all; 0 where
// nothing is.
SPEEDK_SHARED int64_t kept_of_block(const Decoder& net, int64_t tokens) { return tokens * (2 * net.D + 2); }
SPEEDK_SHARED int64_t kept_of(const Decoder& net, int64_t tokens) {
  return net.R * kept_of_block(net, tokens) + (has_features(net) ? 0 : tokens * net.D);
}

// images [N, C, rows patch, columns patch]; fills `kept`, kept_of(net, N J) values, unless it is null.
SPEEDK_DECLARE(void decode(const Decoder& net, float* images, float* kept))

// From d_images the gradient of the codes [N, H, J, K] or the features [N, J, D], which may be null, and those of the
// weights and of the SAETs, at as many addresses; zeros for the SAETs unless they are `learned`. `kept` is what
// `decode` filled, or null. `partial` holds `decoder_parts(net)` arrays of the weights' length: they are summed in a
// fixed order, whatever the number of threads.
SPEEDK_DECLARE(void decode_backward(const Decoder& net, const float* d_images, const float* kept, float* d_inputs,
                                    bool learned, float* const* d_weights, float* partial))

}  // namespace speedk
