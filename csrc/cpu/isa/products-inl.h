// The two products that a forward and a backward consist of, register-blocked for few columns (b from 1 to some
// hundreds).

// Sizes of register tiles. AVX-512 has 32 vector registers, other sets have 16. A dot product holds kDotRows x 3
// accumulators, three weights and one row vector; a weighted sum holds kSumResults x kSumVectors accumulators and
// kSumVectors sources.
constexpr int kSumResults = HFF_LANES == 16 ? 8 : 4;
constexpr int kSumVectors = 3;
constexpr int kVectorRegisters = HFF_LANES == 16 ? 32 : 16;
static_assert(kDotRows * 3 + 3 + 1 <= kVectorRegisters, "a dot product's tile must stay in registers");
static_assert(kSumResults * kSumVectors + kSumVectors + 1 <= kVectorRegisters, "and so must a weighted sum's");

// One step along a dot product: kLanes numbers of a row, widened from storage, times kLanes float32 weights.
template <class S>
struct Widened {
  using X = typename S::T;
  using Y = float;
  static constexpr int kStep = kLanes;
  struct Operand {
    vf v;
  };
  static HFF_INLINE Operand x(const X* p) { return {S::load(p)}; }
  static HFF_INLINE Operand y(const Y* p) { return {F32::load(p)}; }
  static HFF_INLINE Operand x_part(const X* p, int n) { return {load_part<S>(p, n)}; }
  static HFF_INLINE Operand y_part(const Y* p, int n) { return {load_part<F32>(p, n)}; }
  static HFF_INLINE vf add(vf sum, Operand a, Operand b) { return sum + a.v * b.v; }
};

// out[j * ldo + i] = <x_i, y_j> for MR rows and NR weight rows of d numbers.
template <class P, int MR, int NR>
HFF_INLINE void dot_tile(const typename P::X* const* x, const typename P::Y* const* y, int64_t d, float* out,
                         int64_t ldo) {
  vf acc[NR][MR];
#pragma GCC unroll 8
  for (int j = 0; j < NR; ++j)
#pragma GCC unroll 8
    for (int i = 0; i < MR; ++i) acc[j][i] = vf{};
  int64_t c = 0;
  for (; c + P::kStep <= d; c += P::kStep) {
    typename P::Operand yv[NR];
#pragma GCC unroll 8
    for (int j = 0; j < NR; ++j) yv[j] = P::y(y[j] + c);
#pragma GCC unroll 8
    for (int i = 0; i < MR; ++i) {
      typename P::Operand xv = P::x(x[i] + c);
      HFF_IN_REGISTER(xv.v);
#pragma GCC unroll 8
      for (int j = 0; j < NR; ++j) acc[j][i] = P::add(acc[j][i], xv, yv[j]);
    }
  }
  if (c < d) {
#pragma GCC unroll 8
    for (int i = 0; i < MR; ++i) {
      // In registers, so that compilers fuse these multiplications and additions in every tile: otherwise they see the
      // numbers that vectors are made of, and a row's sum depends on how many rows its tile has.
      typename P::Operand xv = P::x_part(x[i] + c, int(d - c));
      HFF_IN_REGISTER(xv.v);
#pragma GCC unroll 8
      for (int j = 0; j < NR; ++j) {
        typename P::Operand yv = P::y_part(y[j] + c, int(d - c));
        HFF_IN_REGISTER(yv.v);
        acc[j][i] = P::add(acc[j][i], xv, yv);
      }
    }
  }
#pragma GCC unroll 8
  for (int j = 0; j < NR; ++j) {
    if constexpr (MR == kDotRows) {
      sums_of(acc[j], out + j * ldo);
    } else {
#pragma GCC unroll 8
      for (int i = 0; i < MR; ++i) out[j * ldo + i] = sum(acc[j][i]);
    }
  }
}

template <class P, int MR>
HFF_INLINE void dot_rows(const typename P::X* const* x, const typename P::Y* const* y, int64_t n, int64_t d, float* out,
                         int64_t ldo) {
  int64_t j = 0;
  // The last four columns are taken as two and two, because a tile of one column loads almost as often as it
  // multiplies.
  for (; n - j == 3 || n - j > 4; j += 3) dot_tile<P, MR, 3>(x, y + j, d, out + j * ldo, ldo);
  for (; n - j >= 2; j += 2) dot_tile<P, MR, 2>(x, y + j, d, out + j * ldo, ldo);
  for (; j < n; ++j) dot_tile<P, MR, 1>(x, y + j, d, out + j * ldo, ldo);
}

// out [n, rows] = (x [rows, d] y^T)^T with y [n, d]; rows of `out` are ldo apart.
template <class P>
void dot(const typename P::X* const* x, int64_t rows, const typename P::Y* const* y, int64_t n, int64_t d, float* out,
         int64_t ldo) {
  int64_t i = 0;
  for (; i + kDotRows <= rows; i += kDotRows) dot_rows<P, kDotRows>(x + i, y, n, d, out + i, ldo);
  for (; i < rows; ++i) dot_rows<P, 1>(x + i, y, n, d, out + i, ldo);
}

