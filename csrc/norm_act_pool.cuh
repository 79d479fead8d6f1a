// The GPU's kernels of norm_act_pool: a plane belongs to a team of threads from end to end, which sums over it and then
// rewrites it from the caches. Nothing depends on the order in which threads run: equal inputs give equal bits. Without
// a launch in it, so that a test can compile this file for the CPU and run it there.
#pragma once
#include "norm_act_pool.h"

namespace speedk {
namespace {

constexpr int kTeamRows = 8;  // a block is 32 x kTeamRows threads

template <class T> struct ComputeOf { using type = float; };
template <> struct ComputeOf<double> { using type = double; };
template <class T> using Compute = typename ComputeOf<T>::type;

// Blocks that fit a multiprocessor at once, by their registers.
template <class T> constexpr int kBlocks = sizeof(Compute<T>) == 8 ? 3 : 4;

__device__ __forceinline__ float inverse_root(float v) { return 1.0f / sqrtf(v); }
__device__ __forceinline__ double inverse_root(double v) { return 1.0 / sqrt(v); }

// Where the values of a plane lie, and which of them are this thread's: every `step`-th from `first`. A team beyond the
// last plane has none, and takes part in the sums all the same.
struct Place {
  int64_t plane, channel;  // which mean, which weight
  int64_t full, pooled;    // the first value in tensors of x's size and of out's
  int64_t stride;          // from one position to the next
  int first, step;
  bool there;
};

// A Sums is numbers of type A alone; these add them up over a team and give the result to all its threads.
template <class A, class Sums> __device__ __forceinline__ void sum_warp(Sums& sums) {
  A* values = reinterpret_cast<A*>(&sums);
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(Sums) / sizeof(A)); ++i) {
#pragma unroll
    for (int lane = 16; lane; lane /= 2) values[i] += __shfl_xor_sync(0xFFFFFFFFu, values[i], lane);
  }
}
// Adds up over threadIdx.y what shared memory holds of each row: `width` numbers a row, of which this thread wants
// `at`.
template <class A> __device__ __forceinline__ A sum_rows(const A* shared, int width, int at) {
  A total = 0;
  for (int row = 0; row < kTeamRows; ++row) total += shared[row * width + at];
  return total;
}

// [B, C, H, W], planes of up to kWarpPlane values: a warp a plane.
constexpr int64_t kWarpPlane = 1024;
struct Warp {
  static int64_t blocks(const NormActPool& j) { return (j.B * j.C + kTeamRows - 1) / kTeamRows; }
  static __device__ Place place(const NormActPool& j) {
    const int64_t plane = int64_t{blockIdx.x} * kTeamRows + threadIdx.y;
    const bool there = plane < j.B * j.C;
    return {plane, plane % j.C, plane * j.H * j.W, plane * (j.H / 2) * (j.W / 2), 1, static_cast<int>(threadIdx.x), 32,
            there};
  }
  template <class A, class Sums> static __device__ __forceinline__ void sum(Sums& sums) { sum_warp<A>(sums); }
};

// [B, C, H, W], larger planes: a block a plane.
struct Block {
  static int64_t blocks(const NormActPool& j) { return j.B * j.C; }
  static __device__ Place place(const NormActPool& j) {
    const int64_t plane = blockIdx.x;
    return {plane, plane % j.C, plane * j.H * j.W, plane * (j.H / 2) * (j.W / 2), 1,
            static_cast<int>(threadIdx.y * 32 + threadIdx.x), 32 * kTeamRows, true};
  }
  template <class A, class Sums> static __device__ __forceinline__ void sum(Sums& sums) {
    constexpr int count = sizeof(Sums) / sizeof(A);
    __shared__ A shared[kTeamRows * count];
    sum_warp<A>(sums);
    A* values = reinterpret_cast<A*>(&sums);
    __syncthreads();  // what the sum before left has been read
    if (threadIdx.x == 0) {
#pragma unroll
      for (int i = 0; i < count; ++i) shared[threadIdx.y * count + i] = values[i];
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < count; ++i) values[i] = sum_rows(shared, count, i);
  }
};

