// Folding of an adapter's weights (docs/design.md has the formulas). Sums and the Cholesky factor are float64.

// Doubles in one vector register. GCC takes vectors that are wider than a register apart through memory, at a hundred
// times the cost.
constexpr int64_t kDoubles = kLanes / 2;
typedef double Doubles __attribute__((vector_size(kDoubles * sizeof(double)), aligned(sizeof(double)), may_alias));

// Numbers that are taken together: columns of Wa are padded to a multiple of this, and a sum over a row of W_d has as
// many running sums. It is the same for every instruction set, so that all of them add in the same order.
constexpr int64_t kFoldStep = 8;
static_assert(kFoldStep % kDoubles == 0);

// Rows of Wa whose products are summed before they go to memory. 64 rows of 136 doubles stay in a first- or
// second-level cache, and a sum of such partial sums loses less to rounding than one long sum.
constexpr int64_t kGramRows = 64;
// Columns of the Gram matrix in a tile, which is up to two vectors wide: eight accumulators.
constexpr int64_t kGramTile = 4;
static_assert(kFoldStep % kGramTile == 0);

// Multiply-adds below which a second thread costs more than it saves.
constexpr int64_t kFoldThreadWork = 1 << 16;

// The length of a row of Wa = [W_u | b_u] in doubles: zero columns fill up its last vector.
inline int64_t fold_columns(const AdapterLayout& l) { return (l.b + kFoldStep) / kFoldStep * kFoldStep; }

// The working memory of one fold; with k = fold_columns(layout).
struct FoldScratch {
  std::vector<double> memory;
  double* wa;       // [d, k]: [W_u | b_u], then centred, then times gamma
  double* gram;     // [k, k]
  double* mean;     // [k]: of the columns of Wa
  double* largest;  // [k]: the largest magnitude of each column
  double* factor;   // [k]

  explicit FoldScratch(const AdapterLayout& l) {
    if (!l.post_norm) return;
    const int64_t k = fold_columns(l);
    memory.resize(l.d * k + k * k + 3 * k);
    wa = memory.data();
    gram = wa + l.d * k;
    mean = gram + k * k;
    largest = mean + k;
    factor = largest + k;
  }
};

// wd = W_d * gamma_pre in storage, and the down bias b_d + W_d beta_pre.
template <class S>
void fold_down(const float* packed, const AdapterLayout& l, typename S::T* wd, float* bias) {
  const float *w = packed + l.down_weight(), *b_d = packed + l.down_bias();
  const float *gamma = packed + l.pre_gamma(), *beta = packed + l.pre_beta();
  for (int64_t j = 0; j < l.b; ++j, w += l.d, wd += l.d) {
    bias[j] = b_d[j];
    if (!l.pre_norm) {
      for (int64_t i = 0; i < l.d; ++i) wd[i] = S::narrow(w[i]);
      continue;
    }
    for (int64_t i = 0; i < l.d; ++i) wd[i] = S::narrow(w[i] * gamma[i]);
    double lane[kFoldStep] = {};
    int64_t i = 0;
    for (; i + kFoldStep <= l.d; i += kFoldStep)
      for (int64_t v = 0; v < kFoldStep; ++v) lane[v] += double(w[i + v]) * beta[i + v];
    for (; i < l.d; ++i) lane[0] += double(w[i]) * beta[i];
    double sum = b_d[j];
    for (int64_t v = 0; v < kFoldStep; ++v) sum += lane[v];
    bias[j] = float(sum);
  }
}

