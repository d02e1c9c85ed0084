// The two products that a forward and a backward consist of, register-blocked for few columns (b of 1 to some
// hundreds). Included once per instruction set, after simd.h.

// Registers: MR x NR accumulators, NR weights, one row vector. 32 registers with AVX-512, 16 otherwise.
constexpr int DOT_MR = HF_WIDTH == 16 ? 8 : 4;
constexpr int DOT_NR = 3;
constexpr int SUM_MR = HF_WIDTH == 16 ? 6 : 4;
constexpr int SUM_NV = HF_WIDTH == 16 ? 4 : 3;

// out[i][j] = <x_i, w_j> for MR rows and NR weight rows of d numbers.
template <class S, int MR, int NR>
HF_INLINE void dot_tile(const typename S::T* const* x, const float* w, int64_t ldw, int64_t d, float* out,
                        int64_t ldo) {
  vf acc[MR][NR] = {};
  int64_t c = 0;
  for (; c + W <= d; c += W) {
    vf wv[NR];
    for (int j = 0; j < NR; ++j) wv[j] = F32::load(w + j * ldw + c);
    for (int i = 0; i < MR; ++i) {
      const vf xv = S::load(x[i] + c);
      for (int j = 0; j < NR; ++j) acc[i][j] += xv * wv[j];
    }
  }
  if (c < d) {
    for (int i = 0; i < MR; ++i) {
      const vf xv = load_part<S>(x[i] + c, int(d - c));
      for (int j = 0; j < NR; ++j) acc[i][j] += xv * load_part<F32>(w + j * ldw + c, int(d - c));
    }
  }
  if constexpr (MR % 4 == 0) {
    for (int j = 0; j < NR; ++j) {
      for (int i = 0; i < MR; i += 4) {
        const v4 s = sum4(acc[i][j], acc[i + 1][j], acc[i + 2][j], acc[i + 3][j]);
        for (int k = 0; k < 4; ++k) out[(i + k) * ldo + j] = s[k];
      }
    }
  } else {
    for (int i = 0; i < MR; ++i)
      for (int j = 0; j < NR; ++j) out[i * ldo + j] = sum(acc[i][j]);
  }
}

template <class S, int MR>
HF_INLINE void dot_rows(const typename S::T* const* x, const float* w, int64_t n, int64_t ldw, int64_t d, float* out,
                        int64_t ldo) {
  int64_t j = 0;
  for (; j + DOT_NR <= n; j += DOT_NR) dot_tile<S, MR, DOT_NR>(x, w + j * ldw, ldw, d, out + j, ldo);
  for (; j < n; ++j) dot_tile<S, MR, 1>(x, w + j * ldw, ldw, d, out + j, ldo);
}

// out [rows, n] = x [rows, d] w^T, w [n, d] float32.
template <class S>
void dot(const typename S::T* const* x, int64_t rows, const float* w, int64_t n, int64_t ldw, int64_t d, float* out,
         int64_t ldo) {
  int64_t i = 0;
  for (; i + DOT_MR <= rows; i += DOT_MR) dot_rows<S, DOT_MR>(x + i, w, n, ldw, d, out + i * ldo, ldo);
  for (; i < rows; ++i) dot_rows<S, 1>(x + i, w, n, ldw, d, out + i * ldo, ldo);
}

// Coefficients a(i, k) = p[i * row + k * step] of a weighted sum of K source rows.
struct Coefficients {
  const float* p;
  int64_t row, step;
};

// One tile of a weighted sum: first(i, c) + sum_k a(i, k) source_k[c], for MR results and NV vectors from column c.
template <class S, int MR, int NV, class First, class Store>
HF_INLINE void sum_tile(Coefficients a, int64_t K, const typename S::T* const* source, int64_t c, First first,
                        Store store) {
  vf acc[MR][NV];
  for (int i = 0; i < MR; ++i)
    for (int v = 0; v < NV; ++v) acc[i][v] = first(i, c + v * W);
  for (int64_t k = 0; k < K; ++k) {
    vf s[NV];
    for (int v = 0; v < NV; ++v) s[v] = S::load(source[k] + c + v * W);
    for (int i = 0; i < MR; ++i) {
      const vf coefficient = splat(a.p[i * a.row + k * a.step]);
      for (int v = 0; v < NV; ++v) acc[i][v] += coefficient * s[v];
    }
  }
  for (int i = 0; i < MR; ++i)
    for (int v = 0; v < NV; ++v) store(i, c + v * W, acc[i][v]);
}

// The columns beyond the last whole vector, fewer than W of them.
template <class S, class First, class Store>
HF_INLINE void sum_part(Coefficients a, int64_t K, const typename S::T* const* source, int64_t c, int n, First first,
                        Store store) {
  vf acc = first(0, c);
  for (int64_t k = 0; k < K; ++k) acc += splat(a.p[k * a.step]) * load_part<S>(source[k] + c, n);
  store(0, c, acc);
}

// results[i][:] = First_i + sum_k a(i, k) source_k[:], for `count` results of width d. First and Store give and take
// vectors of a result (row, column); First_part and Store_part the n < W numbers at its end.
template <class S, class Io>
void weighted_sums(Coefficients a, int64_t count, int64_t K, const typename S::T* const* source, int64_t d,
                   const Io& io) {
  int64_t c = 0;
  const auto columns = [&](auto width) HF_LAMBDA_INLINE {
    constexpr int NV = decltype(width)::value;
    int64_t i = 0;
    for (; i + SUM_MR <= count; i += SUM_MR) {
      sum_tile<S, SUM_MR, NV>(
          Coefficients{a.p + i * a.row, a.row, a.step}, K, source, c,
          [&](int r, int64_t cc) HF_LAMBDA_INLINE { return io.first(i + r, cc); },
          [&](int r, int64_t cc, vf v) HF_LAMBDA_INLINE { io.store(i + r, cc, v); });
    }
    for (; i < count; ++i) {
      sum_tile<S, 1, NV>(
          Coefficients{a.p + i * a.row, a.row, a.step}, K, source, c,
          [&](int, int64_t cc) HF_LAMBDA_INLINE { return io.first(i, cc); },
          [&](int, int64_t cc, vf v) HF_LAMBDA_INLINE { io.store(i, cc, v); });
    }
  };
  for (; c + SUM_NV * W <= d; c += SUM_NV * W) columns(Width<SUM_NV>{});
  for (; c + W <= d; c += W) columns(Width<1>{});
  if (c == d) return;
  const int n = int(d - c);
  for (int64_t i = 0; i < count; ++i) {
    sum_part<S>(
        Coefficients{a.p + i * a.row, a.row, a.step}, K, source, c, n,
        [&](int, int64_t cc) HF_LAMBDA_INLINE { return io.first_part(i, cc, n); },
        [&](int, int64_t cc, vf v) HF_LAMBDA_INLINE { io.store_part(i, cc, v, n); });
  }
}
