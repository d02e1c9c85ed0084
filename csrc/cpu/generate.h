// The weights of one site from its tasks' embeddings. Included once per instruction set.

// packed [T, P] = E [T, k] G^T + g0: G is read once, P numbers of k each, for all tasks.
inline void generate(const float* E, const float* G, const float* g0, int64_t T, int64_t P, int64_t k, float* packed,
                     const Parallel& parallel) {
  // Rows of G that a thread takes at a time: some 256 KiB of k = 64.
  constexpr int64_t STRETCH = 1024;
  const auto tasks = rows_of(E, T, k);
  parallel((P + STRETCH - 1) / STRETCH, [&](int64_t begin, int64_t end) {
    const int64_t last = end * STRETCH < P ? end * STRETCH : P;
    const float* rows[DOT_MR];
    for (int64_t i = begin * STRETCH; i < last; i += DOT_MR) {
      const int64_t n = last - i < DOT_MR ? last - i : DOT_MR;
      for (int64_t r = 0; r < n; ++r) rows[r] = G + (i + r) * k;
      dot<Widened<F32>>(rows, n, tasks.data(), T, k, packed + i, P);
      for (int64_t t = 0; t < T; ++t)
        for (int64_t r = 0; r < n; ++r) packed[t * P + i + r] += g0[i + r];
    }
  });
}
