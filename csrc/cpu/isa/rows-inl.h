// One block of rows of one task, its working memory, and its products.
//
// Arrays of b numbers per row (z, h, q, ...) lie transposed, [b, kBlockRows], so that a vector holds the same number
// for several rows. b then needs no padding, and a sum over b is a sum of vectors.

// Up to kBlockRows rows, and where they lie in the tensors.
template <class S>
struct Block {
  int64_t n;                  // rows
  int64_t index[kBlockRows];  // the index of each row in z, r, out and dx
  const typename S::T* x[kBlockRows];
  const typename S::T* g[kBlockRows];
  typename S::T* out[kBlockRows];           // rows of out, or of dx
  const typename S::T* next_x[kBlockRows];  // rows of the next block, to be prefetched; null where there are none
  const typename S::T* next_g[kBlockRows];

  int64_t vectors() const { return padded(n); }
};

// Working memory of one thread.
template <class S>
struct Scratch {
  Buffer z, h, slope, q, t, hr, dz, inner;  // [b + 2, kBlockRows] each, except the last
  Buffer r, m2;                             // [kBlockRows]
  std::vector<typename S::T> stored;        // [b, kBlockRows]: z as it is saved
  Buffer source, out;                       // [kBlockRows, d], with a pre-norm
  std::vector<const float*> h_rows, q_rows, hr_rows, t_rows, source_rows;
#if HFF_HAS_DPBF16
  std::vector<uint32_t, LineAligned<uint32_t>> row_pairs;     // coefficients: pairs of neighbours in a row
  std::vector<bf16_t, LineAligned<bf16_t>> along;             // coefficients: pairs of rows
  std::vector<uint32_t, LineAligned<uint32_t>> source_pairs;  // [kBlockRows / 2, d]
  std::vector<const uint32_t*> source_pair_rows;
#endif

  Scratch(const AdapterLayout& l, bool backward) : r(kBlockRows), m2(kBlockRows) {
    const int64_t rows = l.b + 2, c = l.b + 1;
    for (Buffer* buffer : {&z, &h, &q, &hr}) buffer->resize(rows * kBlockRows);
    stored.resize(l.b * kBlockRows);
    h_rows = rows_of<float>(h.data(), rows, kBlockRows);
    if (backward) {
      for (Buffer* buffer : {&slope, &t, &dz}) buffer->resize(rows * kBlockRows);
      inner.resize(c * (c + kDotRows));
      q_rows = rows_of<float>(q.data(), rows, kBlockRows);
      hr_rows = rows_of<float>(hr.data(), rows, kBlockRows);
      t_rows = rows_of<float>(t.data(), rows, kBlockRows);
    }
    if (l.pre_norm) {
      source.resize(kBlockRows * l.d);
      source_rows = rows_of<float>(source.data(), kBlockRows, l.d);
      if (backward) out.resize(kBlockRows * l.d);
    }
#if HFF_HAS_DPBF16
    if constexpr (Weights<S>::paired) {
      row_pairs.resize((rows + 1) / 2 * kBlockRows);
      if (backward) {
        along.resize(rows * kBlockRows);
        source_pairs.resize(kBlockRows / 2 * l.d);
        source_pair_rows = rows_of<uint32_t>(source_pairs.data(), kBlockRows / 2, l.d);
      }
    }
#endif
  }
};

// h = act(z) and derivative = act'(z), which may be null, for `rows` rows of n numbers. Rows are kBlockRows apart, and
// n is a multiple of kLanes.
template <Activation code>
void activate_all(int64_t rows, int64_t n, const float* z, float* h, float* derivative) {
  for (int64_t at = 0; at < rows * kBlockRows; at += kBlockRows) {
    for (int64_t i = at; i < at + n; i += kLanes) {
      const vf v = F32::load(z + i);
      if (derivative == nullptr) {
        F32::store(h + i, activate<code, false>(v).value);
      } else {
        const Activated a = activate<code, true>(v);
        F32::store(h + i, a.value);
        F32::store(derivative + i, a.derivative);
      }
    }
  }
}

inline void activate_rows(Activation code, int64_t rows, int64_t n, const float* z, float* h, float* derivative) {
  with_activation(code, [&](auto constant) { activate_all<constant()>(rows, n, z, h, derivative); });
}

