// Folding: one block per adapter. Sums, the centred up-projection and the Cholesky factor of its Gram matrix are
// float64 (docs/design.md says what is folded and why). The up-projection is read once, into shared memory, if it fits.
#pragma once

#include "common.cuh"

namespace hyperformer_fast {

struct FoldTraits {
  static constexpr int kThreads = 256, kWarps = kThreads / 32;
  static constexpr int kSide = 3;  // a warp multiplies so many blocks of 8 columns by as many others
  // The length of a row of [W_u | b_u] in shared memory; odd, so that the rows of a column are in different banks.
  static constexpr __host__ __device__ int pitch(int b) { return (b + 1) | 1; }
  // Doubles: means, peaks, scales, the upper triangle of the Gram matrix, and a number for each thread.
  static constexpr __host__ __device__ int doubles(int b) { return (b + 1) * 3 + (b + 1) * (b + 2) / 2 + kThreads; }
  // Rows of [W_u | b_u] that are on chip at a time: all of them where they fit.
  static constexpr __host__ __device__ int tile(int d, int b) {
    const int fit = (kMostSharedBytes - doubles(b) * 8) / (pitch(b) * 4);
    return d < fit ? d : fit;
  }
  static constexpr int bytes(int d, int b) { return doubles(b) * 8 + tile(d, b) * pitch(b) * 4; }
};
static_assert(FoldTraits::kThreads > kLargestBottleneck, "each of the b + 1 columns needs a thread");
static_assert(FoldTraits::tile(1 << 20, kLargestBottleneck) >= 4 * FoldTraits::kWarps, "every warp has rows");

__device__ __forceinline__ int triangle(int i, int j, int n) { return i * n - i * (i - 1) / 2 + j - i; }

// 2^floor(log2 m) within float32's normal range; 1 where m is 0 or not finite.
__device__ __forceinline__ double power_of_two(double m) {
  if (!(m > 0.0 && m < 1e308)) return 1.0;
  const int exponent = ilogb(m);
  return ldexp(1.0, exponent < -126 ? -126 : exponent > 126 ? 126 : exponent);
}

// The maximum, propagating NaN (fmax drops it).
__device__ __forceinline__ double larger(double a, double b) { return a == a && !(b <= a) ? b : a; }

// Cholesky factorisation of G, whose upper triangle lies in shared memory. Afterwards row i of G times scales[i] is row
// i of R, where R^T R = G. A pivot that is lost to rounding leaves an empty row. Because the scales stay beside the
// rows, a step needs only one barrier.
__device__ __forceinline__ void square_root(double* G, double* scales, int n) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int i = threadIdx.x; i < n; i += FoldTraits::kThreads)
    scales[i] = G[triangle(i, i, n)] * n * 2.220446049250313e-16;  // the smallest pivots that are kept, for now
  __syncthreads();
  for (int c = 0; c < n; ++c) {
    const double* const row = G + triangle(c, 0, n);  // its numbers from column c on
    const double pivot = row[c];
    const double inverse = pivot <= scales[c] ? 0.0 : rsqrt(pivot);  // a NaN pivot is kept, so that it is seen
    for (int i = c + 1 + warp; i < n; i += FoldTraits::kWarps) {
      const double left = row[i] * inverse;
      for (int j = i + lane; j < n; j += 32) G[triangle(i, j, n)] -= left * (row[j] * inverse);
    }
    __syncthreads();
    if (threadIdx.x == 0) scales[c] = inverse;
  }
  __syncthreads();
}

// Calls to(i, from(i)) for all i < n. Sixteen loads are issued before the first store, because the compiler must assume
// that the store aliases their source. A block alone on its multiprocessor has little else to hide their latency.
template <class From, class To>
__device__ __forceinline__ void each_of(int n, From from, To to) {
  constexpr int kAtOnce = 16, kThreads = FoldTraits::kThreads;
  for (int64_t first = threadIdx.x; first < n; first += kAtOnce * kThreads) {
    decltype(from(0)) value[kAtOnce] = {};
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u)
      if (first + u * kThreads < n) value[u] = from(int(first) + u * kThreads);
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u)
      if (first + u * kThreads < n) to(int(first) + u * kThreads, value[u]);
  }
}