// [B, H, W, C]: a block takes 32 channels of an image, side by side in memory, a column of its threads one of them.
struct Column {
  static __host__ __device__ int64_t groups(const NormActPool& j) { return (j.C + 31) / 32; }
  static int64_t blocks(const NormActPool& j) { return j.B * groups(j); }
  static __device__ Place place(const NormActPool& j) {
    const int64_t image = blockIdx.x / groups(j), channel = blockIdx.x % groups(j) * 32 + threadIdx.x;
    return {image * j.C + channel, channel, image * j.H * j.W * j.C + channel,
            image * (j.H / 2) * (j.W / 2) * j.C + channel, j.C, static_cast<int>(threadIdx.y), kTeamRows,
            channel < j.C};
  }
  template <class A, class Sums> static __device__ __forceinline__ void sum(Sums& sums) {
    constexpr int count = sizeof(Sums) / sizeof(A);
    __shared__ A shared[kTeamRows * 32 * count];
    A* values = reinterpret_cast<A*>(&sums);
    __syncthreads();  // what the sum before left has been read
#pragma unroll
    for (int i = 0; i < count; ++i) shared[(threadIdx.y * count + i) * 32 + threadIdx.x] = values[i];
    __syncthreads();
#pragma unroll
    for (int i = 0; i < count; ++i) values[i] = sum_rows(shared, 32 * count, 32 * i + static_cast<int>(threadIdx.x));
  }
};

template <class T> struct View {
  using A = Compute<T>;
  T* at;
  int64_t stride;
  __device__ View(const void* tensor, int64_t first, int64_t stride)
      : at(static_cast<T*>(const_cast<void*>(tensor)) + first), stride(stride) {}
  __device__ __forceinline__ A operator[](int position) const { return static_cast<A>(at[position * stride]); }
  __device__ __forceinline__ void put(int position, A value) const { at[position * stride] = static_cast<T>(value); }
};

// This thread's windows, window(index, upper left position), and then its positions that are not pooled.
template <class F, class G>
__device__ __forceinline__ void each_window(const NormActPool& j, const Place& p, F&& window, G&& rest) {
  if (!p.there) return;
  const int W = static_cast<int>(j.W), h = static_cast<int>(j.H / 2), w = W / 2;
  for (int i = p.first; i < h * w; i += p.step) window(i, 2 * (i / w * W + i % w));
  const int beside = W % 2 ? 2 * h : 0, below = j.H % 2 ? W : 0;
  for (int i = p.first; i < beside + below; i += p.step) rest(i < beside ? (i + 1) * W - 1 : 2 * h * W + i - beside);
}

template <class T, class A> __device__ __forceinline__ A number(const void* values, int64_t at) {
  return static_cast<A>(static_cast<const T*>(values)[at]);
}
template <class T, class A>
__device__ __forceinline__ Norm<A> norm_of(const NormActPool& j, const Place& p, A mean, A rstd) {
  return Norm<A>::of(number<T, A>(j.weight, p.channel), number<T, A>(j.bias, p.channel), mean, rstd);
}
template <class T, class A>
__device__ __forceinline__ Norm<A> norm_of(const NormActPool& j, const Place& p, const void* mean, const void* rstd) {
  if (!p.there) return {};
  return norm_of<T, A>(j, p, number<A, A>(mean, p.plane), number<A, A>(rstd, p.plane));
}

template <class T, class Team>
__global__ void __launch_bounds__(32 * kTeamRows, kBlocks<T>)
    forward_kernel(NormActPool j, void* out, void* mean, void* rstd) {
  using A = Compute<T>;
  const Place p = Team::place(j);
  const View<T> x(j.x, p.full, p.stride), to(out, p.pooled, p.stride);
  const int size = static_cast<int>(j.H * j.W), W = static_cast<int>(j.W);
  A m = 0;
  for (int i = p.there ? p.first : size; i < size; i += p.step) m += x[i];
  Team::template sum<A>(m);
  m /= static_cast<A>(size);
  Spread<A> sums{};
  for (int i = p.there ? p.first : size; i < size; i += p.step) sums.add(x[i] - m);
  Team::template sum<A>(sums);
  if (!p.there) return;
  const auto statistics = Statistics<A>::of(m, sums, static_cast<A>(size));
  m = statistics.mean;
  const A r = inverse_root(statistics.variance + static_cast<A>(j.eps));
  if (p.first == 0) {
    static_cast<A*>(mean)[p.plane] = m;
    static_cast<A*>(rstd)[p.plane] = r;
  }
  const Norm<A> norm = norm_of<T, A>(j, p, m, r);
  each_window(j, p, [&](int window, int i) {
    const A upper = relu(norm(x[i])) + relu(norm(x[i + 1])), lower = relu(norm(x[i + W])) + relu(norm(x[i + W + 1]));
    to.put(window, static_cast<A>(0.25) * (upper + lower));
  }, [](int) {});
}

