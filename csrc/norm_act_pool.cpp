// A plane is summed over and then rewritten while it lies in the caches. Where x is [B, C, H, W] a thread takes plane
// after plane and vectors run along the rows; where it is [B, H, W, C] vectors hold channels. Sums are split by the
// shapes alone: bits do not depend on the number of threads.
#include "norm_act_pool.h"

#include "norm_act_pool_sums.h"
#include "parallel.h"

namespace speedk {
namespace SPEEDK_ISA {
namespace {

constexpr int kColumns = 2;     // vectors of channels that are worked on at a time
constexpr int64_t kPiece = 32;  // values of a channel that are summed on their own

inline float inverse_root(float v) { return 1.0f / __builtin_sqrtf(v); }
inline double inverse_root(double v) { return 1.0 / __builtin_sqrt(v); }

// ---- [B, C, H, W]: the width is `Fixed` for the usual ones, so that short rows unroll ----

// out = pool(f(i)) for i over a plane.
template <class T, class Width, class F> inline void pool(int64_t H, Width W, T* out, F&& f) {
  const int64_t h = H / 2, w = W / 2;
  T sums[kStrip];
  for (int64_t row = 0; row < h; ++row) {
    for (int64_t begin = 0; begin < 2 * w; begin += kStrip) {
      const int64_t count = 2 * w - begin < kStrip ? 2 * w - begin : kStrip;
      const int64_t upper = 2 * row * W + begin, lower = upper + W;
      for (int64_t i = 0; i < count; ++i) sums[i] = f(upper + i) + f(lower + i);
      T* target = out + row * w + begin / 2;
      for (int64_t i = 0; i < count / 2; ++i) target[i] = static_cast<T>(0.25) * (sums[2 * i] + sums[2 * i + 1]);
    }
  }
}

// g: a quarter of d_out where the ReLU lets it through, zero elsewhere and where nothing is pooled.
template <class T, class Width>
inline void spread_back(int64_t H, Width W, const T* x, const T* d_out, const Norm<T>& norm, T* g) {
  const int64_t h = H / 2, w = W / 2;
  for (int64_t row = 0; row < 2 * h; ++row) {
    T* to = g + row * W;
    const T* slope = d_out + row / 2 * w;
    for (int64_t i = 0; i < w; ++i) to[2 * i] = to[2 * i + 1] = static_cast<T>(0.25) * slope[i];
    if (W % 2) to[W - 1] = 0;
    for (int64_t i = 0; i < 2 * w; ++i) to[i] = through(norm(x[row * W + i]), to[i]);
  }
  for (int64_t i = 2 * h * W; i < H * W; ++i) g[i] = 0;
}

template <class T, class Width> struct Plane {
  const NormActPool& j;
  Width W;
  int64_t plane;

  int64_t size() const { return j.H * W; }
  const T* of(const void* full) const { return static_cast<const T*>(full) + plane * size(); }
  T* of(void* full) const { return static_cast<T*>(full) + plane * size(); }
  int64_t pooled() const { return plane * (j.H / 2) * (W / 2); }
  T channel(const void* values) const { return static_cast<const T*>(values)[plane % j.C]; }
  Norm<T> norm(T mean, T rstd) const { return Norm<T>::of(channel(j.weight), channel(j.bias), mean, rstd); }
  Norm<T> norm(const void* mean, const void* rstd) const {
    return norm(static_cast<const T*>(mean)[plane], static_cast<const T*>(rstd)[plane]);
  }

  void forward(void* out, void* mean, void* rstd) const {
    const T *x = of(j.x), n = static_cast<T>(size());
    const T rough = sum_over<T>(size(), [&](int64_t i) { return x[i]; }) / n;
    const auto sums = sums_over<Spread, T>(size(), [&](auto& part, auto at) { part.add(at(x) - rough); });
    const auto [m, variance] = Statistics<T>::of(rough, sums, n);
    const T r = inverse_root(variance + static_cast<T>(j.eps));
    static_cast<T*>(mean)[plane] = m;
    static_cast<T*>(rstd)[plane] = r;
    const Norm<T> norm = this->norm(m, r);
    pool(j.H, W, static_cast<T*>(out) + pooled(), [&](int64_t i) { return relu(norm(x[i])); });
  }

  void backward(const void* d_out, const void* mean, const void* rstd, void* d_x, void* d_weight, void* d_bias) const {
    const Norm<T> norm = this->norm(mean, rstd);
    const T *x = of(j.x), m = norm.mean;
    T* g = of(d_x);
    spread_back(j.H, W, x, static_cast<const T*>(d_out) + pooled(), norm, g);
    const auto sums = sums_over<FirstSums, T>(size(), [&](auto& part, auto at) { part.add(at(g), at(x) - m); });
    const auto first = First<T>::of(norm, sums, static_cast<T>(size()));
    static_cast<T*>(d_weight)[plane] = first.d_weight;
    static_cast<T*>(d_bias)[plane] = first.d_bias;
    for (int64_t i = 0; i < size(); ++i) g[i] = first.d_x(g[i], x[i] - m);
  }

  void double_backward(const NormActPoolSecond& s) const {
    const Norm<T> norm = this->norm(s.mean, s.rstd);
    const T *x = of(j.x), *u = of(s.dd_x), m = norm.mean;
    T* g = of(s.d_x);
    spread_back(j.H, W, x, static_cast<const T*>(s.d_out) + pooled(), norm, g);
    const auto sums =
        sums_over<SecondSums, T>(size(), [&](auto& part, auto at) { part.add(at(g), at(u), at(x) - m); });
    const T count = static_cast<T>(size());
    const auto means = SecondMeans<T>::of(norm, sums, count);
    const T rest = sum_over<T>(size(), [&](int64_t i) { return means.rest(g[i], u[i], x[i] - m); });
    const auto second = Second<T>::of(norm, means, rest, channel(s.dd_weight), channel(s.dd_bias), count);
    static_cast<T*>(s.d_weight)[plane] = second.d_weight;
    pool(j.H, W, static_cast<T*>(s.d_d_out) + pooled(),
         [&](int64_t i) { return through(norm(x[i]), second.d_g(u[i], x[i] - m)); });
    for (int64_t i = 0; i < size(); ++i) g[i] = second.d_x(g[i], u[i], x[i] - m);
  }
};

template <class T, class F> void each_plane(const NormActPool& j, int threads, F&& f) {
  const int64_t grain = (int64_t{1} << 15) / (j.H * j.W + 1) + 1;
  const auto run = [&](auto W) {
    parallel_for(threads, j.B * j.C, grain, [&](int64_t begin, int64_t end) {
      for (int64_t plane = begin; plane < end; ++plane) f(Plane<T, decltype(W)>{j, W, plane});
    });
  };
  if (j.W == 8) run(Fixed<8>{});
  else if (j.W == 16) run(Fixed<16>{});
  else if (j.W == 32) run(Fixed<32>{});
  else run(j.W);
}

// ---- [B, H, W, C]: `n` vectors of channels; of the last one only `part` lanes where it is partial ----

template <class T, int n, bool partial> struct Columns {
  using V = Simd<T>;
  const NormActPool& j;
  int64_t image, channel, part;

  int64_t place(int64_t positions) const { return image * positions * j.C + channel; }
  int64_t size() const { return j.H * j.W; }
  int64_t pooled() const { return (j.H / 2) * (j.W / 2); }
  static V get(const T* from, int64_t part) {
    if constexpr (partial) return load_some<T>(from, part);
    else return load<T>(from);
  }
  static void put(T* to, V value, int64_t part) {
    if constexpr (partial) store_some<T>(to, value, part);
    else store<T>(to, value);
  }
  // Vector c of a tensor [positions, C] at a position, or of one value a channel.
  V get(const T* at, int64_t position, int c) const { return get(at + position * j.C + c * kWidth<T>, part); }
  void put(T* at, int64_t position, int c, V value) const { put(at + position * j.C + c * kWidth<T>, value, part); }

  const T* full(const void* t) const { return static_cast<const T*>(t) + place(size()); }
  T* full(void* t) const { return static_cast<T*>(t) + place(size()); }
  const T* small(const void* t) const { return static_cast<const T*>(t) + place(pooled()); }
  T* small(void* t) const { return static_cast<T*>(t) + place(pooled()); }
  const T* plane(const void* t) const { return static_cast<const T*>(t) + place(1); }
  T* plane(void* t) const { return static_cast<T*>(t) + place(1); }
  V of_channel(const void* t, int c) const { return get(static_cast<const T*>(t) + channel, 0, c); }

  struct Norms {
    Norm<V> c[n];
  };
  Norms norms(const void* mean, const void* rstd) const {
    Norms all;
    for (int c = 0; c < n; ++c)
      all.c[c] = Norm<V>::of(of_channel(j.weight, c), of_channel(j.bias, c), get(plane(mean), 0, c),
                             get(plane(rstd), 0, c));
    return all;
  }

  // add(part, begin, end) adds up a piece of [0, count); each is summed on its own first, for the rounding's sake.
  template <class Sums, class F> void sum_pieces(Sums (&total)[n], int64_t count, int64_t piece, F&& add) const {
    for (int64_t begin = 0; begin < count; begin += piece) {
      Sums part[n] = {};
      add(part, begin, begin + piece < count ? begin + piece : count);
      for (int c = 0; c < n; ++c) total[c] += part[c];
    }
  }

  SPEEDK_SHARED void add_spread(Spread<V> (&total)[n], const V (&mean)[n], const T* x) const {
    sum_pieces(total, size(), kPiece, [&](Spread<V>(&part)[n], int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        for (int c = 0; c < n; ++c) part[c].add(get(x, i, c) - mean[c]);
    });
  }

  void forward(void* out, void* mean, void* rstd) const {
    const T* x = full(j.x);
    const V count = spread(static_cast<T>(size()));
    V rough[n] = {};  // first about zero, which gives the rough mean
    Spread<V> about_zero[n] = {}, about_mean[n] = {};
    add_spread(about_zero, rough, x);
    for (int c = 0; c < n; ++c) rough[c] = about_zero[c].centred / count;
    add_spread(about_mean, rough, x);
    for (int c = 0; c < n; ++c) {
      const auto statistics = Statistics<V>::of(rough[c], about_mean[c], count);
      V root = statistics.variance + static_cast<T>(j.eps);
      for (int l = 0; l < kWidth<T>; ++l) root[l] = inverse_root(root[l]);
      put(plane(mean), 0, c, statistics.mean);
      put(plane(rstd), 0, c, root);
    }
    const Norms norm = norms(mean, rstd);
    const int64_t step = j.C, below = j.W * step, h = j.H / 2, w = j.W / 2;  // in registers, whatever is stored
    T* to = small(out);
    for (int64_t row = 0; row < h; ++row) {
      for (int64_t column = 0; column < w; ++column, to += step) {
        const T* at = x + 2 * (row * below + column * step);
        for (int c = 0; c < n; ++c) {
          const auto value = [&](const T* from) { return relu(norm.c[c](get(from, 0, c))); };
          const V upper = value(at) + value(at + step), lower = value(at + below) + value(at + below + step);
          put(to, 0, c, static_cast<T>(0.25) * (upper + lower));
        }
      }
    }
  }

  // window(sums, its index, its upper left position) for every window, rest(sums, position) for what is not pooled.
  template <class Sums, class F, class G> void sum_windows(Sums (&total)[n], F&& window, G&& rest) const {
    const int64_t h = j.H / 2, w = j.W / 2;
    for (int64_t row = 0; row < h; ++row) {
      sum_pieces(total, w, kPiece / 4, [&](Sums(&part)[n], int64_t begin, int64_t end) {
        for (int64_t at = begin; at < end; ++at) window(part, row * w + at, 2 * (row * j.W + at));
      });
    }
    if (j.W % 2) {
      sum_pieces(total, 2 * h, kPiece, [&](Sums(&part)[n], int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) rest(part, (row + 1) * j.W - 1);
      });
    }
    if (j.H % 2) {
      sum_pieces(total, j.W, kPiece, [&](Sums(&part)[n], int64_t begin, int64_t end) {
        for (int64_t at = begin; at < end; ++at) rest(part, 2 * h * j.W + at);
      });
    }
  }
  struct Nothing {
    void operator+=(Nothing) {}
  };
  template <class F, class G> void each_window(F&& window, G&& rest) const {
    Nothing none[n];
    sum_windows(none, [&](Nothing(&)[n], int64_t at, int64_t i) { window(at, i); },
                [&](Nothing(&)[n], int64_t i) { rest(i); });
  }

