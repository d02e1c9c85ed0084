// Rows to blocks of one task each, blocks to threads, partial sums to gradients. Included once per instruction set.

// The samples of each task, in order; and those without one.
struct TaskRows {
  std::vector<int64_t> samples;  // sorted by task
  std::vector<int64_t> begin;    // [T + 1] of each task in samples
  std::vector<int64_t> passed;   // samples of task -1

  explicit TaskRows(const Problem& p) : begin(p.T + 1, 0) {
    for (int64_t s = 0; s < p.B; ++s) {
      const int64_t t = p.task == nullptr ? 0 : p.task[s];
      if (t < 0)
        passed.push_back(s);
      else
        ++begin[t + 1];
    }
    for (int64_t t = 0; t < p.T; ++t) begin[t + 1] += begin[t];
    samples.resize(begin[p.T]);
    std::vector<int64_t> next(begin.begin(), begin.end() - 1);
    for (int64_t s = 0; s < p.B; ++s) {
      const int64_t t = p.task == nullptr ? 0 : p.task[s];
      if (t >= 0) samples[next[t]++] = s;
    }
  }

  int64_t rows(int64_t task, int64_t M) const { return (begin[task + 1] - begin[task]) * M; }
};

// A stretch of one task's rows.
struct Unit {
  int64_t task, first, last;
};

inline std::vector<Unit> cut(const Problem& p, const TaskRows& tasks, int64_t (*length)(int64_t)) {
  std::vector<Unit> units;
  for (int64_t t = 0; t < p.T; ++t) {
    const int64_t n = tasks.rows(t, p.M), step = length(n);
    for (int64_t i = 0; i < n; i += step) units.push_back({t, i, i + step < n ? i + step : n});
  }
  return units;
}

template <class S>
void fill(Block<S>& block, const Problem& p, const TaskRows& tasks, int64_t task, int64_t first, int64_t last,
          const Rows& x, const Rows* g, void* out) {
  block.n = last - first;
  for (int64_t i = 0; i < block.n; ++i) {
    const int64_t row = first + i, index = tasks.samples[tasks.begin[task] + row / p.M] * p.M + row % p.M;
    block.index[i] = index;
    block.x[i] = static_cast<const typename S::T*>(x.data) + x.offset[index];
    if (g != nullptr) block.g[i] = static_cast<const typename S::T*>(g->data) + g->offset[index];
    block.out[i] = out == nullptr ? nullptr : static_cast<typename S::T*>(out) + index * p.layout.d;
  }
}

// The weights of every task that has rows, unpacked once for all threads.
template <class S>
std::vector<std::unique_ptr<Weights>> unpack(const Problem& p, const TaskRows& tasks, const FoldedWeights& folded,
                                             const Parallel& parallel) {
  std::vector<std::unique_ptr<Weights>> weights(p.T);
  parallel(p.T, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t)
      if (tasks.rows(t, p.M) > 0) weights[t] = std::make_unique<Weights>(p, folded, t, S{});
  });
  return weights;
}

// Samples without a task: `from` goes to `to` bit for bit, what was saved is zero.
template <class S>
void pass(const Problem& p, const TaskRows& tasks, const Rows& from, void* to, const SavedRows* saved) {
  using T = typename S::T;
  for (const int64_t sample : tasks.passed) {
    for (int64_t index = sample * p.M; index < (sample + 1) * p.M; ++index) {
      if (to != nullptr)
        std::memcpy(static_cast<T*>(to) + index * p.layout.d, static_cast<const T*>(from.data) + from.offset[index],
                    p.layout.d * sizeof(T));
      if (saved == nullptr) continue;
      if (saved->z != nullptr) std::memset(static_cast<T*>(saved->z) + index * p.layout.b, 0, p.layout.b * sizeof(T));
      for (float* statistic : {saved->r, saved->pre_mean, saved->pre_rstd})
        if (statistic != nullptr) statistic[index] = 0.0f;
    }
  }
}

template <class S>
void forward(const Problem& p, const Rows& x, const FoldedWeights& folded, void* out, const SavedRows& saved,
             const Parallel& parallel) {
  const TaskRows tasks(p);
  const auto weights = unpack<S>(p, tasks, folded, parallel);
  const auto units = cut(p, tasks, [](int64_t) { return BLOCK; });
  parallel(int64_t(units.size()), [&](int64_t begin, int64_t end) {
    Scratch scratch(p.layout, false);
    Block<S> block;
    for (int64_t u = begin; u < end; ++u) {
      fill<S>(block, p, tasks, units[u].task, units[u].first, units[u].last, x, nullptr, out);
      forward_block<S>(p, *weights[units[u].task], block, saved, scratch);
    }
  });
  pass<S>(p, tasks, x, out, &saved);
}

