// One block of rows of one task: forward and backward. Included once per instruction set.

// Up to BLOCK rows, and where they are in the whole.
template <class S>
struct Block {
  int64_t n;             // rows
  int64_t index[BLOCK];  // of each row in z, r, out, dx
  const typename S::T* x[BLOCK];
  const typename S::T* g[BLOCK];
  typename S::T* out[BLOCK];  // rows of out, or of dx
};

// Working memory of one thread.
struct Scratch {
  int64_t bp, cp;  // b and b + 2, padded to whole vectors
  Buffer z, h, dh, slope, hr, q, t, m2, source, out;
  std::vector<const float*> source_rows;

  Scratch(const AdapterLayout& l, bool backward)
      : bp(padded(l.b)), cp(padded(l.b + 2)), z(BLOCK * bp), h(BLOCK * bp), hr(BLOCK * cp), q(BLOCK * cp) {
    if (backward) {
      dh.resize(BLOCK * cp);
      slope.resize(BLOCK * bp);
      t.resize(BLOCK * cp);
      m2.resize(BLOCK);
    }
    if (l.pre_norm) {
      source.resize(BLOCK * l.d);
      source_rows = Weights::rows_of(source.data(), BLOCK, l.d);
      if (backward) out.resize(BLOCK * l.d);
    }
  }
};

constexpr float EPS = 1e-5f;

template <class S>
HF_INLINE void row_statistics(const typename S::T* x, int64_t d, float& mean, float& rstd) {
  double total = 0, square = 0;
  vf acc = {};
  int64_t c = 0;
  for (; c + W <= d; c += W) acc += S::load(x + c);
  total = sum(acc);
  for (; c < d; ++c) total += S::one(x[c]);
  mean = float(total / d);
  acc = vf{};
  for (c = 0; c + W <= d; c += W) {
    const vf v = S::load(x + c) - splat(mean);
    acc += v * v;
  }
  square = sum(acc);
  for (; c < d; ++c) square += double(S::one(x[c]) - mean) * (S::one(x[c]) - mean);
  rstd = 1.0f / __builtin_sqrtf(float(square / d) + EPS);
}

// source = (x - mean) rstd, in float32.
template <class S>
void normalise(const Block<S>& block, int64_t d, const SavedRows& saved, bool known, Scratch& s) {
  for (int64_t i = 0; i < block.n; ++i) {
    float mean, rstd;
    if (known) {
      mean = saved.pre_mean[block.index[i]];
      rstd = saved.pre_rstd[block.index[i]];
    } else {
      row_statistics<S>(block.x[i], d, mean, rstd);
      if (saved.pre_mean != nullptr) {
        saved.pre_mean[block.index[i]] = mean;
        saved.pre_rstd[block.index[i]] = rstd;
      }
    }
    float* to = s.source.data() + i * d;
    int64_t c = 0;
    for (; c + W <= d; c += W) F32::store(to + c, (S::load(block.x[i] + c) - splat(mean)) * splat(rstd));
    for (; c < d; ++c) to[c] = (S::one(block.x[i][c]) - mean) * rstd;
  }
}

// q [n, cp] = R [h ; 1] for the rows in s.h; hr = [h ; 1 ; 0...] first. Returns nothing: q and hr are in s.
inline void root_rows(const Weights& w, int64_t b, int64_t n, Scratch& s) {
  for (int64_t i = 0; i < n; ++i) {
    float* hr = s.hr.data() + i * s.cp;
    for (int64_t j = 0; j < b; ++j) hr[j] = s.h[i * s.bp + j];
    hr[b] = 1.0f;
    for (int64_t j = b + 1; j < s.cp; ++j) hr[j] = 0.0f;
  }
  const int64_t width = padded(b + 1);
  weighted_sums<F32>(Coefficients{s.hr.data(), s.cp, 1}, n, b + 1, w.root_t_rows.data(), width,
                     ToFloat{s.q.data(), s.cp, false});
}

