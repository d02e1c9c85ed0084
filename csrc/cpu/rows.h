// One block of rows of one task, its working memory, and its products. Included once per instruction set.
//
// What is small (z, h, q, ...: b numbers a row) lies transposed, [b, BLOCK], so that a vector holds as many rows: no
// padding of b, and a sum over b is a sum of vectors.

// Up to BLOCK rows, and where they are in the whole.
template <class S>
struct Block {
  int64_t n;             // rows
  int64_t index[BLOCK];  // of each row in z, r, out, dx
  const typename S::T* x[BLOCK];
  const typename S::T* g[BLOCK];
  typename S::T* out[BLOCK];           // rows of out, or of dx
  const typename S::T* next_x[BLOCK];  // rows of the block to come, to be fetched meanwhile; null where there are none
  const typename S::T* next_g[BLOCK];

  int64_t vectors() const { return padded(n); }
};

// Working memory of one thread.
template <class S>
struct Scratch {
  Buffer z, h, slope, q, t, hr, dz, inner;  // [b + 2, BLOCK] each, but the last
  Buffer r, m2;                             // [BLOCK]
  std::vector<typename S::T> stored;        // [b, BLOCK]: z as it is saved
  Buffer source, out;                       // [BLOCK, d]: with a pre-norm
  std::vector<const float*> h_rows, q_rows, hr_rows, t_rows, source_rows;
#if HF_HAS_DPBF16
  std::vector<uint32_t, LineAligned<uint32_t>> row_pairs;     // coefficients: pairs of neighbours in a row
  std::vector<bf16_t, LineAligned<bf16_t>> along;             // coefficients: pairs of rows
  std::vector<uint32_t, LineAligned<uint32_t>> source_pairs;  // [BLOCK / 2, d]
  std::vector<const uint32_t*> source_pair_rows;
#endif

  Scratch(const AdapterLayout& l, bool backward) : r(BLOCK), m2(BLOCK) {
    const int64_t rows = l.b + 2, c = l.b + 1;
    for (Buffer* buffer : {&z, &h, &q, &hr}) buffer->resize(rows * BLOCK);
    stored.resize(l.b * BLOCK);
    h_rows = rows_of<float>(h.data(), rows, BLOCK);
    if (backward) {
      for (Buffer* buffer : {&slope, &t, &dz}) buffer->resize(rows * BLOCK);
      inner.resize(c * (c + DOT_MR));
      q_rows = rows_of<float>(q.data(), rows, BLOCK);
      hr_rows = rows_of<float>(hr.data(), rows, BLOCK);
      t_rows = rows_of<float>(t.data(), rows, BLOCK);
    }
    if (l.pre_norm) {
      source.resize(BLOCK * l.d);
      source_rows = rows_of<float>(source.data(), BLOCK, l.d);
      if (backward) out.resize(BLOCK * l.d);
    }
#if HF_HAS_DPBF16
    if constexpr (Weights<S>::paired) {
      row_pairs.resize((rows + 1) / 2 * BLOCK);
      if (backward) {
        along.resize(rows * BLOCK);
        source_pairs.resize(BLOCK / 2 * l.d);
        source_pair_rows = rows_of<uint32_t>(source_pairs.data(), BLOCK / 2, l.d);
      }
    }
#endif
  }
};

constexpr float EPS = 1e-5f;

// q = R [h ; 1], R upper-triangular: result i begins at term i.
inline void times_root(const float* root, int64_t c, const float* const* h, int64_t n, float* q) {
  for (int64_t i = 0; i < c; i += SUM_MR) {
    const int64_t count = i + SUM_MR <= c ? SUM_MR : c - i;
    sums_by_column<Scaled<F32>>(Coefficients<float>{root + i * c + i, c, 1}, count, c - i, h + i, n,
                                ToFloat{q + i * BLOCK, BLOCK, false});
  }
}

// u = R^T q: result i ends at term i.
inline void times_root_transposed(const float* root, int64_t c, const float* const* q, int64_t n, float* u) {
  for (int64_t i = 0; i < c; i += SUM_MR) {
    const int64_t count = i + SUM_MR <= c ? SUM_MR : c - i;
    sums_by_column<Scaled<F32>>(Coefficients<float>{root + i, 1, c}, count, i + count, q, n,
                                ToFloat{u + i * BLOCK, BLOCK, false});
  }
}

// out_i = first_i + sum_j a[j][i] w_j: up- or down-projection's rows weighted by b numbers a row.
template <class S, class Io>
void project(const float* a, int64_t count, const Block<S>& block, int64_t d, const std::vector<const float*>& w,
             const Io& io, Scratch<S>&) {
  sums_by_row<Scaled<F32>>(Coefficients<float>{a, 1, BLOCK}, block.n, count, w.data(), d, io);
}

#if HF_HAS_DPBF16
template <class S, class Io>
void project(const float* a, int64_t count, const Block<S>& block, int64_t d, const std::vector<const uint32_t*>& w,
             const Io& io, Scratch<S>& s) {
  for (int64_t j = 0; j < count; j += 2)
    for (int64_t i = 0; i < block.n; i += W) {
      const vu low = halves(F32::load(a + j * BLOCK + i));
      const vu high = j + 1 < count ? halves(F32::load(a + (j + 1) * BLOCK + i)) : vu{};
      *reinterpret_cast<vu_any*>(s.row_pairs.data() + j / 2 * BLOCK + i) = low | (high << 16);
    }
  sums_by_row<PairedSum>(Coefficients<uint32_t>{s.row_pairs.data(), 1, BLOCK}, block.n, (count + 1) / 2, w.data(), d,
                         io);
}
#endif

// to [count, d] (+)= a source, source [rows, d] in storage: a weight's gradient from one block.
template <class S>
void accumulate(const float* a, int64_t count, int64_t n, int64_t d, const typename S::T* const* source,
                const ToFloat& to, [[maybe_unused]] Scratch<S>& s) {
#if HF_HAS_DPBF16
  if constexpr (Weights<S>::paired) {
    for (int64_t j = 0; j < count; ++j)
      for (int64_t i = 0; i < padded(n); i += W)
        BF16::store(s.along.data() + j * BLOCK + i, F32::load(a + j * BLOCK + i));
    for (int64_t i = 0; i < n; i += 2)
      interleave(source[i], i + 1 < n ? source[i + 1] : nullptr, d, s.source_pairs.data() + i / 2 * d);
    const auto* pairs = reinterpret_cast<const uint32_t*>(s.along.data());
    sums_by_column<PairedSum>(Coefficients<uint32_t>{pairs, BLOCK / 2, 1}, count, (n + 1) / 2,
                              s.source_pair_rows.data(), d, to);
    return;
  }
#endif
  sums_by_column<Scaled<S>>(Coefficients<float>{a, BLOCK, 1}, count, n, source, d, to);
}

// z as it is saved to z as it is computed with: [b, BLOCK] in storage to float32.
template <class S>
void widen_stored(int64_t b, int64_t n, Scratch<S>& s) {
  for (int64_t j = 0; j < b; ++j)
    for (int64_t i = 0; i < n; i += W) F32::store(s.z.data() + j * BLOCK + i, S::load(s.stored.data() + j * BLOCK + i));
}
