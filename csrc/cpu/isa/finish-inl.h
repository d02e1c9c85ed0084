// The gradients of the packed weights from partial sums over rows (docs/design.md has the formulas).

// The float32 sums over one part of a task's rows, from which the gradient of its weights is made.
struct Partial {
  float* down;   // [b, d]       dz^T source
  float* up;     // [b + 2, d]   [r h ; r ; 1]^T g: A transposed, then the sum of g
  float* inner;  // [b + 1, b + 1]   (m2 r h~)^T (r h~)
  float* dbias;  // [b]

  static int64_t size(const AdapterLayout& l) {
    return padded(l.b * l.d + (l.b + 2) * l.d + (l.b + 1) * (l.b + 1) + l.b);
  }

  Partial(const AdapterLayout& l, float* base)
      : down(base), up(down + l.b * l.d), inner(up + (l.b + 2) * l.d), dbias(inner + (l.b + 1) * (l.b + 1)) {}
};

// Columns of d that one thread finishes at a time. The number is fixed, so that sums over d have one order.
constexpr int64_t kSliceColumns = 256;
static_assert(kSliceColumns % kLanes == 0);

// The last step for one task.
struct Finish {
  const AdapterLayout& l;
  Partial sums;         // those of the first part, to which the others are added
  int64_t parts, size;  // parts of the task, and the distance between them in floats
  const float* packed;  // [P]
  const float* mean;    // [b + 1]
  float* gradient;      // [P]

  // Adds all other parts to to[0 .. n), which lies in the first part, in their order.
  void reduce(float* to, int64_t n) const {
    for (int64_t part = 1; part < parts; ++part) {
      const float* from = to + part * size;
      for (int64_t i = 0; i < n; ++i) to[i] += from[i];
    }
  }

  // The sum of n numbers. Eight running sums, because a single one would wait for each addition before the next.
  static double total(const float* v, int64_t n) {
    double lane[8] = {};
    int64_t i = 0;
    for (; i + 8 <= n; i += 8)
      for (int64_t k = 0; k < 8; ++k) lane[k] += v[i + k];
    for (; i < n; ++i) lane[0] += v[i];
    return ((lane[0] + lane[1]) + (lane[2] + lane[3])) + ((lane[4] + lane[5]) + (lane[6] + lane[7]));
  }

  // The gradients of the down-projection and of the pre-norm, for n columns.
  void down_columns(int64_t from, int64_t n) const {
    const int64_t d = l.d, b = l.b;
    const float* wd = packed + l.down_weight();
    float *dgamma = gradient + l.pre_gamma() + from, *dbeta = gradient + l.pre_beta() + from;
    if (l.pre_norm) std::memset(dgamma, 0, n * sizeof(float));
    if (l.pre_norm) std::memset(dbeta, 0, n * sizeof(float));
    for (int64_t j = 0; j < b; ++j) {
      float *down = sums.down + j * d + from, *to = gradient + l.down_weight() + j * d + from;
      reduce(down, n);
      if (!l.pre_norm) {
        std::memcpy(to, down, n * sizeof(float));
        continue;
      }
      const float *gamma = packed + l.pre_gamma() + from, *beta = packed + l.pre_beta() + from;
      const float *w = wd + j * d + from, dbias = sums.dbias[j];
      for (int64_t i = 0; i < n; ++i) {
        dgamma[i] += w[i] * down[i];
        dbeta[i] += w[i] * dbias;
        to[i] = down[i] * gamma[i] + dbias * beta[i];
      }
    }
  }