// Writes W_d, in which a pre-norm's gamma is folded, and the down bias.
template <class S>
__device__ __forceinline__ void fold_down(const FoldParams& p, const float* packed, typename S::T* wd, float* vectors) {
  constexpr int kThreads = FoldTraits::kThreads;
  const int d = p.d, b = p.b, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const float* const pre_gamma = packed + p.at.pre_gamma;
  if (!p.pre_norm && p.aligned) {
    struct alignas(4 * sizeof(typename S::T)) Four {
      typename S::T number[4];
    };
    each_of(
        b * d / 4, [&](int i) { return reinterpret_cast<const float4*>(packed)[i]; },
        [&](int i, const float4& w) {
          reinterpret_cast<Four*>(wd)[i] = {{S::narrow(w.x), S::narrow(w.y), S::narrow(w.z), S::narrow(w.w)}};
        });
  } else {
    each_of(
        b * d, [&](int i) { return p.pre_norm ? float(double(packed[i]) * pre_gamma[i % d]) : packed[i]; },
        [&](int i, float value) { wd[i] = S::narrow(value); });
  }
  for (int j = warp; j < b; j += kThreads / 32) {
    double shift = 0.0;
    if (p.pre_norm) {
      for (int i = lane; i < d; i += 32) shift += double(packed[j * d + i]) * pre_gamma[d + i];
      shift = lane_sum<32>(shift);
    }
    if (lane == 0) vectors[j] = float(packed[p.at.down_bias + j] + shift);
  }
}

// What the columns of [W_u | b_u] - mean sum to: the upper triangle of the Gram matrix, and the largest |W_u gamma| of
// each column. `tile` has `rows` rows of [W_u | b_u].
//
// The Gram matrix of W_u is a product of float64 tensor cores, whose two operands have the same fragments. A warp takes
// kSide by kSide blocks of 8 by 8, so that it reads and centres a number once for several products. Where there are
// fewer such parts than warps, several warps share a part, each with every so-many-th run of four rows, and add what
// they found in turn. The border, from b_u, is plain multiply-adds.
__device__ __forceinline__ void add_to_gram(const float* tile, int rows, int b, const float* gamma, const double* mean,
                                            double* gram, double* peak) {
  constexpr int kSide = FoldTraits::kSide, kWarps = FoldTraits::kWarps;
  const int n = b + 1, pitch = FoldTraits::pitch(b), lane = threadIdx.x % 32, warp = threadIdx.x / 32, quad = lane / 4,
            t = lane % 4;
  const int blocks = (b + 7) / 8, sides = (blocks + kSide - 1) / kSide, parts = sides * (sides + 1) / 2;
  const int sharing = parts == 1 ? kWarps : parts <= kWarps / 2 ? 2 : 1;
  for (int first = 0; first < parts; first += kWarps / sharing) {
    const int part = first + warp / sharing, mine = warp % sharing;
    int from = 0, to = part;
    while (from < sides && to >= sides - from) to -= sides - from, ++from;
    to += from;
    const bool diagonal = from == to;
    double sum[kSide][kSide][2] = {}, border[kSide] = {}, largest[kSide] = {}, corner = 0.0;
    if (part < parts) {
      double left_mean[kSide], right_mean[kSide];
      for (int u = 0; u < kSide; ++u) {
        const int left = (from * kSide + u) * 8 + quad, right = (to * kSide + u) * 8 + quad;
        left_mean[u] = left < b ? mean[left] : 0.0, right_mean[u] = right < b ? mean[right] : 0.0;
      }
      for (int row = mine * 4 + t; row - t < rows; row += sharing * 4) {
        const bool there = row < rows;
        const float* const numbers = tile + row * pitch;
        double left[kSide], right[kSide];
#pragma unroll
        for (int u = 0; u < kSide; ++u) {
          const int i = (from * kSide + u) * 8 + quad, j = (to * kSide + u) * 8 + quad;
          left[u] = there && i < b ? numbers[i] - left_mean[u] : 0.0;
          right[u] = diagonal ? left[u] : there && j < b ? numbers[j] - right_mean[u] : 0.0;
        }
#pragma unroll
        for (int u = 0; u < kSide; ++u)
#pragma unroll
          for (int v = 0; v < kSide; ++v)
            if ((!diagonal || u <= v) && to * kSide + v < blocks) mma_f64(sum[u][v], left[u], right[v]);
        if (!diagonal) continue;
        const double bias = there ? numbers[b] - mean[b] : 0.0, of_row = there ? gamma[row] : 0.0f;
        corner += bias * bias;
#pragma unroll
        for (int u = 0; u < kSide; ++u) {
          border[u] += left[u] * bias;
          largest[u] = larger(largest[u], fabs(left[u] * of_row));
        }
      }
      corner = lane_sum<4>(corner);
      for (int u = 0; u < kSide; ++u) {
        border[u] = lane_sum<4>(border[u]);
        for (int lanes = 2; lanes > 0; lanes /= 2)
          largest[u] = larger(largest[u], __shfl_xor_sync(~0u, largest[u], lanes));
      }
    }
    for (int turn = 0; turn < sharing; ++turn) {
      if (turn == mine && part < parts) {
#pragma unroll
        for (int u = 0; u < kSide; ++u) {
          const int i = (from * kSide + u) * 8 + quad;
          if (i >= b) continue;
#pragma unroll
          for (int v = 0; v < kSide; ++v)
            for (int e = 0; e < 2; ++e) {
              const int j = (to * kSide + v) * 8 + t * 2 + e;
              if (i <= j && j < b) gram[triangle(i, j, n)] += sum[u][v][e];
            }
          if (!diagonal || t != 0) continue;
          gram[triangle(i, b, n)] += border[u];
          peak[i] = larger(peak[i], largest[u]);
        }
        if (part == 0 && lane == 0) gram[triangle(b, b, n)] += corner;
      }
      __syncthreads();
    }
  }
}