  void backward(const void* d_out, const void* mean, const void* rstd, void* d_x, void* d_weight, void* d_bias) const {
    const T *x = full(j.x), *slope = small(d_out);
    const Norms norm = norms(mean, rstd);
    const int64_t corners[4] = {0, 1, j.W, j.W + 1};
    FirstSums<V> sums[n] = {};
    sum_windows(sums, [&](FirstSums<V>(&part)[n], int64_t window, int64_t i) {
      for (int c = 0; c < n; ++c) {
        const V d = static_cast<T>(0.25) * get(slope, window, c);
        for (const int64_t corner : corners) {
          const V value = get(x, i + corner, c);
          part[c].add(through(norm.c[c](value), d), value - norm.c[c].mean);
        }
      }
    }, [](FirstSums<V>(&)[n], int64_t) {});
    First<V> first[n];
    for (int c = 0; c < n; ++c) {
      first[c] = First<V>::of(norm.c[c], sums[c], spread(static_cast<T>(size())));
      put(plane(d_weight), 0, c, first[c].d_weight);
      put(plane(d_bias), 0, c, first[c].d_bias);
    }
    T* to = full(d_x);
    each_window([&](int64_t window, int64_t i) {
      for (int c = 0; c < n; ++c) {
        const V d = static_cast<T>(0.25) * get(slope, window, c);
        for (const int64_t corner : corners) {
          const V value = get(x, i + corner, c);
          put(to, i + corner, c, first[c].d_x(through(norm.c[c](value), d), value - norm.c[c].mean));
        }
      }
    }, [&](int64_t i) {
      for (int c = 0; c < n; ++c) put(to, i, c, first[c].d_x(V{}, get(x, i, c) - norm.c[c].mean));
    });
  }

