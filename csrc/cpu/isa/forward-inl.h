// The forward: one block of rows, then all rows.

template <class S>
void forward_block(const Problem& p, const Weights<S>& w, const Block<S>& block, const SavedRows& saved,
                   Scratch<S>& s) {
  const int64_t d = p.layout.d, b = p.layout.b, n = block.vectors();
  const bool post = p.layout.post_norm;
  if (p.layout.pre_norm) {
    normalise<S>(block, d, saved, false, s);
    down_normalised(w, block.n, b, d, s);
  } else {
    dot<typename Weights<S>::Dot>(block.x, block.n, w.down_dot.data(), b, d, s.z.data(), kBlockRows);
  }
  for (int64_t j = 0; j < b; ++j)
    for (int64_t i = 0; i < n; i += kLanes)
      S::store(s.stored.data() + j * kBlockRows + i, F32::load(s.z.data() + j * kBlockRows + i) + splat(w.bias[j]));
  widen_stored<S>(b, n, s);
  if (saved.z != nullptr)
    for (int64_t i = 0; i < block.n; ++i) {
      auto* z = static_cast<typename S::T*>(saved.z) + block.index[i] * b;
      for (int64_t j = 0; j < b; ++j) z[j] = s.stored[j * kBlockRows + i];
    }
  activate_rows(p.activation, b, n, s.z.data(), s.h.data(), nullptr);
  for (int64_t i = 0; i < n; ++i) s.r[i] = s.h[b * kBlockRows + i] = 1.0f;
  if (post) {
    times_root(w.root, b + 1, s.h_rows.data(), n, s.q.data());
    for (int64_t i = 0; i < n; i += kLanes) {
      vf square = {};
      for (int64_t j = 0; j <= b; ++j) {
        const vf q = F32::load(s.q.data() + j * kBlockRows + i);
        square += q * q;
      }
      F32::store(s.r.data() + i, square);
    }
    for (int64_t i = 0; i < n; ++i) s.r[i] = 1.0f / __builtin_sqrtf(s.r[i] + kEps);
    if (saved.r != nullptr)
      for (int64_t i = 0; i < block.n; ++i) saved.r[block.index[i]] = s.r[i];
  }
  for (int64_t j = 0; j <= b; ++j) {
    const float scale = j < b ? w.scale_of(j) : 1.0f;
    for (int64_t i = 0; i < n; i += kLanes)
      F32::store(s.hr.data() + j * kBlockRows + i,
                 splat(scale) * F32::load(s.r.data() + i) * F32::load(s.h.data() + j * kBlockRows + i));
  }
  if constexpr (Weights<S>::paired)
    project<S>(s.hr.data(), b, block, d, w.up_sum,
               ToRows<S>{block.x, block.out, w.beta, w.up_bias, s.r.data(), block.next_x}, s);
  else
    project<S>(s.hr.data(), b + 1, block, d, w.up_sum,
               ToRows<S>{block.x, block.out, w.beta, nullptr, nullptr, block.next_x}, s);
}

template <class S>
void forward(const Problem& p, const Rows& x, const FoldedWeights& folded, void* out, const SavedRows& saved,
             const Parallel& parallel) {
  const TaskRows tasks(p);
  const auto weights = unpack<S>(p, tasks, folded, parallel);
  const auto units = cut(p, tasks, [](int64_t) { return kBlockRows; });
  parallel(int64_t(units.size()), [&](int64_t begin, int64_t end) {
    Scratch<S> scratch(p.layout, false);
    Block<S> block;
    for (int64_t u = begin; u < end; ++u) {
      fill<S>(block, p, tasks, units[u].task, units[u].first, units[u].last, x, nullptr, out);
      forward_block<S>(p, *weights[units[u].task], block, saved, scratch);
    }
  });
  pass<S>(p, tasks, x, out, &saved);
}
