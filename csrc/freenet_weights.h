// The decoder's weights as its products read them, and where their gradients go.
#pragma once
#include <cstring>

#include "codes.h"
#include "freenet.h"
#include "memory.h"

namespace speedk {
namespace {

enum Matrix { proj, fc1, fc2 };
enum Vector { proj_b, norm1_w, norm1_b, fc1_b, fc2_b, norm2_w, norm2_b };
constexpr int kMatrixAt[] = {0, 4, 6}, kVectorAt[] = {1, 2, 3, 5, 7, 8, 9};  // among a block's tensors
constexpr int kMatrices = 3, kVectors = 7;

// Rows of arrays that products read are padded: to whole vectors, and by one more, so that rows of 256 or 512 values do
// not all fall into the same cache sets. Values beyond D are zero throughout.
inline int64_t padded(int64_t width) { return (width + 15) / 16 * 16 + 16; }

// Within the kernel a token's values lie channel by channel, row by row, as an image's do, and move in whole rows.
// Which value of a token the l-th of these is.
inline int64_t in_token(const Decoder& net, int64_t l) {
  return l % (net.patch * net.patch) * net.C + l / (net.patch * net.patch);
}
// Copies all gradients from where they are added up, the weights' as they are but for the final projection's order and
// then the SAETs' head by head, each `to` its own place.
inline void hand_out(const Decoder& net, const float* sums, float* const* to) {
  const auto copy = [&sums](float* target, int64_t count) {
    std::memcpy(target, sums, static_cast<size_t>(count) * sizeof(float));
    sums += count;
  };
  for (int64_t r = 0; r < net.R; ++r) {
    for (int t = 0; t < kBlockTensors; ++t) {
      const bool matrix = t == kMatrixAt[proj] || t == kMatrixAt[fc1] || t == kMatrixAt[fc2];
      copy(*to++, matrix ? net.D * net.D : net.D);
    }
  }
  for (int64_t l = 0; l < net.L; ++l) copy(to[0] + in_token(net, l) * net.D, net.D);
  for (int64_t l = 0; l < net.L; ++l) copy(to[1] + in_token(net, l), 1);
  for (int64_t h = 0; h < net.codes.H; ++h) {
    const int64_t d = net.D / net.codes.H;
    for (int64_t k = 0; k < net.codes.K; ++k) copy(to[2] + k * net.D + h * d, d);
  }
}

// The weights as products read them: transposed for the way forward, as they are for the way back.
template <class Products> struct Packed {
  using Right = typename Products::Right;

  Packed(const Decoder& net, bool backward)
      : net(net), ld(padded(net.D)), ld_out(padded(net.L)), backward(backward), pools(net.codes, backward),
        memory(net.R * (kMatrices * (backward ? 2 : 1) * net.D * ld + kVectors * ld) + net.L * net.D +
               (net.D + 1) * ld_out + net.L * ld),
        sides(net.R * kMatrices * (backward ? 2 : 1) * Products::room(net.D, net.D) +
              Products::room(net.L, net.D) + Products::room(net.D, net.L)),
        next(memory), next_side(sides) {
    for (int64_t r = 0; r < net.R; ++r) {
      const float* const* tensors = net.weights + r * kBlockTensors;
      for (int m = 0; m < kMatrices; ++m) {
        turned[r][m] = side(turn(tensors[kMatrixAt[m]], net.D, ld), ld, net.D, net.D);
      }
      for (int v = 0; v < kVectors; ++v) vectors[r][v] = copy(tensors[kVectorAt[v]], 1, net.D, ld);
    }
    for (int64_t r = net.R - 1; backward && r >= 0; --r) {  // in the order of their use, as are the turned ones
      for (int m = kMatrices - 1; m >= 0; --m) {
        const float* matrix = net.weights[r * kBlockTensors + kMatrixAt[m]];
        plain[r][m] = side(copy(matrix, net.D, net.D, ld), ld, net.D, net.D);
      }
    }
    const float* const* last = net.weights + net.R * kBlockTensors;
    float* ordered = next;
    next += net.L * net.D;
    for (int64_t l = 0; l < net.L; ++l) {
      std::memcpy(ordered + l * net.D, last[0] + in_token(net, l) * net.D, static_cast<size_t>(net.D) * sizeof(float));
    }
    if (backward) {
      out_plain = side(copy(ordered, net.L, net.D, ld), ld, net.L, net.D);
      return;
    }
    out_turned = side(turn(ordered, net.L, ld_out), ld_out, net.D, net.L);
    for (int64_t l = 0; l < ld_out; ++l) next[l] = l < net.L ? last[1][in_token(net, l)] : 0.0f;
    out_bias = next;
  }

  const Decoder& net;
  const int64_t ld, ld_out;
  const bool backward;
  const Pools<Products> pools;
  Right turned[kMaxBlocks][kMatrices], plain[kMaxBlocks][kMatrices], out_turned, out_plain;
  const float* vectors[kMaxBlocks][kVectors];
  const float* out_bias = nullptr;

 private:
  const float* copy(const float* from, int64_t rows, int64_t width, int64_t stride) {
    float* to = next;
    next += rows * stride;
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t i = 0; i < stride; ++i) to[r * stride + i] = i < width ? from[r * width + i] : 0.0f;
    }
    return to;
  }
  // [D, stride] from the transpose of [rows, D].
  const float* turn(const float* from, int64_t rows, int64_t stride) {
    float* to = next;
    next += net.D * stride;
    for (int64_t i = 0; i < net.D; ++i) {
      for (int64_t r = 0; r < stride; ++r) to[i * stride + r] = r < rows ? from[r * net.D + i] : 0.0f;
    }
    return to;
  }
  Right side(const float* matrix, int64_t stride, int64_t depth, int64_t columns) {
    const Right right = Products::right(next_side, matrix, stride, depth, columns);
    next_side += Products::room(columns, depth);
    return right;
  }

  Buffer<float> memory;
  Buffer<typename Products::Scratch> sides;
  float* next;
  typename Products::Scratch* next_side;
};

}  // namespace
}  // namespace speedk