  void double_backward(const NormActPoolSecond& s) const {
    const T *x = full(j.x), *u = full(s.dd_x), *slope = small(s.d_out);
    const Norms norm = norms(s.mean, s.rstd);
    const int64_t corners[4] = {0, 1, j.W, j.W + 1};
    SecondSums<V> sums[n] = {};
    sum_windows(sums, [&](SecondSums<V>(&part)[n], int64_t window, int64_t i) {
      for (int c = 0; c < n; ++c) {
        const V d = static_cast<T>(0.25) * get(slope, window, c);
        for (const int64_t corner : corners) {
          const V value = get(x, i + corner, c);
          part[c].add(through(norm.c[c](value), d), get(u, i + corner, c), value - norm.c[c].mean);
        }
      }
    }, [&](SecondSums<V>(&part)[n], int64_t i) {
      for (int c = 0; c < n; ++c) part[c].add(get(u, i, c), get(x, i, c) - norm.c[c].mean);
    });
    const V count = spread(static_cast<T>(size()));
    SecondMeans<V> means[n];
    for (int c = 0; c < n; ++c) means[c] = SecondMeans<V>::of(norm.c[c], sums[c], count);
    V rest[n] = {};
    sum_windows(rest, [&](V(&part)[n], int64_t window, int64_t i) {
      for (int c = 0; c < n; ++c) {
        const V d = static_cast<T>(0.25) * get(slope, window, c);
        for (const int64_t corner : corners) {
          const V value = get(x, i + corner, c);
          part[c] += means[c].rest(through(norm.c[c](value), d), get(u, i + corner, c), value - norm.c[c].mean);
        }
      }
    }, [&](V(&part)[n], int64_t i) {
      for (int c = 0; c < n; ++c) part[c] += means[c].rest(V{}, get(u, i, c), get(x, i, c) - norm.c[c].mean);
    });
    Second<V> second[n];
    for (int c = 0; c < n; ++c) {
      second[c] = Second<V>::of(norm.c[c], means[c], rest[c], of_channel(s.dd_weight, c), of_channel(s.dd_bias, c),
                                count);
      put(plane(s.d_weight), 0, c, second[c].d_weight);
    }
    T *to = full(s.d_x), *pooled = small(s.d_d_out);
    each_window([&](int64_t window, int64_t i) {
      for (int c = 0; c < n; ++c) {
        const V d = static_cast<T>(0.25) * get(slope, window, c);
        V total{};
        for (const int64_t corner : corners) {
          const V value = get(x, i + corner, c), v = get(u, i + corner, c), a = norm.c[c](value);
          const V centred = value - norm.c[c].mean;
          total += through(a, second[c].d_g(v, centred));
          put(to, i + corner, c, second[c].d_x(through(a, d), v, centred));
        }
        put(pooled, window, c, static_cast<T>(0.25) * total);
      }
    }, [&](int64_t i) {
      for (int c = 0; c < n; ++c) put(to, i, c, second[c].d_x(V{}, get(u, i, c), get(x, i, c) - norm.c[c].mean));
    });
  }
};

template <class T, class F> void each_block_of_columns(const NormActPool& j, int threads, F&& f) {
  constexpr int64_t width = kWidth<T>, wide = kColumns * width;
  const int64_t blocks = (j.C + wide - 1) / wide;
  const int64_t grain = (int64_t{1} << 15) / (j.H * j.W * wide + 1) + 1;
  parallel_for(threads, j.B * blocks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t image = block / blocks, stop = block % blocks * wide + wide;
      int64_t channel = stop - wide;
      if (stop <= j.C) {
        f(Columns<T, kColumns, false>{j, image, channel, 0});
        continue;
      }
      for (; channel + width <= j.C; channel += width) f(Columns<T, 1, false>{j, image, channel, 0});
      if (channel < j.C) f(Columns<T, 1, true>{j, image, channel, j.C - channel});
    }
  });
}

template <class F> void run(const NormActPool& j, int threads, F&& f) {
  if (j.channels_last) {
    if (j.dtype == Dtype::float64) each_block_of_columns<double>(j, threads, f);
    else each_block_of_columns<float>(j, threads, f);
  } else {
    if (j.dtype == Dtype::float64) each_plane<double>(j, threads, f);
    else each_plane<float>(j, threads, f);
  }
}

}  // namespace

void norm_act_pool(const NormActPool& job, void* out, void* mean, void* rstd, int threads) {
  run(job, threads, [&](const auto& part) { part.forward(out, mean, rstd); });
}

void norm_act_pool_backward(const NormActPool& job, const void* d_out, const void* mean, const void* rstd, void* d_x,
                            void* d_weight, void* d_bias, int threads) {
  run(job, threads, [&](const auto& part) { part.backward(d_out, mean, rstd, d_x, d_weight, d_bias); });
}

void norm_act_pool_double_backward(const NormActPool& job, const NormActPoolSecond& second, int threads) {
  run(job, threads, [&](const auto& part) { part.double_backward(second); });
}

}  // namespace SPEEDK_ISA
}  // namespace speedk
