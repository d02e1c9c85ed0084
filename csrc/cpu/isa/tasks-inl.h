// Which rows belong to which task, how a task's rows are cut into units, and its unpacked weights.

// The samples of each task, in order, and the samples without one.
struct TaskRows {
  std::vector<int64_t> samples;  // sorted by task
  std::vector<int64_t> begin;    // [T + 1]: where each task begins in `samples`
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

// Rows first .. last - 1 of one task.
struct Unit {
  int64_t task, first, last;
};

inline std::vector<Unit> cut(const Problem& p, const TaskRows& tasks, const std::function<int64_t(int64_t)>& length) {
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
  using T = typename S::T;
  const int64_t end = tasks.rows(task, p.M);
  const auto index_of = [&](int64_t row) { return tasks.samples[tasks.begin[task] + row / p.M] * p.M + row % p.M; };
  block.n = last - first;
  for (int64_t i = 0; i < block.n; ++i) {
    const int64_t index = index_of(first + i), next = last + i < end ? index_of(last + i) : -1;
    block.index[i] = index;
    block.x[i] = static_cast<const T*>(x.data) + x.offset[index];
    block.next_x[i] = next < 0 ? nullptr : static_cast<const T*>(x.data) + x.offset[next];
    if (g != nullptr) block.g[i] = static_cast<const T*>(g->data) + g->offset[index];
    if (g != nullptr) block.next_g[i] = next < 0 ? nullptr : static_cast<const T*>(g->data) + g->offset[next];
    block.out[i] = out == nullptr ? nullptr : static_cast<T*>(out) + index * p.layout.d;
  }
}

// The weights of every task that has rows, unpacked once for all threads.
template <class S>
std::vector<std::unique_ptr<Weights<S>>> unpack(const Problem& p, const TaskRows& tasks, const FoldedWeights& folded,
                                                const Parallel& parallel) {
  std::vector<std::unique_ptr<Weights<S>>> weights(p.T);
  parallel(p.T, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t)
      if (const int64_t rows = tasks.rows(t, p.M); rows > 0)
        weights[t] = std::make_unique<Weights<S>>(p, folded, t, rows);
  });
  return weights;
}

// Samples without a task: copies `from` to `to` bit for bit, and saves zeros.
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