inline float norm_of(const float* q, int64_t n) {
  vf acc = {};
  int64_t j = 0;
  for (; j + W <= n; j += W) {
    const vf v = F32::load(q + j);
    acc += v * v;
  }
  float total = sum(acc);
  for (; j < n; ++j) total += q[j] * q[j];
  return total;
}

template <class S>
void forward_block(const Problem& p, const Weights& w, const Block<S>& block, const SavedRows& saved, Scratch& s) {
  const int64_t d = p.layout.d, b = p.layout.b, n = block.n;
  if (p.layout.pre_norm) {
    normalise<S>(block, d, saved, false, s);
    dot<F32>(s.source_rows.data(), n, w.down, b, d, d, s.z.data(), s.bp);
  } else {
    dot<S>(block.x, n, w.down, b, d, d, s.z.data(), s.bp);
  }
  for (int64_t i = 0; i < n; ++i) {
    float* z = s.z.data() + i * s.bp;
    for (int64_t j = 0; j < b; ++j) {
      const typename S::T rounded = S::narrow(z[j] + w.bias[j]);
      if (saved.z != nullptr) static_cast<typename S::T*>(saved.z)[block.index[i] * b + j] = rounded;
      z[j] = S::one(rounded);
    }
    for (int64_t j = b; j < s.bp; ++j) z[j] = 0.0f;
  }
  activate_buffer(p.activation, s.z.data(), s.h.data(), nullptr, n * s.bp);
  if (p.layout.post_norm) root_rows(w, b, n, s);
  for (int64_t i = 0; i < n; ++i) {
    const float r = p.layout.post_norm ? 1.0f / __builtin_sqrtf(norm_of(s.q.data() + i * s.cp, b + 1) + EPS) : 1.0f;
    if (saved.r != nullptr && p.layout.post_norm) saved.r[block.index[i]] = r;
    float* hr = s.hr.data() + i * s.cp;
    for (int64_t j = 0; j < b; ++j) hr[j] = w.scaled(r * s.h[i * s.bp + j], j);
    hr[b] = r;
  }
  const Coefficients a{s.hr.data(), s.cp, 1};
  weighted_sums<F32>(a, n, b + 1, w.up_rows.data(), d, ToRows<S>{block.x, block.out, w.beta});
}

// Sums over rows that make the gradient of one task's weights, float32: one part of the rows each.
struct Partial {
  Buffer down;   // [b, d]   dz^T source
  Buffer up;     // [b + 2, d]   [r h ; r ; 1]^T g: A transposed, then the sum of g
  Buffer inner;  // [b + 1, cp]   (m2 r h~)^T (r h~)
  Buffer dbias;  // [b]

  void clear(const AdapterLayout& l) {
    down.assign(l.b * l.d, 0.0f);
    up.assign((l.b + 2) * l.d, 0.0f);
    inner.assign((l.b + 1) * padded(l.b + 2), 0.0f);
    dbias.assign(l.b, 0.0f);
  }

  void add(const Partial& other) {
    add(down, other.down);
    add(up, other.up);
    add(inner, other.inner);
    add(dbias, other.dbias);
  }

  static void add(Buffer& to, const Buffer& from) {
    for (size_t i = 0; i < to.size(); ++i) to[i] += from[i];
  }
};