// wa = [W_u | b_u] in float64, padded with zeros; the means of its columns go to `mean` [k].
inline void widen_up(const float* packed, const AdapterLayout& l, int64_t k, double* __restrict wa,
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

// gram += A^T A over `rows` rows, for columns [i, i + kGramTile) against N vectors of columns from j on.
template <int N>
HFF_INLINE void gram_tile(const double* a, int64_t k, int64_t rows, int64_t i, int64_t j, double* gram) {
  Doubles sum[kGramTile][N] = {};
  for (int64_t r = 0; r < rows; ++r) {
    const double* row = a + r * k;
    for (int n = 0; n < N; ++n) {
      const Doubles right = *reinterpret_cast<const Doubles*>(row + j + n * kDoubles);
      for (int64_t t = 0; t < kGramTile; ++t) sum[t][n] += right * row[i + t];
    }
  }
  for (int64_t t = 0; t < kGramTile; ++t)
    for (int n = 0; n < N; ++n) *reinterpret_cast<Doubles*>(gram + (i + t) * k + j + n * kDoubles) += sum[t][n];
}

// Adds the upper triangle of A^T A to gram. Its tiles also hold a little of the lower triangle, which nobody reads.
inline void gram_block(const double* a, int64_t rows, int64_t k, double* gram) {
  for (int64_t i = 0; i < k; i += kGramTile) {
    int64_t j = i / kDoubles * kDoubles;
    for (; j + 2 * kDoubles <= k; j += 2 * kDoubles) gram_tile<2>(a, k, rows, i, j, gram);
    if (j < k) gram_tile<1>(a, k, rows, i, j, gram);
  }
}

// Replaces gram by the upper-triangular square root of gram / d, and writes it to `root` [n, n]. A pivot that is lost
// to rounding leaves an empty row: zero, duplicate and rank-one columns are legal weights.
inline void square_root(double* gram, int64_t d, int64_t k, int64_t n, float* root) {
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
    const bool lost = pivot <= noise;  // and not !(pivot > noise), which would hide a NaN pivot
    float* out = root + j * n;
    for (int64_t i = 0; i < j; ++i) out[i] = 0.0f;
    for (int64_t i = j; i < n; ++i) {
      row[i] = lost ? 0.0 : row[i] * inverse;
      out[i] = float(row[i]);
    }
  }
}

// 2^floor(log2 m), within float32's normal range; 1 where m is 0 or NaN.
inline double power_of_two(double m) {
  if (!(m > 0)) return 1.0;
  return std::ldexp(1.0, std::min(std::max(std::ilogb(m), -126), 126));
}

// Subtracts the means from wa, adds up its Gram matrix, and multiplies wa by gamma, a block of rows at a time while
// they are in the first-level cache. The largest magnitude of each resulting column goes to s.largest: NaN where an
// entry is not finite.
inline void centre_and_scale(const float* gamma, int64_t d, int64_t k, const FoldScratch& s) {
  double* __restrict largest = s.largest, * __restrict poison = s.factor;
  std::fill(s.gram, s.gram + k * k, 0.0);
  std::fill(largest, largest + k, 0.0);
  std::fill(poison, poison + k, 0.0);
  for (int64_t first = 0; first < d; first += kGramRows) {
    const int64_t rows = std::min(kGramRows, d - first);
    double* __restrict block = s.wa + first * k;
    const double* __restrict mean = s.mean;
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < k; ++j) block[i * k + j] -= mean[j];
    gram_block(block, rows, k, s.gram);
    for (int64_t i = 0; i < rows; ++i) {
      const double factor = gamma[first + i];
      for (int64_t j = 0; j < k; ++j) {
        const double v = block[i * k + j] * factor;
        block[i * k + j] = v;
        largest[j] = std::max(largest[j], std::fabs(v));
        poison[j] += v * 0.0;  // NaN where v is not finite: std::max may drop a NaN
      }
    }
  }
  for (int64_t j = 0; j < k; ++j) largest[j] += poison[j];
}

#if HFF_LANES >= 8
typedef float Octet __attribute__((vector_size(8 * sizeof(float)), aligned(sizeof(float)), may_alias));
// Transposes eight rows of eight numbers.
HFF_INLINE void transpose_octets(Octet* r) {
  Octet t[8];
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
  for (int i = 0; i < 8; ++i) r[i] = t[i];
}

// Rounds eight numbers to storage. These are overloads on vectors because compilers take a loop over a vector's lanes
// apart, one by one. bfloat16 is rounded in integers even where the CPU has an instruction for it: that instruction
// takes subnormal numbers for zero.
HFF_INLINE void store_rounded(Octet v, float* to) { *reinterpret_cast<Octet*>(to) = v; }
HFF_INLINE void store_rounded(Octet v, bf16_t* to) {
  typedef uint32_t Bits __attribute__((vector_size(8 * sizeof(uint32_t))));
  typedef uint16_t Half __attribute__((vector_size(8 * sizeof(uint16_t)), aligned(sizeof(uint16_t)), may_alias));
  Bits bits = reinterpret_cast<Bits>(v);
  round_to_bf16<Bits>(bits, reinterpret_cast<Bits>(v != v));
  *reinterpret_cast<Half*>(to) = __builtin_convertvector(bits, Half);
}
HFF_INLINE void store_rounded(Octet v, f16_t* to) {
  float lanes[8];
  *reinterpret_cast<Octet*>(lanes) = v;
  for (int64_t i = 0; i < 8; ++i) to[i] = F16::narrow(lanes[i]);
}

