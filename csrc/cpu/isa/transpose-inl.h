// Transposition of small matrices in the cache.

// Transposes from [n, k], whose rows are `stride` apart, into to [k, n], whose rows are ld apart. n is a multiple of 4.
// E is float, or uint32_t for pairs of bfloat16.
template <class E>
inline void transpose(const E* from, int64_t stride, int64_t n, int64_t k, E* to, int64_t ld) {
  typedef E v4 __attribute__((vector_size(16)));
  typedef E v4_any __attribute__((vector_size(16), aligned(4), may_alias));
  const auto row = [&](int64_t i, int64_t j) { return *reinterpret_cast<const v4_any*>(from + i * stride + j); };
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
      for (int r = 0; r < 4; ++r) to[j * ld + i + r] = from[(i + r) * stride + j];
  }
}