template <class S>
void backward_block(const Problem& p, const Weights& w, const Block<S>& block, bool need_dx, const SavedRows& saved,
                    Partial* partial, Scratch& s) {
  const int64_t d = p.layout.d, b = p.layout.b, n = block.n, c = b + 1;
  const bool post = p.layout.post_norm;
  for (int64_t i = 0; i < n; ++i) {
    const auto* z = static_cast<const typename S::T*>(saved.z) + block.index[i] * b;
    for (int64_t j = 0; j < s.bp; ++j) s.z[i * s.bp + j] = j < b ? S::one(z[j]) : 0.0f;
  }
  activate_buffer(p.activation, s.z.data(), s.h.data(), s.slope.data(), n * s.bp);
  dot<S>(block.g, n, w.up, b, d, d, s.t.data(), s.cp);
  if (post) dot<S>(block.g, n, w.up_bias, 1, d, d, s.t.data() + b, s.cp);
  if (post) {
    root_rows(w, b, n, s);
    weighted_sums<F32>(Coefficients{s.q.data(), s.cp, 1}, n, c, w.root_rows.data(), padded(c),
                       ToFloat{s.dh.data(), s.cp, false});
  }
  for (int64_t i = 0; i < n; ++i) {
    const float r = post ? saved.r[block.index[i]] : 1.0f;
    const float *h = s.h.data() + i * s.bp, *slope = s.slope.data() + i * s.bp;
    float *t = s.t.data() + i * s.cp, *hr = s.hr.data() + i * s.cp, *dz = s.dh.data() + i * s.cp;
    for (int64_t j = 0; j < b; ++j) t[j] = w.scaled(t[j], j);
    for (int64_t j = 0; j < b; ++j) hr[j] = r * h[j];
    hr[b] = r;
    hr[c] = 1.0f;  // its sum over g is beta's gradient
    for (int64_t j = c + 1; j < s.cp; ++j) hr[j] = 0.0f;
    float m2 = 0.0f;
    if (post) {
      for (int64_t j = 0; j < c; ++j) m2 += t[j] * hr[j];
      s.m2[i] = m2 / float(d);
      for (int64_t j = 0; j < b; ++j) dz[j] = r * (t[j] - m2 * r * dz[j]) * slope[j];
    } else {
      for (int64_t j = 0; j < b; ++j) dz[j] = t[j] * slope[j];
    }
  }
  if (p.layout.pre_norm) normalise<S>(block, d, saved, true, s);
  const Coefficients dz{s.dh.data(), s.cp, 1};
  if (need_dx && !p.layout.pre_norm) {
    weighted_sums<F32>(dz, n, b, w.down_rows.data(), d, ToRows<S>{block.g, block.out, nullptr});
  } else if (need_dx) {
    weighted_sums<F32>(dz, n, b, w.down_rows.data(), d, ToFloat{s.out.data(), d, false});
    for (int64_t i = 0; i < n; ++i) {
      const float *branch = s.out.data() + i * d, *source = s.source.data() + i * d,
                  rstd = saved.pre_rstd[block.index[i]];
      double mean = 0, along = 0;
      for (int64_t k = 0; k < d; ++k) {
        mean += branch[k];
        along += double(branch[k]) * source[k];
      }
      const float m = float(mean / d), a = float(along / d);
      for (int64_t k = 0; k < d; ++k)
        block.out[i][k] = S::narrow(S::one(block.g[i][k]) + rstd * (branch[k] - m - source[k] * a));
    }
  }
  if (partial == nullptr) return;
  const Coefficients dz_t{s.dh.data(), 1, s.cp}, hr_t{s.hr.data(), 1, s.cp};
  if (p.layout.pre_norm) {
    weighted_sums<F32>(dz_t, b, n, s.source_rows.data(), d, ToFloat{partial->down.data(), d, true});
  } else {
    weighted_sums<S>(dz_t, b, n, block.x, d, ToFloat{partial->down.data(), d, true});
  }
  weighted_sums<S>(hr_t, post ? c + 1 : c, n, block.g, d, ToFloat{partial->up.data(), d, true});
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < b; ++j) partial->dbias[j] += s.dh[i * s.cp + j];
  if (!post) return;
  for (int64_t i = 0; i < n; ++i) {
    const float* hr = s.hr.data() + i * s.cp;
    for (int64_t j = 0; j < c; ++j) {
      const float m = s.m2[i] * hr[j];
      float* to = partial->inner.data() + j * s.cp;
      for (int64_t k = 0; k < c; ++k) to[k] += m * hr[k];
    }
  }
}