// a * factor for eight numbers, in float32.
HFF_INLINE Octet scaled_octet(const double* a, const double* factor) {
  const auto part = [&](int64_t at) {
    return *reinterpret_cast<const Doubles*>(a + at) * *reinterpret_cast<const Doubles*>(factor + at);
  };
#if HFF_LANES == 16
  return __builtin_convertvector(part(0), Octet);
#else
  return __builtin_shufflevector(__builtin_convertvector(part(0), v4), __builtin_convertvector(part(kDoubles), v4), 0,
                                 1, 2, 3, 4, 5, 6, 7);
#endif
}

// to [8, 8] = (a [8, 8] * factor [8])^T in storage; rows of `a` are k apart, those of `to` d.
template <class T>
HFF_INLINE void store_tile(const double* a, int64_t k, const double* factor, T* to, int64_t d) {
  Octet rows[8];
#pragma GCC unroll 8
  for (int64_t r = 0; r < 8; ++r) rows[r] = scaled_octet(a + r * k, factor);
  transpose_octets(rows);
#pragma GCC unroll 8
  for (int64_t r = 0; r < 8; ++r) store_rounded(rows[r], to + r * d);
}
#endif

// wg [b, d] = (wa * inverse)^T in storage, `inverse` a power of two for each column; bg is wa's last column.
template <class S>
void store_up(const AdapterLayout& l, int64_t k, const double* wa, const double* inverse, typename S::T* __restrict wg,
              float* __restrict bg) {
  for (int64_t i = 0; i < l.d; ++i) bg[i] = float(wa[i * k + l.b]);
  const auto store = [&](int64_t j, int64_t i) { wg[j * l.d + i] = S::narrow(float(wa[i * k + j] * inverse[j])); };
  int64_t j = 0;
#if HFF_LANES >= 8
  for (; j + 8 <= l.b; j += 8) {
    int64_t i = 0;
    for (; i + 8 <= l.d; i += 8) store_tile(wa + i * k + j, k, inverse + j, wg + j * l.d + i, l.d);
    for (; i < l.d; ++i)
      for (int64_t r = j; r < j + 8; ++r) store(r, i);
  }
#endif
  for (; j < l.b; ++j)
    for (int64_t i = 0; i < l.d; ++i) store(j, i);
}

// Folds one adapter, packed [P].
template <class S>
void fold_one(const float* packed, const AdapterLayout& l, const FoldedResults& to, const FoldScratch& s) {
  using T = typename S::T;
  float* up_bias = to.vectors + l.b;
  fold_down<S>(packed, l, static_cast<T*>(to.wd), to.vectors);
  T* wg = static_cast<T*>(to.wg);
  const float *w = packed + l.up_weight(), *b_u = packed + l.up_bias();
  if (!l.post_norm) {
    for (int64_t j = 0; j < l.b; ++j)
      for (int64_t i = 0; i < l.d; ++i) wg[j * l.d + i] = S::narrow(w[i * l.b + j]);
    std::copy(b_u, b_u + l.d, up_bias);
    return;
  }
  const int64_t k = fold_columns(l);
  widen_up(packed, l, k, s.wa, s.mean);
  for (int64_t j = 0; j <= l.b; ++j) to.mean[j] = float(s.mean[j]);
  centre_and_scale(packed + l.post_gamma(), l.d, k, s);
  square_root(s.gram, l.d, k, l.b + 1, to.root);
  for (int64_t j = 0; j < l.b; ++j) {
    const double power = power_of_two(s.largest[j]);
    to.scale[j] = float(power);
    s.factor[j] = 1.0 / power;  // exact
  }
  store_up<S>(l, k, s.wa, s.factor, wg, up_bias);
  std::copy(packed + l.post_beta(), packed + l.post_beta() + l.d, up_bias + l.d);
}

template <class S>
void fold(const float* packed, int64_t T, const AdapterLayout& l, const FoldedResults& to, const Parallel& parallel) {
  const int64_t b = l.b, matrix = b * l.d, n = l.post_norm ? b + 1 : 0;
  // Each adapter is one thread's, so that the number of threads changes no bit.
  const int64_t work = matrix * (l.post_norm ? b + 8 : 2), at_once = std::max<int64_t>(1, kFoldThreadWork / work);
  parallel((T + at_once - 1) / at_once, [&](int64_t begin, int64_t end) {
    const FoldScratch scratch(l);
    for (int64_t t = begin * at_once; t < std::min(T, end * at_once); ++t)
      fold_one<S>(
          packed + t * l.numel(), l,
          {static_cast<typename S::T*>(to.wd) + t * matrix, static_cast<typename S::T*>(to.wg) + t * matrix,
           to.vectors + t * l.vectors(), to.scale + t * (l.post_norm ? b : 0), to.root + t * n * n, to.mean + t * n},
          scratch);
  });
}
