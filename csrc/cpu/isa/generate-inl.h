// Generation of weights from embeddings: packed = E G^T + g0.

// Transposes from [n, k] into to [k, n], whose rows are ld apart. n is a multiple of 4.
inline void transpose(const float* from, int64_t n, int64_t k, float* to, int64_t ld) {
  typedef float v4_any __attribute__((vector_size(16), aligned(4), may_alias));
  const auto row = [&](int64_t i, int64_t j) { return *reinterpret_cast<const v4_any*>(from + i * k + j); };
  for (int64_t i = 0; i < n; i += 4) {
    int64_t j = 0;
    for (; j + 4 <= k; j += 4) {
      const v4 a = row(i, j), b = row(i + 1, j), c = row(i + 2, j), d = row(i + 3, j);
      const v4 ab = __builtin_shufflevector(a, b, 0, 4, 1, 5), ab2 = __builtin_shufflevector(a, b, 2, 6, 3, 7);
      const v4 cd = __builtin_shufflevector(c, d, 0, 4, 1, 5), cd2 = __builtin_shufflevector(c, d, 2, 6, 3, 7);
      const v4 out[4] = {__builtin_shufflevector(ab, cd, 0, 1, 4, 5), __builtin_shufflevector(ab, cd, 2, 3, 6, 7),
                         __builtin_shufflevector(ab2, cd2, 0, 1, 4, 5), __builtin_shufflevector(ab2, cd2, 2, 3, 6, 7)};
      for (int r = 0; r < 4; ++r) *reinterpret_cast<v4_any*>(to + (j + r) * ld + i) = out[r];
    }
    for (; j < k; ++j)
      for (int r = 0; r < 4; ++r) to[j * ld + i + r] = from[(i + r) * k + j];
  }
}

// packed [n, P] = E [n, k] G^T + g0. G is read from memory only once: a stripe of its rows is transposed, and serves
// all n embeddings from the first-level cache.
inline void generate(const float* E, const float* G, const float* g0, int64_t n, int64_t P, int64_t k, float* packed,
                     const Parallel& parallel) {
  constexpr int64_t kStripe = kSumVectors * kLanes, kStretch = 1024 / kStripe * kStripe;
  static_assert(kStripe % 4 == 0, "the transposition takes four rows at a time");
  // With fewer embeddings, the transposition would cost more than it saves.
  constexpr int64_t kFew = 4;
  const auto embeddings = rows_of(E, n, k);
  parallel((P + kStretch - 1) / kStretch, [&](int64_t begin, int64_t end) {
    const int64_t last = end * kStretch < P ? end * kStretch : P;
    Buffer stripe(n < kFew ? 0 : k * kStripe);
    const auto columns = rows_of<float>(stripe.data(), n < kFew ? 0 : k, kStripe);
    int64_t p = begin * kStretch;
    for (; n >= kFew && p + kStripe <= last; p += kStripe) {
      transpose(G + p * k, kStripe, k, stripe.data(), kStripe);
      for (int64_t i = 0; p + 2 * kStripe <= last && i < kStripe * k; i += 16)
        __builtin_prefetch(G + (p + kStripe) * k + i, 0, 2);
      sums_by_column<Scaled<F32>>(Coefficients<float>{E, k, 1}, n, k, columns.data(), kStripe,
                                  From{g0 + p, packed + p, P});
    }
    const float* rows[kDotRows];
    for (; p < last; p += kDotRows) {
      const int64_t m = last - p < kDotRows ? last - p : kDotRows;
      for (int64_t r = 0; r < m; ++r) rows[r] = G + (p + r) * k;
      dot<Widened<F32>>(rows, m, embeddings.data(), n, k, packed + p, P);
      for (int64_t i = 0; i < n; ++i)
        for (int64_t r = 0; r < m; ++r) packed[i * P + p + r] += g0[p + r];
    }
  });
}