  // Replaces A^T by d[W_u | b_u]^T before its column means are subtracted. The sums for those means go to `column`.
  void up_columns(int64_t from, int64_t n, double* column) const {
    const int64_t d = l.d, b = l.b, c = b + 1;
    for (int64_t j = 0; j < (l.post_norm ? c + 1 : c); ++j) reduce(sums.up + j * d + from, n);
    if (!l.post_norm) return;
    std::memcpy(gradient + l.post_beta() + from, sums.up + c * d + from, n * sizeof(float));
    const float *wu = packed + l.up_weight() + from * b, *bu = packed + l.up_bias() + from;
    const float* gamma = packed + l.post_gamma() + from;
    Buffer wa(c * kSliceColumns);  // [W_u | b_u]^T minus its means
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < b; ++j) wa[j * kSliceColumns + i] = wu[i * b + j] - mean[j];
    for (int64_t i = 0; i < n; ++i) wa[b * kSliceColumns + i] = bu[i] - mean[b];
    float* dgamma = gradient + l.post_gamma() + from;
    std::memset(dgamma, 0, n * sizeof(float));
    for (int64_t j = 0; j < c; ++j) {
      float* up = sums.up + j * d + from;
      for (int64_t i = 0; i < n; ++i) {
        dgamma[i] += wa[j * kSliceColumns + i] * up[i];
        up[i] *= gamma[i];
      }
    }
    const auto rows = rows_of<float>(wa.data(), c, kSliceColumns);
    sums_by_column<Scaled<F32>>(Coefficients<float>{sums.inner, c, 1}, c, c, rows.data(), n,
                                Subtract{sums.up + from, d});
    for (int64_t j = 0; j < c; ++j) column[j] = total(sums.up + j * d + from, n);
  }

  // Subtracts the means and writes the result, transposed, to the gradient.
  void store_up(int64_t from, int64_t n, const double* column) const {
    const int64_t d = l.d, b = l.b;
    float *dup = gradient + l.up_weight() + from * b, *dbias = gradient + l.up_bias() + from;
    const auto mean_of = [&](int64_t j) { return l.post_norm ? float(column[j] / double(d)) : 0.0f; };
    for (int64_t j = 0; j < b; ++j) {
      const float *up = sums.up + j * d + from, m = mean_of(j);
      for (int64_t i = 0; i < n; ++i) dup[i * b + j] = up[i] - m;
    }
    const float m = mean_of(b);
    for (int64_t i = 0; i < n; ++i) dbias[i] = sums.up[b * d + from + i] - m;
  }
};

inline void finish(const Problem& p, const std::vector<Unit>& units, float* sums, int64_t size, const float* packed,
                   const float* mean, float* dpacked, const Parallel& parallel) {
  const AdapterLayout& l = p.layout;
  const int64_t P = l.numel(), c = l.b + 1, slices = (l.d + kSliceColumns - 1) / kSliceColumns;
  std::vector<int64_t> first(p.T + 1, 0);
  for (const Unit& unit : units) ++first[unit.task + 1];
  for (int64_t t = 0; t < p.T; ++t) first[t + 1] += first[t];
  std::vector<Finish> tasks;
  for (int64_t t = 0; t < p.T; ++t) {
    if (first[t] == first[t + 1])
      std::memset(dpacked + t * P, 0, P * sizeof(float));
    else
      tasks.push_back({l, Partial(l, sums + first[t] * size), first[t + 1] - first[t], size, packed + t * P,
                       l.post_norm ? mean + t * c : nullptr, dpacked + t * P});
  }
  const auto each_slice = [&](const std::function<void(Finish&, int64_t, int64_t, int64_t)>& body) {
    parallel(int64_t(tasks.size()) * slices, [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k) {
        const int64_t from = k % slices * kSliceColumns, n = from + kSliceColumns < l.d ? kSliceColumns : l.d - from;
        body(tasks[k / slices], k, from, n);
      }
    });
  };
  for (const Finish& task : tasks) {
    if (l.post_norm) task.reduce(task.sums.inner, c * c);
    task.reduce(task.sums.dbias, l.b);
    std::memcpy(task.gradient + l.down_bias(), task.sums.dbias, l.b * sizeof(float));
  }
  std::vector<double> columns(tasks.size() * slices * c, 0.0);
  each_slice([&](Finish& task, int64_t k, int64_t from, int64_t n) {
    task.down_columns(from, n);
    task.up_columns(from, n, columns.data() + k * c);
  });
  for (size_t t = 0; t < tasks.size(); ++t)
    for (int64_t slice = 1; slice < slices; ++slice)
      for (int64_t j = 0; j < c; ++j) columns[t * slices * c + j] += columns[(t * slices + slice) * c + j];
  each_slice([&](Finish& task, int64_t k, int64_t from, int64_t n) {
    task.store_up(from, n, columns.data() + k / slices * slices * c);
  });
}