// q = R [h ; 1]. R is upper triangular, so the sum for result i begins at term i.
inline void times_root(const float* root, int64_t c, const float* const* h, int64_t n, float* q) {
  for (int64_t i = 0; i < c; i += kSumResults) {
    const int64_t count = i + kSumResults <= c ? kSumResults : c - i;
    sums_by_column<Scaled<F32>>(Coefficients<float>{root + i * c + i, c, 1}, count, c - i, h + i, n,
                                ToFloat{q + i * kBlockRows, kBlockRows, false});
  }
}

// u = R^T q. The sum for result i ends at term i.
inline void times_root_transposed(const float* root, int64_t c, const float* const* q, int64_t n, float* u) {
  for (int64_t i = 0; i < c; i += kSumResults) {
    const int64_t count = i + kSumResults <= c ? kSumResults : c - i;
    sums_by_column<Scaled<F32>>(Coefficients<float>{root + i, 1, c}, count, i + count, q, n,
                                ToFloat{u + i * kBlockRows, kBlockRows, false});
  }
}

// out_i = first_i + sum_j a[j][i] w_j: rows of a projection, weighted by the `count` numbers of row i.
template <class S, class Io>
void project(const float* a, int64_t count, const Block<S>& block, int64_t d, const std::vector<const float*>& w,
             const Io& io, Scratch<S>&) {
  sums_by_row<Scaled<F32>>(Coefficients<float>{a, 1, kBlockRows}, block.n, count, w.data(), d, io);
}

#if HFF_HAS_DPBF16
template <class S, class Io>
void project(const float* a, int64_t count, const Block<S>& block, int64_t d, const std::vector<const uint32_t*>& w,
             const Io& io, Scratch<S>& s) {
  for (int64_t j = 0; j < count; j += 2)
    for (int64_t i = 0; i < block.n; i += kLanes) {
      const vu low = bf16_halves(F32::load(a + j * kBlockRows + i));
      const vu high = j + 1 < count ? bf16_halves(F32::load(a + (j + 1) * kBlockRows + i)) : vu{};
      *reinterpret_cast<vu_any*>(s.row_pairs.data() + j / 2 * kBlockRows + i) = low | (high << 16);
    }
  sums_by_row<PairedSum>(Coefficients<uint32_t>{s.row_pairs.data(), 1, kBlockRows}, block.n, (count + 1) / 2, w.data(),
                         d, io);
}
#endif

// to [count, d] = or += a [count, n] times source [n, d], which is in storage: one block's part of a weight's gradient.
template <class S>
void accumulate(const float* a, int64_t count, int64_t n, int64_t d, const typename S::T* const* source,
                const ToFloat& to, [[maybe_unused]] Scratch<S>& s) {
#if HFF_HAS_DPBF16
  if constexpr (Weights<S>::paired) {
    for (int64_t j = 0; j < count; ++j)
      for (int64_t i = 0; i < padded(n); i += kLanes)
        BF16::store(s.along.data() + j * kBlockRows + i, F32::load(a + j * kBlockRows + i));
    for (int64_t i = 0; i < n; i += 2)
      interleave(source[i], i + 1 < n ? source[i + 1] : nullptr, d, s.source_pairs.data() + i / 2 * d);
    const auto* pairs = reinterpret_cast<const uint32_t*>(s.along.data());
    sums_by_column<PairedSum>(Coefficients<uint32_t>{pairs, kBlockRows / 2, 1}, count, (n + 1) / 2,
                              s.source_pair_rows.data(), d, to);
    return;
  }
#endif
  sums_by_column<Scaled<S>>(Coefficients<float>{a, kBlockRows, 1}, count, n, source, d, to);
}

// Widens z as it is saved (s.stored) to the float32 z that is computed with, so that forward and backward use the same.
template <class S>
void widen_stored(int64_t b, int64_t n, Scratch<S>& s) {
  for (int64_t j = 0; j < b; ++j)
    for (int64_t i = 0; i < n; i += kLanes)
      F32::store(s.z.data() + j * kBlockRows + i, S::load(s.stored.data() + j * kBlockRows + i));
}
