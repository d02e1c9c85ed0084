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

// wa = [W_u | b_u] in float64, zero-padded; its column means to `mean` [k].
HF_INLINE void widen_up(const float* packed, const AdapterLayout& l, int64_t k, double* __restrict wa,
                        double* __restrict mean) {
  const float *w = packed + l.up_weight(), *b_u = packed + l.up_bias();
  std::fill(mean, mean + k, 0.0);
  for (int64_t i = 0; i < l.d; ++i, w += l.b, wa += k) {
    for (int64_t j = 0; j < l.b; ++j) wa[j] = w[j];
    wa[l.b] = b_u[i];
    for (int64_t j = l.b + 1; j < k; ++j) wa[j] = 0.0;
    for (int64_t j = 0; j < k; ++j) mean[j] += wa[j];
  }
  for (int64_t j = 0; j < k; ++j) mean[j] /= double(l.d);
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

// The upper triangle of A^T A (and, in its tiles, a little of the lower, which nobody reads), added to gram.
HF_INLINE void gram_block(const double* a, int64_t rows, int64_t k, double* gram) {
  for (int64_t i = 0; i < k; i += kTile) {
    int64_t j = i / kLanes * kLanes;
    for (; j + 2 * kLanes <= k; j += 2 * kLanes) gram_tile<2>(a, k, rows, i, j, gram);
    if (j < k) gram_tile<1>(a, k, rows, i, j, gram);
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

// wa less its means, its Gram matrix, then wa times gamma, a block of rows at a time while they are in the first
// cache. Column by column, the largest magnitude of the last goes to `largest` [k]: NaN where an entry is not finite.
HF_INLINE void centre_and_scale(const float* gamma, int64_t d, int64_t k, const Scratch& s, double* __restrict largest,
                                double* __restrict poison) {
  std::fill(s.gram, s.gram + k * k, 0.0);
  std::fill(largest, largest + k, 0.0);
  std::fill(poison, poison + k, 0.0);
  for (int64_t first = 0; first < d; first += kBlock) {
    const int64_t rows = std::min(kBlock, d - first);
    double* __restrict block = s.wa + first * k;
    const double* __restrict mean = s.column;
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < k; ++j) block[i * k + j] -= mean[j];
    gram_block(block, rows, k, s.gram);
    for (int64_t i = 0; i < rows; ++i) {
      const double factor = gamma[first + i];
      for (int64_t j = 0; j < k; ++j) {
        const double v = block[i * k + j] * factor;
        block[i * k + j] = v;
        largest[j] = std::max(largest[j], std::fabs(v));
        poison[j] += v * 0.0;  // a maximum may drop a NaN
      }
    }
  }
  for (int64_t j = 0; j < k; ++j) largest[j] += poison[j];
}

typedef float Row __attribute__((vector_size(kLanes * sizeof(float)), aligned(sizeof(float)), may_alias));

// The transpose of eight rows of eight numbers.
HF_INLINE void transpose(Row* r) {
  Row t[kLanes];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[2 * i] = __builtin_shufflevector(r[2 * i], r[2 * i + 1], 0, 8, 2, 10, 4, 12, 6, 14);
    t[2 * i + 1] = __builtin_shufflevector(r[2 * i], r[2 * i + 1], 1, 9, 3, 11, 5, 13, 7, 15);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const int p = i / 2 * 4 + i % 2;
    r[p] = __builtin_shufflevector(t[p], t[p + 2], 0, 1, 8, 9, 4, 5, 12, 13);
    r[p + 2] = __builtin_shufflevector(t[p], t[p + 2], 2, 3, 10, 11, 6, 7, 14, 15);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[i] = __builtin_shufflevector(r[i], r[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
    t[i + 4] = __builtin_shufflevector(r[i], r[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
  }
#pragma GCC unroll 8
  for (int i = 0; i < kLanes; ++i) r[i] = t[i];
}

// Compilers take a loop over a vector's lanes apart, one by one; hence the overloads.
HF_INLINE void store_rounded(Row v, float* to) { *reinterpret_cast<Row*>(to) = v; }
HF_INLINE void store_rounded(Row v, BF16* to) {
  typedef uint32_t Bits __attribute__((vector_size(kLanes * sizeof(uint32_t))));
  typedef uint16_t Half __attribute__((vector_size(kLanes * sizeof(uint16_t)), aligned(sizeof(uint16_t)), may_alias));
  const Bits u = reinterpret_cast<Bits>(v), rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  const Bits nan = reinterpret_cast<Bits>(v != v);
  *reinterpret_cast<Half*>(to) = __builtin_convertvector((nan & 0x7fc0) | (~nan & rounded), Half);
}
HF_INLINE void store_rounded(Row v, F16* to) {
  float lanes[kLanes];
  *reinterpret_cast<Row*>(lanes) = v;
  for (int64_t i = 0; i < kLanes; ++i) to[i] = rounded<F16>(lanes[i]);
}

// wg [b, d] = (wa / s)^T in T, s a power of two for each column; bg = wa's last column.
template <typename T>
HF_INLINE void store_up(const AdapterLayout& l, int64_t k, const double* wa, const double* inverse, T* __restrict wg,
                        float* __restrict bg) {
  for (int64_t i = 0; i < l.d; ++i) bg[i] = float(wa[i * k + l.b]);
  const int64_t whole_d = l.d / kLanes * kLanes, whole_b = l.b / kLanes * kLanes;
  for (int64_t j = 0; j < whole_b; j += kLanes) {
    const Vec factor = *reinterpret_cast<const Vec*>(inverse + j);
    for (int64_t i = 0; i < whole_d; i += kLanes) {
      Row rows[kLanes];
#pragma GCC unroll 8
      for (int64_t r = 0; r < kLanes; ++r)
        rows[r] = __builtin_convertvector(*reinterpret_cast<const Vec*>(wa + (i + r) * k + j) * factor, Row);
      transpose(rows);
#pragma GCC unroll 8
      for (int64_t r = 0; r < kLanes; ++r) store_rounded(rows[r], wg + (j + r) * l.d + i);
    }
    for (int64_t r = j; r < j + kLanes; ++r)
      for (int64_t i = whole_d; i < l.d; ++i) wg[r * l.d + i] = rounded<T>(float(wa[i * k + r] * inverse[r]));
  }
  for (int64_t j = whole_b; j < l.b; ++j)
    for (int64_t i = 0; i < l.d; ++i) wg[j * l.d + i] = rounded<T>(float(wa[i * k + j] * inverse[j]));
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
  widen_up(packed, l, k, s.wa, s.column);
  for (int64_t j = 0; j <= l.b; ++j) out.mean[j] = float(s.column[j]);
  double *largest = s.column + k, *inverse = largest + k;
  centre_and_scale(packed + l.post_gamma(), l.d, k, s, largest, inverse);
  square_root(s.gram, l.d, k, l.b + 1, out.root);
  for (int64_t j = 0; j < l.b; ++j) {
    const double power = power_of_two(largest[j]);
    out.scale[j] = float(power);
    inverse[j] = 1.0 / power;  // exact
  }
  store_up<T>(l, k, s.wa, inverse, wg, up_bias);
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
