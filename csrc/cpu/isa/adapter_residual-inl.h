// The adapter, dropout, residual sum and norm of a block of rows: what the adapter returns stays in the second-level
// cache. The results have the bits of the two kernels in turn.

template <class S, class W>
void forward_residual(const Problem& p, const Rows& x, const FoldedWeights& folded, const ResidualForward& sum,
                      const SavedRows& saved, const Parallel& parallel) {
  using T = typename S::T;
  const int64_t d = p.layout.d;
  const TaskRows tasks(p);
  const auto weights = unpack<S>(p, tasks, folded, parallel);
  const auto units = cut(p, tasks, [](int64_t) { return kBlockRows; });
  const Buffer weight = norm_weight<W>(sum.weight, d);
  parallel(int64_t(units.size()), [&](int64_t begin, int64_t end) {
    Scratch<S> scratch(p.layout, false);
    std::vector<T, LineAligned<T>> adapted(kBlockRows * d);
    ResidualRows<S, W> finish(sum, weight);
    Block<S> block;
    for (int64_t u = begin; u < end; ++u) {
      fill<S>(block, p, tasks, units[u].task, units[u].first, units[u].last, x, nullptr, nullptr);
      for (int64_t i = 0; i < block.n; ++i) block.out[i] = adapted.data() + i * d;
      forward_block<S>(p, *weights[units[u].task], block, saved, scratch);
      for (int64_t i = 0; i < block.n; ++i) finish(block.index[i], block.out[i]);
    }
  });
  parallel(int64_t(tasks.passed.size()), [&](int64_t begin, int64_t end) {
    ResidualRows<S, W> finish(sum, weight);
    for (int64_t s = begin; s < end; ++s)
      for (int64_t i = tasks.passed[s] * p.M; i < (tasks.passed[s] + 1) * p.M; ++i) finish(i, row_of<S>(x, i));
  });
  pass<S>(p, tasks, x, nullptr, &saved);
}

void forward_residual_any(const Problem& p, const Rows& x, const FoldedWeights& folded, const ResidualForward& sum,
                          const SavedRows& saved, const Parallel& parallel) {
  with_storage(p.dtype, [&]<class S>(S) {
    with_storage(sum.weight_dtype, [&]<class W>(W) { forward_residual<S, W>(p, x, folded, sum, saved, parallel); });
  });
}
