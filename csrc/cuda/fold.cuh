// Folding: one block per adapter. Sums, the centred up-projection and the Cholesky factor of its Gram matrix are
// float64 (docs/design.md says what is folded and why).
#pragma once

#include "common.cuh"

namespace hyperformer_fast {

struct FoldTraits {
  static constexpr int kThreads = 256;
  // Rows of W_u that are centred at a time: as many as leave room for the Gram matrix within kMostSharedBytes.
  static constexpr __host__ __device__ int tile(int b) { return b > 64 ? 16 : b > 32 ? 64 : 128; }
  // Shared memory: means, peaks, scales, the upper triangle of the Gram matrix, and a tile of [W_u | b_u].
  static constexpr int bytes(int b) { return ((b + 1) * 3 + (b + 1) * (b + 2) / 2 + tile(b) * (b + 1)) * 8; }
};
static_assert(FoldTraits::kThreads > kLargestBottleneck, "each of the b + 1 columns needs a thread");
static_assert(FoldTraits::bytes(32) <= kMostSharedBytes && FoldTraits::bytes(64) <= kMostSharedBytes &&
              FoldTraits::bytes(kLargestBottleneck) <= kMostSharedBytes);

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
  constexpr int kThreads = FoldTraits::kThreads;
  for (int i = threadIdx.x; i < n; i += kThreads)
    scales[i] = G[triangle(i, i, n)] * n * 2.220446049250313e-16;  // the smallest pivots that are kept, for now
  __syncthreads();
  for (int c = 0; c < n; ++c) {
    const double pivot = G[triangle(c, c, n)];
    const double inverse = pivot <= scales[c] ? 0.0 : 1.0 / sqrt(pivot);  // a NaN pivot is kept, so that it is seen
    const int left = n - c - 1;
    for (int e = threadIdx.x; e < left * left; e += kThreads) {
      const int i = c + 1 + e / left, j = c + 1 + e % left;
      if (j >= i) G[triangle(i, j, n)] -= G[triangle(c, i, n)] * inverse * (G[triangle(c, j, n)] * inverse);
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

template <class S>
__device__ __forceinline__ void fold_adapter(const FoldParams& p, int64_t m, unsigned char* shared) {
  using T = typename S::T;
  constexpr int kThreads = FoldTraits::kThreads;
  const int d = p.d, b = p.b, n = b + 1, thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  double* const mean = reinterpret_cast<double*>(shared);
  double* const peak = mean + n;
  double* const scales = peak + n;
  double* const gram = scales + n;
  double* const tile = gram + n * (n + 1) / 2;
  const float* const packed = p.packed + m * p.at.P;
  const float *const up = packed + p.at.up, *const up_bias = packed + p.at.up_bias;
  const float *const gamma = packed + p.at.gamma, *const pre_gamma = packed + p.at.pre_gamma;
  T* const wd = static_cast<T*>(p.wd) + m * b * d;
  T* const wg = static_cast<T*>(p.wg) + m * b * d;
  float* const vectors = p.vectors + m * p.V;

  each_of(
      b * d, [&](int i) { return p.pre_norm ? float(double(packed[i]) * pre_gamma[i % d]) : packed[i]; },
      [&](int i, float value) { wd[i] = S::narrow(value); });
  for (int j = warp; j < b; j += kThreads / 32) {
    double shift = 0.0;
    if (p.pre_norm) {
      for (int i = lane; i < d; i += 32) shift += double(packed[j * d + i]) * pre_gamma[d + i];
      shift = lane_sum<32>(shift);
    }
    if (lane == 0) vectors[j] = float(packed[p.at.down_bias + j] + shift);
  }
  if (!p.post_norm) {
    each_of(b * d, [&](int i) { return up[i % d * b + i / d]; }, [&](int i, float value) { wg[i] = S::narrow(value); });
    for (int i = thread; i < d; i += kThreads) vectors[b + i] = up_bias[i];
    return;
  }

  const auto entry = [&](int row, int j) { return j < b ? up[row * b + j] : up_bias[row]; };
  // Calls body for one tile of [W_u | b_u] - mean after the other.
  const auto each_tile = [&](auto body) {
    for (int first = 0; first < d; first += FoldTraits::tile(b)) {
      const int rows = d - first < FoldTraits::tile(b) ? d - first : FoldTraits::tile(b);
      each_of(
          rows * n, [&](int i) { return entry(first + i / n, i % n); },
          [&](int i, float value) { tile[i] = value - mean[i % n]; });
      __syncthreads();
      body(first, rows);
      __syncthreads();
    }
  };
  for (int i = thread; i < n * (n + 1) / 2; i += kThreads) gram[i] = 0.0;
  for (int j = thread; j < n; j += kThreads) mean[j] = 0.0;
  __syncthreads();
  const int groups = kThreads / n < FoldTraits::tile(b) ? kThreads / n : FoldTraits::tile(b), group = thread / n;
  double sum = 0.0, largest = 0.0;
  each_tile([&](int, int rows) {
    for (int row = group; group < groups && row < rows; row += groups) sum += tile[row * n + thread % n];
  });
  if (group < groups) tile[thread] = sum;
  __syncthreads();
  for (int j = thread; j < n; j += kThreads) {
    double all = 0.0;
    for (int i = 0; i < groups; ++i) all += tile[i * n + j];
    mean[j] = all / d;
    p.mean[m * n + j] = float(mean[j]);
  }
  __syncthreads();
  const int half = n / 2 + 1;
  each_tile([&](int first, int rows) {
    // Each pair of columns once: column i with itself and with the n / 2 columns that follow it in a circle. For even n
    // the last of those meets i again from the other side, and one of the two is skipped.
    for (int e = thread; e < n * half; e += kThreads) {
      const int one = e / half, other = (one + e % half) % n;
      if (2 * (e % half) == n && one >= half - 1) continue;
      const int i = one < other ? one : other, j = one < other ? other : one;
      double sum = gram[triangle(i, j, n)];
#pragma unroll 4
      for (int row = 0; row < rows; ++row) sum += tile[row * n + i] * tile[row * n + j];
      gram[triangle(i, j, n)] = sum;
    }
    for (int row = group; group < groups && row < rows; row += groups)
      largest = larger(largest, fabs(tile[row * n + thread % n] * gamma[first + row]));
  });
  if (group < groups) tile[thread] = largest;
  for (int i = thread; i < n * (n + 1) / 2; i += kThreads) gram[i] /= d;
  __syncthreads();
  for (int j = thread; j < b; j += kThreads) {
    double all = 0.0;
    for (int i = 0; i < groups; ++i) all = larger(all, tile[i * n + j]);
    peak[j] = power_of_two(all);
    p.scale[m * b + j] = float(peak[j]);
  }
  square_root(gram, scales, n);
  for (int e = thread; e < n * n; e += kThreads) {
    const int i = e / n, j = e % n;
    p.root[m * n * n + e] = j < i ? 0.0f : float(gram[triangle(i, j, n)] * scales[i]);
  }
  each_of(
      b * d,
      [&](int i) {
        const int j = i / d, row = i % d;
        return float((entry(row, j) - mean[j]) * gamma[row] / peak[j]);
      },
      [&](int i, float value) { wg[i] = S::narrow(value); });
  for (int i = thread; i < d; i += kThreads) {
    vectors[b + i] = float((entry(i, b) - mean[b]) * gamma[i]);
    vectors[b + d + i] = gamma[d + i];
  }
}

}  // namespace hyperformer_fast
