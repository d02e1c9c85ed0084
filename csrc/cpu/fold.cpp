#include "fold.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "convert.h"
#include "multiversion.h"

namespace hyperformer_fast {
namespace {

// Eight doubles: one AVX-512 register, two of AVX2, four of SSE2 or NEON.
constexpr int64_t kLanes = 8;
typedef double Vec __attribute__((vector_size(kLanes * sizeof(double)), aligned(sizeof(double)), may_alias));

// Rows of Wa whose products are summed before they go to memory: 64 rows of 136 doubles stay in a level-1 or -2 cache,
// and a sum in blocks loses less than one long sum.
constexpr int64_t kBlock = 64;
// Columns of the Gram matrix held in registers at once: 4 x 16 doubles are 8 AVX-512 registers, or all 16 of AVX2.
constexpr int64_t kTile = 4;

constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Doubles in a row of Wa = [W_u | b_u], padded with zero columns to whole vectors.
int64_t padded(const AdapterLayout& l) { return round_up(l.b + 1, kLanes); }

struct Scratch {
  double *wa, *gram, *column;  // [d, k], [k, k], [3, k] with k = padded(layout)
  Scratch(double* base, const AdapterLayout& l)
      : wa(base), gram(wa + l.d * padded(l)), column(gram + padded(l) * padded(l)) {}
};

template <typename T>
HF_INLINE T rounded(float x);
template <>
HF_INLINE float rounded<float>(float x) {
  return x;
}
struct BF16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};
template <>
HF_INLINE BF16 rounded<BF16>(float x) {
  return {to_bf16(x)};
}
template <>
HF_INLINE F16 rounded<F16>(float x) {
  return {to_f16(x)};
}

// wd = W_d * gamma_pre in T, and the down bias with W_d beta_pre.
template <typename T>
HF_INLINE void fold_down(const float* packed, const AdapterLayout& l, T* wd, float* bias) {
  const float *w = packed + l.down_weight(), *b_d = packed + l.down_bias();
  const float *gamma = packed + l.pre_gamma(), *beta = packed + l.pre_beta();
  for (int64_t j = 0; j < l.b; ++j, w += l.d, wd += l.d) {
    bias[j] = b_d[j];
    if (!l.pre_norm) {
      for (int64_t i = 0; i < l.d; ++i) wd[i] = rounded<T>(w[i]);
      continue;
    }
    for (int64_t i = 0; i < l.d; ++i) wd[i] = rounded<T>(w[i] * gamma[i]);
    double lane[kLanes] = {};
    int64_t i = 0;
    for (; i + kLanes <= l.d; i += kLanes)
      for (int64_t v = 0; v < kLanes; ++v) lane[v] += double(w[i + v]) * beta[i + v];
    for (; i < l.d; ++i) lane[0] += double(w[i]) * beta[i];
    double sum = b_d[j];
    for (int64_t v = 0; v < kLanes; ++v) sum += lane[v];
    bias[j] = float(sum);
  }
}

// wa = [W_u | b_u] less its column means, zero-padded; the means to `mean` [k] in float64.
HF_INLINE void centre(const float* packed, const AdapterLayout& l, int64_t k, double* __restrict wa,
                      double* __restrict mean) {
  const float *w = packed + l.up_weight(), *b_u = packed + l.up_bias();
  std::fill(mean, mean + k, 0.0);
  for (int64_t i = 0; i < l.d; ++i, w += l.b) {
    double* __restrict row = wa + i * k;
    for (int64_t j = 0; j < l.b; ++j) row[j] = w[j];
    row[l.b] = b_u[i];
    for (int64_t j = l.b + 1; j < k; ++j) row[j] = 0.0;
    for (int64_t j = 0; j < k; ++j) mean[j] += row[j];
  }
  for (int64_t j = 0; j < k; ++j) mean[j] /= double(l.d);
  for (int64_t i = 0; i < l.d; ++i)
    for (int64_t j = 0; j < k; ++j) wa[i * k + j] -= mean[j];
}

// gram += A^T A over `rows` rows, columns [i, i + kTile) against [j, j + N vectors).
template <int N>
HF_INLINE void gram_tile(const double* a, int64_t k, int64_t rows, int64_t i, int64_t j, double* gram) {
  Vec sum[kTile][N] = {};
  for (int64_t r = 0; r < rows; ++r) {
    const double* row = a + r * k;
    for (int n = 0; n < N; ++n) {
      const Vec right = *reinterpret_cast<const Vec*>(row + j + n * kLanes);
      for (int64_t t = 0; t < kTile; ++t) sum[t][n] += right * row[i + t];
    }
  }
  for (int64_t t = 0; t < kTile; ++t)
    for (int n = 0; n < N; ++n) *reinterpret_cast<Vec*>(gram + (i + t) * k + j + n * kLanes) += sum[t][n];
}

// The upper triangle of A^T A (and, in its tiles, a little of the lower, which nobody reads).
HF_INLINE void gram_matrix(const double* a, int64_t d, int64_t k, double* gram) {
  std::fill(gram, gram + k * k, 0.0);
  for (int64_t r = 0; r < d; r += kBlock) {
    const int64_t rows = std::min(kBlock, d - r);
    for (int64_t i = 0; i < k; i += kTile) {
      int64_t j = i / kLanes * kLanes;
      for (; j + 2 * kLanes <= k; j += 2 * kLanes) gram_tile<2>(a + r * k, k, rows, i, j, gram);
      if (j < k) gram_tile<1>(a + r * k, k, rows, i, j, gram);
    }
  }
}

// gram / d -> its upper-triangular square root, in place and to `root` [n, n]. A pivot lost to rounding leaves an empty
// row: zero, duplicate and rank-one columns are legal weights.
HF_INLINE void square_root(double* gram, int64_t d, int64_t k, int64_t n, float* root) {
  for (int64_t j = 0; j < n; ++j) {
    double* row = gram + j * k;
    for (int64_t i = j; i < n; ++i) row[i] /= double(d);
    const double noise = row[j] * double(n) * std::numeric_limits<double>::epsilon();
    for (int64_t m = 0; m < j; ++m) {
      const double* above = gram + m * k;
      const double factor = above[j];
      for (int64_t i = j; i < n; ++i) row[i] -= factor * above[i];
    }
    const double pivot = row[j], inverse = 1.0 / std::sqrt(pivot);
    const bool lost = pivot <= noise;  // not !(pivot > noise): a NaN pivot is kept, and seen
    float* out = root + j * n;
    for (int64_t i = 0; i < j; ++i) out[i] = 0.0f;
    for (int64_t i = j; i < n; ++i) {
      row[i] = lost ? 0.0 : row[i] * inverse;
      out[i] = float(row[i]);
    }
  }
}

// 2^floor(log2 m), within float32's normal range; 1 where m is 0 or NaN.
HF_INLINE double power_of_two(double m) {
  if (!(m > 0)) return 1.0;
  return std::ldexp(1.0, std::min(std::max(std::ilogb(m), -126), 126));
}

// wg = (gamma * Wc / s)^T in T, s a power of two for each column; bg = gamma * bc.
template <typename T>
HF_INLINE void scale_up(const float* packed, const AdapterLayout& l, int64_t k, const Scratch& s, T* __restrict wg,
                        float* __restrict bg, float* __restrict scale) {
  const float* gamma = packed + l.post_gamma();
  double* __restrict largest = s.column + k, * __restrict poison = s.column + 2 * k;
  std::fill(largest, largest + 2 * k, 0.0);
  for (int64_t i = 0; i < l.d; ++i) {
    double* __restrict row = s.wa + i * k;
    for (int64_t j = 0; j < k; ++j) {
      row[j] *= gamma[i];
      largest[j] = std::max(largest[j], std::fabs(row[j]));
      poison[j] += row[j] * 0.0;  // NaN where an entry is NaN, which a maximum may drop, or infinite
    }
    bg[i] = float(row[l.b]);
  }
  for (int64_t j = 0; j < l.b; ++j) {
    const double power = power_of_two(largest[j] + poison[j]);
    scale[j] = float(power);
    largest[j] = 1.0 / power;  // exact
  }
  // Eight columns at a time: their numbers lie side by side in s.wa, and go to eight rows.
  for (int64_t first = 0; first < l.b; first += kLanes) {
    const int64_t last = std::min(first + kLanes, l.b);
    for (int64_t i = 0; i < l.d; ++i)
      for (int64_t j = first; j < last; ++j) wg[j * l.d + i] = rounded<T>(float(s.wa[i * k + j] * largest[j]));
  }
}

template <typename T>
HF_INLINE void fold_one(const float* packed, const AdapterLayout& l, const FoldedAdapter& out, double* base) {
  float* up_bias = out.vectors + l.b;
  fold_down(packed, l, static_cast<T*>(out.wd), out.vectors);
  T* wg = static_cast<T*>(out.wg);
  const float *w = packed + l.up_weight(), *b_u = packed + l.up_bias();
  if (!l.post_norm) {
    for (int64_t j = 0; j < l.b; ++j)
      for (int64_t i = 0; i < l.d; ++i) wg[j * l.d + i] = rounded<T>(w[i * l.b + j]);
    std::copy(b_u, b_u + l.d, up_bias);
    return;
  }
  const int64_t k = padded(l);
  const Scratch s(base, l);
  centre(packed, l, k, s.wa, s.column);
  for (int64_t j = 0; j <= l.b; ++j) out.mean[j] = float(s.column[j]);
  gram_matrix(s.wa, l.d, k, s.gram);
  square_root(s.gram, l.d, k, l.b + 1, out.root);
  scale_up(packed, l, k, s, wg, up_bias, out.scale);
  std::copy(packed + l.post_beta(), packed + l.post_beta() + l.d, up_bias + l.d);
}

HF_MULTIVERSION void fold_f32(const float* p, const AdapterLayout& l, const FoldedAdapter& o, double* s) {
  fold_one<float>(p, l, o, s);
}
HF_MULTIVERSION void fold_bf16(const float* p, const AdapterLayout& l, const FoldedAdapter& o, double* s) {
  fold_one<BF16>(p, l, o, s);
}
HF_MULTIVERSION void fold_f16(const float* p, const AdapterLayout& l, const FoldedAdapter& o, double* s) {
  fold_one<F16>(p, l, o, s);
}

}  // namespace

size_t fold_scratch(const AdapterLayout& l) {
  const int64_t k = padded(l);
  return l.post_norm ? static_cast<size_t>(l.d * k + k * k + 3 * k) : 0;
}

void fold_adapter(const float* packed, const AdapterLayout& layout, Dtype dtype, const FoldedAdapter& out,
                  double* scratch) {
  switch (dtype) {
    case Dtype::f32:
      return fold_f32(packed, layout, out, scratch);
    case Dtype::bf16:
      return fold_bf16(packed, layout, out, scratch);
    case Dtype::f16:
      return fold_f16(packed, layout, out, scratch);
  }
}

}  // namespace hyperformer_fast
