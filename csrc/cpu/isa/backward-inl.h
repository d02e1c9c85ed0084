// The backward: one block of rows, then all rows, then the weight gradients from the sums over rows.

template <class S>
void backward_block(const Problem& p, const Weights<S>& w, const Block<S>& block, bool need_dx, const SavedRows& saved,
                    const Partial* partial, bool first, Scratch<S>& s) {
  const int64_t d = p.layout.d, b = p.layout.b, n = block.vectors(), c = b + 1;
  const bool post = p.layout.post_norm;
  for (int64_t i = 0; i < n; ++i) {
    const auto* z = i < block.n ? static_cast<const typename S::T*>(saved.z) + block.index[i] * b : nullptr;
    for (int64_t j = 0; j < b; ++j) s.stored[j * kBlockRows + i] = z == nullptr ? S::narrow(0.0f) : z[j];
  }
  widen_stored<S>(b, n, s);
  activate_rows(p.activation, b, n, s.z.data(), s.h.data(), s.slope.data());
  dot<typename Weights<S>::Dot>(block.g, block.n, w.up_dot.data(), post ? int64_t(w.up_dot.size()) : b, d, s.t.data(),
                                kBlockRows);
  for (int64_t i = 0; i < n; ++i) {
    s.h[b * kBlockRows + i] = 1.0f;
    s.r[i] = i >= block.n ? 0.0f : post ? saved.r[block.index[i]] : 1.0f;
  }
  // Beyond the last row, t still holds what an earlier block left there.
  for (int64_t j = 0; block.n < n && j <= b; ++j)
    for (int64_t i = block.n; i < n; ++i) s.t[j * kBlockRows + i] = 0.0f;
  if (post && Weights<S>::paired)
    for (int64_t i = 0; i < block.n; ++i) s.t[b * kBlockRows + i] += s.t[c * kBlockRows + i];
  if (post) {
    times_root(w.root, c, s.h_rows.data(), n, s.q.data());
    times_root_transposed(w.root, c, s.q_rows.data(), n, s.dz.data());
  }
  for (int64_t i = 0; i < n; i += kLanes) {
    const vf r = F32::load(s.r.data() + i);
    vf m2 = {};
    for (int64_t j = 0; j <= b; ++j) {
      const vf hr = r * F32::load(s.h.data() + j * kBlockRows + i);
      F32::store(s.hr.data() + j * kBlockRows + i, hr);
      if (j < b)
        F32::store(s.t.data() + j * kBlockRows + i, splat(w.scale_of(j)) * F32::load(s.t.data() + j * kBlockRows + i));
      if (post) m2 += hr * F32::load(s.t.data() + j * kBlockRows + i);
    }
    F32::store(s.m2.data() + i, m2 * splat(1.0f / float(d)));
    for (int64_t j = 0; j < b; ++j) {
      const vf t = F32::load(s.t.data() + j * kBlockRows + i), slope = F32::load(s.slope.data() + j * kBlockRows + i);
      const vf dh = post ? r * (t - m2 * r * F32::load(s.dz.data() + j * kBlockRows + i)) : t;
      F32::store(s.dz.data() + j * kBlockRows + i, dh * slope);
    }
  }
  // A row of ones, whose product with g is beta's gradient. Without a post-norm r is 1, and row b is that already.
  for (int64_t i = 0; i < n; ++i) s.hr[c * kBlockRows + i] = i < block.n ? 1.0f : 0.0f;
  if (p.layout.pre_norm) normalise<S>(block, d, saved, true, s);
  if (need_dx && !p.layout.pre_norm) {
    project<S>(s.dz.data(), b, block, d, w.down_sum,
               ToRows<S>{block.g, block.out, nullptr, nullptr, nullptr, block.next_g}, s);
  } else if (need_dx) {
    project<S>(s.dz.data(), b, block, d, w.down_sum, ToFloat{s.out.data(), d, false}, s);
    through_normalise<S>(block, d, saved, s);
  }
  if (partial == nullptr) return;
  if (p.layout.pre_norm)
    sums_by_column<Scaled<F32>>(Coefficients<float>{s.dz.data(), kBlockRows, 1}, b, block.n, s.source_rows.data(), d,
                                ToFloat{partial->down, d, !first});
  else
    accumulate<S>(s.dz.data(), b, block.n, d, block.x, ToFloat{partial->down, d, !first}, s);
  accumulate<S>(s.hr.data(), post ? c + 1 : c, block.n, d, block.g, ToFloat{partial->up, d, !first}, s);
  for (int64_t j = 0; j < b; ++j) {
    vf total = {};
    for (int64_t i = 0; i < n; i += kLanes) total += F32::load(s.dz.data() + j * kBlockRows + i);
    partial->dbias[j] = sum(total) + (first ? 0.0f : partial->dbias[j]);
  }
  if (!post) return;
  for (int64_t j = 0; j < c; ++j)
    for (int64_t i = 0; i < n; i += kLanes)
      F32::store(s.t.data() + j * kBlockRows + i,
                 F32::load(s.m2.data() + i) * F32::load(s.hr.data() + j * kBlockRows + i));
  dot<Widened<F32>>(s.hr_rows.data(), c, s.t_rows.data(), c, n, s.inner.data(), c);
  for (int64_t i = 0; i < c * c; ++i) partial->inner[i] = s.inner[i] + (first ? 0.0f : partial->inner[i]);
}

