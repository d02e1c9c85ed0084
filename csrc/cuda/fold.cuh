// Folding: one block an adapter. Sums, the centred up-projection and the Cholesky factor of its Gram matrix are float64
// (docs/design.md says what is folded and why).
#pragma once

#include "common.cuh"

namespace hyperformer_fast {

struct FoldTraits {
  static constexpr int THREADS = 256, TILE = 16;  // rows of W_u that are centred at a time
  // Means, peaks, the diagonal, the upper triangle of the Gram matrix, a tile of [W_u | b_u].
  static constexpr int bytes(int b) { return ((b + 1) * 3 + (b + 1) * (b + 2) / 2 + TILE * (b + 1)) * 8; }
};

__device__ __forceinline__ int triangle(int i, int j, int n) { return i * n - i * (i - 1) / 2 + j - i; }

// 2^floor(log2 m) within float32's normal range; 1 where m is 0 or not finite.
__device__ __forceinline__ double power_of_two(double m) {
  if (!(m > 0.0 && m < 1e308)) return 1.0;
  const int exponent = ilogb(m);
  return ldexp(1.0, exponent < -126 ? -126 : exponent > 126 ? 126 : exponent);
}

// G, upper triangle in shared memory, becomes R with R^T R = G; a pivot lost to rounding leaves an empty row.
__device__ __forceinline__ void square_root(double* G, double* diagonal, int n) {
  constexpr int THREADS = FoldTraits::THREADS;
  for (int i = threadIdx.x; i < n; i += THREADS) diagonal[i] = G[triangle(i, i, n)] * n * 2.220446049250313e-16;
  __syncthreads();
  for (int c = 0; c < n; ++c) {
    const double pivot = G[triangle(c, c, n)];
    const double inverse = pivot <= diagonal[c] ? 0.0 : 1.0 / sqrt(pivot);  // a NaN is kept, and seen
    __syncthreads();
    for (int j = c + int(threadIdx.x); j < n; j += THREADS) G[triangle(c, j, n)] *= inverse;
    __syncthreads();
    const int left = n - c - 1;
    for (int e = threadIdx.x; e < left * left; e += THREADS) {
      const int i = c + 1 + e / left, j = c + 1 + e % left;
      if (j >= i) G[triangle(i, j, n)] -= G[triangle(c, i, n)] * G[triangle(c, j, n)];
    }
    __syncthreads();
  }
}

template <class S>
__device__ __forceinline__ void fold_adapter(const FoldParams& p, int64_t m, unsigned char* shared) {
  using T = typename S::T;
  constexpr int THREADS = FoldTraits::THREADS, TILE = FoldTraits::TILE;
  const int d = p.d, b = p.b, n = b + 1, thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  double* const mean = reinterpret_cast<double*>(shared);
  double* const peak = mean + n;
  double* const diagonal = peak + n;
  double* const gram = diagonal + n;
  double* const tile = gram + n * (n + 1) / 2;
  const float* const packed = p.packed + m * p.at.P;
  const float *const up = packed + p.at.up, *const up_bias = packed + p.at.up_bias;
  const float *const gamma = packed + p.at.gamma, *const pre_gamma = packed + p.at.pre_gamma;
  T* const wd = static_cast<T*>(p.wd) + m * b * d;
  T* const wg = static_cast<T*>(p.wg) + m * b * d;
  float* const vectors = p.vectors + m * p.V;

  for (int i = thread; i < b * d; i += THREADS)
    wd[i] = S::narrow(p.pre_norm ? float(double(packed[i]) * pre_gamma[i % d]) : packed[i]);
  for (int j = warp; j < b; j += THREADS / 32) {
    double shift = 0.0;
    if (p.pre_norm) {
      for (int i = lane; i < d; i += 32) shift += double(packed[j * d + i]) * pre_gamma[d + i];
      shift = lane_sum<32>(shift);
    }
    if (lane == 0) vectors[j] = float(packed[p.at.down_bias + j] + shift);
  }
  if (!p.post_norm) {
    for (int i = thread; i < b * d; i += THREADS) wg[i] = S::narrow(up[i % d * b + i / d]);
    for (int i = thread; i < d; i += THREADS) vectors[b + i] = up_bias[i];
    return;
  }

  const auto entry = [&](int row, int j) { return double(j < b ? up[row * b + j] : up_bias[row]); };
  for (int j = warp; j < n; j += THREADS / 32) {
    double sum = 0.0;
    for (int i = lane; i < d; i += 32) sum += entry(i, j);
    sum = lane_sum<32>(sum) / d;
    if (lane == 0) {
      mean[j] = sum;
      p.mean[m * n + j] = float(sum);
    }
  }
  for (int i = thread; i < n * (n + 1) / 2; i += THREADS) gram[i] = 0.0;
  for (int j = thread; j < n; j += THREADS) peak[j] = 0.0;
  __syncthreads();
  for (int first = 0; first < d; first += TILE) {
    const int rows = d - first < TILE ? d - first : TILE;
    for (int i = thread; i < rows * n; i += THREADS) tile[i] = entry(first + i / n, i % n) - mean[i % n];
    __syncthreads();
    for (int e = thread; e < n * n; e += THREADS) {
      const int i = e / n, j = e % n;
      if (j < i) continue;
      double sum = gram[triangle(i, j, n)];
      for (int row = 0; row < rows; ++row) sum += tile[row * n + i] * tile[row * n + j];
      gram[triangle(i, j, n)] = sum;
    }
    for (int j = thread; j < b; j += THREADS)
      for (int row = 0; row < rows; ++row) {
        const double value = fabs(tile[row * n + j] * gamma[first + row]);
        if (peak[j] == peak[j] && !(value <= peak[j])) peak[j] = value;  // a NaN comes in, and stays
      }
    __syncthreads();
  }
  for (int i = thread; i < n * (n + 1) / 2; i += THREADS) gram[i] /= d;
  for (int j = thread; j < b; j += THREADS) {
    peak[j] = power_of_two(peak[j]);
    p.scale[m * b + j] = float(peak[j]);
  }
  __syncthreads();
  square_root(gram, diagonal, n);
  for (int e = thread; e < n * n; e += THREADS) {
    const int i = e / n, j = e % n;
    p.root[m * n * n + e] = j < i ? 0.0f : float(gram[triangle(i, j, n)]);
  }
  for (int i = thread; i < b * d; i += THREADS) {
    const int j = i / d, row = i % d;
    wg[i] = S::narrow(float((entry(row, j) - mean[j]) * gamma[row] / peak[j]));
  }
  for (int i = thread; i < d; i += THREADS) {
    vectors[b + i] = float((entry(i, b) - mean[b]) * gamma[i]);
    vectors[b + d + i] = gamma[d + i];
  }
}

}  // namespace hyperformer_fast
