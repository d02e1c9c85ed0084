// Generation of weights from embeddings: packed = E G^T + g0.

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
      transpose(G + p * k, k, kStripe, k, stripe.data(), kStripe);
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