// Coefficients a(i, k) = p[i * row + k * step] of a weighted sum of K source rows.
template <class C>
struct Coefficients {
  const C* p;
  int64_t row, step;

  HFF_INLINE C at(int64_t i, int64_t k) const { return p[i * row + k * step]; }
  HFF_INLINE Coefficients from(int64_t i) const { return {p + i * row, row, step}; }
};

// One term of a weighted sum: a float32 coefficient times a vector that is widened from storage.
template <class S>
struct Scaled {
  using Source = typename S::T;
  using Coefficient = float;
  using Vector = vf;
  static HFF_INLINE vf load(const Source* p) { return S::load(p); }
  static HFF_INLINE vf load_part(const Source* p, int n) { return hyperformer_fast::HFF_NAMESPACE::load_part<S>(p, n); }
  static HFF_INLINE vf add(vf sum, float a, vf v) { return sum + splat(a) * v; }
};

// One tile of a weighted sum, first(i, c) + sum_k a(i, k) source_k[c], for MR results and NV vectors from column c on.
template <class P, int MR, int NV, class Io>
HFF_INLINE void sum_tile(Coefficients<typename P::Coefficient> a, int64_t K, const typename P::Source* const* source,
                         int64_t c, int64_t result, const Io& io) {
  vf acc[MR][NV];
#pragma GCC unroll 8
  for (int i = 0; i < MR; ++i) {
    const auto row = io.row(result + i);
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) acc[i][v] = row.first(c + v * kLanes);
    row.template prefetch<NV>(c);
  }
  for (int64_t k = 0; k < K; ++k) {
    typename P::Vector s[NV];
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) s[v] = P::load(source[k] + c + v * kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < MR; ++i) {
      const auto coefficient = a.at(i, k);
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) acc[i][v] = P::add(acc[i][v], coefficient, s[v]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < MR; ++i) {
    const auto row = io.row(result + i);
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) row.store(c + v * kLanes, acc[i][v]);
  }
}

// The n < kLanes columns of one result beyond its last whole vector.
template <class P, class Io>
HFF_INLINE void sum_part(Coefficients<typename P::Coefficient> a, int64_t K, const typename P::Source* const* source,
                         int64_t c, int n, int64_t result, const Io& io) {
  const auto row = io.row(result);
  vf acc = row.first_part(c, n);
  for (int64_t k = 0; k < K; ++k) acc = P::add(acc, a.at(0, k), P::load_part(source[k] + c, n));
  row.store_part(c, acc, n);
}

template <class P, int NV, class Io>
HFF_INLINE void sum_column(Coefficients<typename P::Coefficient> a, int64_t count, int64_t K,
                           const typename P::Source* const* source, int64_t c, const Io& io) {
  int64_t i = 0;
  for (; i + kSumResults <= count; i += kSumResults) sum_tile<P, kSumResults, NV>(a.from(i), K, source, c, i, io);
  for (; i + 2 <= count; i += 2) sum_tile<P, 2, NV>(a.from(i), K, source, c, i, io);
  for (; i < count; ++i) sum_tile<P, 1, NV>(a.from(i), K, source, c, i, io);
}

// results[i][:] = first_i + sum_k a(i, k) source_k[:] for `count` results of width d, column by column. For few results
// of many sources: all results use a piece of a source while it is in the first-level cache.
template <class P, class Io>
void sums_by_column(Coefficients<typename P::Coefficient> a, int64_t count, int64_t K,
                    const typename P::Source* const* source, int64_t d, const Io& io) {
  int64_t c = 0;
  for (; c + kSumVectors * kLanes <= d; c += kSumVectors * kLanes)
    sum_column<P, kSumVectors>(a, count, K, source, c, io);
  for (; c + kLanes <= d; c += kLanes) sum_column<P, 1>(a, count, K, source, c, io);
  if (c == d) return;
  for (int64_t i = 0; i < count; ++i) sum_part<P>(a.from(i), K, source, c, int(d - c), i, io);
}

template <class P, int MR, class Io>
HFF_INLINE void sum_row(Coefficients<typename P::Coefficient> a, int64_t K, const typename P::Source* const* source,
                        int64_t d, int64_t i, const Io& io) {
  int64_t c = 0;
  for (; c + kSumVectors * kLanes <= d; c += kSumVectors * kLanes)
    sum_tile<P, MR, kSumVectors>(a.from(i), K, source, c, i, io);
  for (; c + kLanes <= d; c += kLanes) sum_tile<P, MR, 1>(a.from(i), K, source, c, i, io);
  for (int m = 0; c < d && m < MR; ++m) sum_part<P>(a.from(i + m), K, source, c, int(d - c), i + m, io);
}

// The same, row by row. For many results of few sources: each result is written from its beginning to its end, so that
// few pages are open at a time.
template <class P, class Io>
void sums_by_row(Coefficients<typename P::Coefficient> a, int64_t count, int64_t K,
                 const typename P::Source* const* source, int64_t d, const Io& io) {
  int64_t i = 0;
  for (; i + kSumResults <= count; i += kSumResults) sum_row<P, kSumResults>(a, K, source, d, i, io);
  for (; i < count; ++i) sum_row<P, 1>(a, K, source, d, i, io);
}