// How many rows add up in one part, whose sums take `size` floats. It depends on the shape alone, so that any number of
// threads adds in the same order. Few rows are cut into parts of one block, since otherwise one thread would have them
// all. The parts together stay within 16 MiB where that leaves at least eight of them: beyond 16 MiB malloc maps fresh
// pages at every call.
inline int64_t part_length(int64_t n, int64_t all_rows, int64_t size) {
  const int64_t most = std::max<int64_t>(8, (int64_t(1) << 22) / size);
  const int64_t least = n <= 4 * kBlockRows ? kBlockRows : 2 * kBlockRows;
  const int64_t rows = std::max({least, (n + 63) / 64, (all_rows + most - 1) / most});
  return (rows + kBlockRows - 1) / kBlockRows * kBlockRows;
}

template <class S>
void backward(const Problem& p, const Rows& g, const Rows& x, const SavedRows& saved, const float* packed,
              const FoldedWeights& folded, void* dx, float* dpacked, const Parallel& parallel) {
  const TaskRows tasks(p);
  const auto weights = unpack<S>(p, tasks, folded, parallel);
  const int64_t size = Partial::size(p.layout);
  const auto units = cut(p, tasks, [&](int64_t n) { return part_length(n, p.B * p.M, size); });
  const std::unique_ptr<float[]> sums(dpacked == nullptr ? nullptr : new float[size * units.size()]);
  parallel(int64_t(units.size()), [&](int64_t begin, int64_t end) {
    Scratch<S> scratch(p.layout, true);
    Block<S> block;
    for (int64_t u = begin; u < end; ++u) {
      const Partial partial(p.layout, sums == nullptr ? nullptr : sums.get() + u * size);
      for (int64_t i = units[u].first; i < units[u].last; i += kBlockRows) {
        const int64_t last = i + kBlockRows < units[u].last ? i + kBlockRows : units[u].last;
        fill<S>(block, p, tasks, units[u].task, i, last, x, &g, dx);
        backward_block<S>(p, *weights[units[u].task], block, dx != nullptr, saved,
                          dpacked == nullptr ? nullptr : &partial, i == units[u].first, scratch);
      }
    }
  });
  pass<S>(p, tasks, g, dx, nullptr);
  if (dpacked != nullptr) finish(p, units, sums.get(), size, packed, folded.mean, dpacked, parallel);
}