// The gradient [P] of one task's packed weights from its sums over rows (docs/design.md).
inline void finish(const Problem& p, const Partial& sums, const float* packed, const float* mean, float* gradient) {
  const AdapterLayout& l = p.layout;
  const int64_t d = l.d, b = l.b, c = b + 1, cp = padded(b + 2);
  const float *down = sums.down.data(), *up = sums.up.data(), *wd = packed + l.down_weight();
  std::memcpy(gradient + l.down_bias(), sums.dbias.data(), b * sizeof(float));
  if (l.pre_norm) {
    const float *gamma = packed + l.pre_gamma(), *beta = packed + l.pre_beta();
    float *dgamma = gradient + l.pre_gamma(), *dbeta = gradient + l.pre_beta();
    std::memset(dgamma, 0, 2 * d * sizeof(float));
    for (int64_t j = 0; j < b; ++j) {
      for (int64_t i = 0; i < d; ++i) {
        dgamma[i] += wd[j * d + i] * down[j * d + i];
        dbeta[i] += wd[j * d + i] * sums.dbias[j];
        gradient[j * d + i] = down[j * d + i] * gamma[i] + sums.dbias[j] * beta[i];
      }
    }
  } else {
    std::memcpy(gradient + l.down_weight(), down, b * d * sizeof(float));
  }
  float *dup = gradient + l.up_weight(), *dbias = gradient + l.up_bias();
  if (!l.post_norm) {
    for (int64_t i = 0; i < d; ++i)
      for (int64_t j = 0; j < b; ++j) dup[i * b + j] = up[j * d + i];
    std::memcpy(dbias, up + b * d, d * sizeof(float));
    return;
  }
  const float *wu = packed + l.up_weight(), *bu = packed + l.up_bias(), *gamma = packed + l.post_gamma();
  std::memcpy(gradient + l.post_beta(), up + c * d, d * sizeof(float));
  Buffer row(cp), wa(cp);
  std::vector<double> column(c, 0.0);
  for (int64_t i = 0; i < d; ++i) {
    for (int64_t j = 0; j < b; ++j) wa[j] = wu[i * b + j] - mean[j];
    wa[b] = bu[i] - mean[b];
    float dgamma = 0.0f;
    for (int64_t j = 0; j < c; ++j) {
      dgamma += wa[j] * up[j * d + i];
      row[j] = gamma[i] * up[j * d + i];
    }
    gradient[l.post_gamma() + i] = dgamma;
    for (int64_t k = 0; k < c; ++k) {
      const float* inner = sums.inner.data() + k * cp;
      for (int64_t j = 0; j < c; ++j) row[j] -= wa[k] * inner[j];
    }
    for (int64_t j = 0; j < c; ++j) column[j] += row[j];
    std::memcpy(dup + i * b, row.data(), b * sizeof(float));
    dbias[i] = row[b];
  }
  for (int64_t i = 0; i < d; ++i) {
    for (int64_t j = 0; j < b; ++j) dup[i * b + j] -= float(column[j] / d);
    dbias[i] -= float(column[b] / d);
  }
}

// Rows whose sums one part holds: a function of their number alone, so that any number of threads adds in the same
// order.
inline int64_t part_length(int64_t n) {
  const int64_t even = (n + 63) / 64;
  return even <= 2 * BLOCK ? 2 * BLOCK : (even + BLOCK - 1) / BLOCK * BLOCK;
}

template <class S>
void backward(const Problem& p, const Rows& g, const Rows& x, const SavedRows& saved, const float* packed,
              const FoldedWeights& folded, void* dx, float* dpacked, const Parallel& parallel) {
  const TaskRows tasks(p);
  const auto weights = unpack<S>(p, tasks, folded, parallel);
  const auto units = cut(p, tasks, part_length);
  std::vector<Partial> partials(dpacked == nullptr ? 0 : units.size());
  parallel(int64_t(units.size()), [&](int64_t begin, int64_t end) {
    Scratch scratch(p.layout, true);
    Block<S> block;
    for (int64_t u = begin; u < end; ++u) {
      Partial* partial = dpacked == nullptr ? nullptr : &partials[u];
      if (partial != nullptr) partial->clear(p.layout);
      for (int64_t i = units[u].first; i < units[u].last; i += BLOCK) {
        const int64_t last = i + BLOCK < units[u].last ? i + BLOCK : units[u].last;
        fill<S>(block, p, tasks, units[u].task, i, last, x, &g, dx);
        backward_block<S>(p, *weights[units[u].task], block, dx != nullptr, saved, partial, scratch);
      }
    }
  });
  pass<S>(p, tasks, g, dx, nullptr);
  if (dpacked == nullptr) return;
  std::vector<size_t> first(p.T + 1, 0);
  for (const Unit& unit : units) ++first[unit.task + 1];
  for (int64_t t = 0; t < p.T; ++t) first[t + 1] += first[t];
  parallel(p.T, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      float* gradient = dpacked + t * p.layout.numel();
      if (first[t] == first[t + 1]) {
        std::memset(gradient, 0, p.layout.numel() * sizeof(float));
        continue;
      }
      for (size_t u = first[t] + 1; u < first[t + 1]; ++u) partials[first[t]].add(partials[u]);
      const float* mean = p.layout.post_norm ? folded.mean + t * (p.layout.b + 1) : nullptr;
      finish(p, partials[first[t]], packed + t * p.layout.numel(), mean, gradient);
    }
  });
}