template <class S>
__device__ __forceinline__ void fold_adapter(const FoldParams& p, int64_t m, unsigned char* shared) {
  using T = typename S::T;
  constexpr int kThreads = FoldTraits::kThreads;
  const int d = p.d, b = p.b, n = b + 1, thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int pitch = FoldTraits::pitch(b), fit = FoldTraits::tile(d, b);
  double* const mean = reinterpret_cast<double*>(shared);
  double* const peak = mean + n;
  double* const scales = peak + n;
  double* const gram = scales + n;
  double* const parts = gram + n * (n + 1) / 2;
  float* const tile = reinterpret_cast<float*>(parts + kThreads);
  const float* const packed = p.packed + m * p.at.P;
  const float *const up = packed + p.at.up, *const up_bias = packed + p.at.up_bias, *const gamma = packed + p.at.gamma;
  T* const wd = static_cast<T*>(p.wd) + m * b * d;
  T* const wg = static_cast<T*>(p.wg) + m * b * d;
  float* const vectors = p.vectors + m * p.V;

  const auto fetch = [&](int first) {
    for (int row = warp; row < fit && first + row < d; row += FoldTraits::kWarps)
      for (int j = lane; j < n; j += 32)
        copy_async<4>(tile + row * pitch + j, j < b ? up + int64_t(first + row) * b + j : up_bias + first + row, true);
    copy_commit();
  };
  fetch(0);
  fold_down<S>(p, packed, wd, vectors);
  bool fetched = true;
  // Calls body(first, rows) for one tile of [W_u | b_u] after the other. If there is one only, it is fetched once.
  const auto each_tile = [&](auto body) {
    for (int first = 0; first < d; first += fit) {
      if (!fetched) fetch(first);
      fetched = fit == d;
      copy_wait<0>();
      __syncthreads();
      body(first, d - first < fit ? d - first : fit);
      __syncthreads();
    }
  };
  if (!p.post_norm) {
    each_tile([&](int first, int rows) {
      for (int j = warp; j < n; j += FoldTraits::kWarps)
        for (int row = lane; row < rows; row += 32) {
          const float w = tile[row * pitch + j];
          if (j < b)
            wg[int64_t(j) * d + first + row] = S::narrow(w);
          else
            vectors[b + first + row] = w;
        }
    });
    return;
  }

  for (int i = thread; i < n * (n + 1) / 2; i += kThreads) gram[i] = 0.0;
  for (int j = thread; j < n; j += kThreads) peak[j] = 0.0;
  const int groups = kThreads / n, group = thread / n;
  double sum = 0.0;
  each_tile([&](int, int rows) {
#pragma unroll 4
    for (int row = group; group < groups && row < rows; row += groups) sum += tile[row * pitch + thread % n];
  });
  parts[thread] = sum;
  __syncthreads();
  for (int j = thread; j < n; j += kThreads) {
    double all = 0.0;
    for (int i = 0; i < groups; ++i) all += parts[i * n + j];
    mean[j] = all / d;
    p.mean[m * n + j] = float(mean[j]);
  }
  each_tile([&](int first, int rows) { add_to_gram(tile, rows, b, gamma + first, mean, gram, peak); });
  for (int i = thread; i < n * (n + 1) / 2; i += kThreads) gram[i] /= d;
  for (int j = thread; j < b; j += kThreads) {
    const double power = power_of_two(peak[j]);
    peak[j] = 1.0 / power;  // exact, so that W_g may be multiplied by it
    p.scale[m * b + j] = float(power);
  }
  __syncthreads();
  square_root(gram, scales, n);
  for (int i = warp; i < n; i += FoldTraits::kWarps)
    for (int j = lane; j < n; j += 32)
      p.root[(m * n + i) * n + j] = j < i ? 0.0f : float(gram[triangle(i, j, n)] * scales[i]);
  each_tile([&](int first, int rows) {
    for (int j = warp; j < n; j += FoldTraits::kWarps) {
      const double of_column = mean[j], inverse = j < b ? peak[j] : 1.0;
#pragma unroll 4
      for (int row = lane; row < rows; row += 32) {
        const float w = float((tile[row * pitch + j] - of_column) * gamma[first + row] * inverse);
        if (j < b)
          wg[int64_t(j) * d + first + row] = S::narrow(w);
        else
          vectors[b + first + row] = w;
      }
    }
  });
  for (int i = thread; i < d; i += kThreads) vectors[b + d + i] = gamma[d + i];
}

}  // namespace hyperformer_fast