template <class T, class Team>
__global__ void __launch_bounds__(32 * kTeamRows, kBlocks<T>)
    backward_kernel(NormActPool j, const void* d_out, const void* mean, const void* rstd, void* d_x, void* d_weight,
                    void* d_bias) {
  using A = Compute<T>;
  const Place p = Team::place(j);
  const View<T> x(j.x, p.full, p.stride), slope(d_out, p.pooled, p.stride), to(d_x, p.full, p.stride);
  const int corners[4] = {0, 1, static_cast<int>(j.W), static_cast<int>(j.W) + 1};
  const Norm<A> norm = norm_of<T, A>(j, p, mean, rstd);
  FirstSums<A> sums{};
  each_window(j, p, [&](int window, int i) {
    const A d = static_cast<A>(0.25) * slope[window];
#pragma unroll
    for (const int corner : corners) sums.add(through(norm(x[i + corner]), d), x[i + corner] - norm.mean);
  }, [](int) {});
  Team::template sum<A>(sums);
  if (!p.there) return;
  const auto first = First<A>::of(norm, sums, static_cast<A>(j.H * j.W));
  if (p.first == 0) {
    static_cast<A*>(d_weight)[p.plane] = first.d_weight;
    static_cast<A*>(d_bias)[p.plane] = first.d_bias;
  }
  each_window(j, p, [&](int window, int i) {
    const A d = static_cast<A>(0.25) * slope[window];
#pragma unroll
    for (const int corner : corners) {
      const A value = x[i + corner];
      to.put(i + corner, first.d_x(through(norm(value), d), value - norm.mean));
    }
  }, [&](int i) { to.put(i, first.d_x(A{}, x[i] - norm.mean)); });
}

template <class T, class Team>
__global__ void __launch_bounds__(32 * kTeamRows, kBlocks<T>)
    double_backward_kernel(NormActPool j, NormActPoolSecond s) {
  using A = Compute<T>;
  const Place p = Team::place(j);
  const View<T> x(j.x, p.full, p.stride), u(s.dd_x, p.full, p.stride), slope(s.d_out, p.pooled, p.stride);
  const View<T> to(s.d_x, p.full, p.stride), pooled(s.d_d_out, p.pooled, p.stride);
  const int corners[4] = {0, 1, static_cast<int>(j.W), static_cast<int>(j.W) + 1};
  const A size = static_cast<A>(j.H * j.W);
  const Norm<A> norm = norm_of<T, A>(j, p, s.mean, s.rstd);
  SecondSums<A> sums{};
  each_window(j, p, [&](int window, int i) {
    const A d = static_cast<A>(0.25) * slope[window];
#pragma unroll
    for (const int corner : corners) {
      const A value = x[i + corner];
      sums.add(through(norm(value), d), u[i + corner], value - norm.mean);
    }
  }, [&](int i) { sums.add(u[i], x[i] - norm.mean); });
  Team::template sum<A>(sums);
  const auto means = SecondMeans<A>::of(norm, sums, size);
  A rest = 0;
  each_window(j, p, [&](int window, int i) {
    const A d = static_cast<A>(0.25) * slope[window];
#pragma unroll
    for (const int corner : corners) {
      const A value = x[i + corner];
      rest += means.rest(through(norm(value), d), u[i + corner], value - norm.mean);
    }
  }, [&](int i) { rest += means.rest(A{}, u[i], x[i] - norm.mean); });
  Team::template sum<A>(rest);
  if (!p.there) return;
  const auto second = Second<A>::of(norm, means, rest, number<T, A>(s.dd_weight, p.channel),
                                    number<T, A>(s.dd_bias, p.channel), size);
  if (p.first == 0) static_cast<A*>(s.d_weight)[p.plane] = second.d_weight;
  each_window(j, p, [&](int window, int i) {
    const A d = static_cast<A>(0.25) * slope[window];
    A total = 0;
#pragma unroll
    for (const int corner : corners) {
      const A value = x[i + corner], v = u[i + corner], a = norm(value), centred = value - norm.mean;
      total += through(a, second.d_g(v, centred));
      to.put(i + corner, second.d_x(through(a, d), v, centred));
    }
    pooled.put(window, static_cast<A>(0.25) * total);
  }, [&](int i) { to.put(i, second.d_x(A{}, u[i], x[i] - norm.mean)); });
}

// run(Team) for the team that suits the job.
template <class F> auto with_team(const NormActPool& j, F&& run) {
  if (j.channels_last) return run(Column{});
  return j.H * j.W <= kWarpPlane ? run(Warp{}) : run(Block{});
}

}  // namespace
}  // namespace speedk
