// Attention of one head at a time. The scores of a tile of queries stay in the cache: neither they nor what the dropout
// makes of the probabilities are ever in memory.

// to [m, n] = a [m, K] b [K, n], or += where `to` adds.
template <class S>
HFF_INLINE void multiply(Coefficients<typename Operands<S>::Element> a, int64_t m, int64_t K, const Source<S>& b,
                         int64_t n, const ToFloat& to) {
  sums_by_column<typename Operands<S>::Term>(a, m, steps<S>(K), b.rows(), padded(n), to);
}

// Float32 results [m, n] of products.
class Results {
 public:
  Results(int64_t m, int64_t n) : ld_(spread(n)), data_(m * ld_) {}

  float* row(int64_t i) { return data_.data() + i * ld_; }
  ToFloat write() { return {data_.data(), ld_, false}; }
  ToFloat add() { return {data_.data(), ld_, true}; }

 private:
  int64_t ld_;
  Buffer data_;
};

HFF_INLINE void drop(float* row, int64_t end, const Keep& keep) {
  for (int64_t c = 0; c < end; c += kLanes) F32::store(row + c, keep.apply(c, F32::load(row + c)));
}

HFF_INLINE void scale(float* row, int64_t end, float factor) {
  if (factor == 1.0f) return;
  for (int64_t c = 0; c < end; c += kLanes) F32::store(row + c, F32::load(row + c) * splat(factor));
}

// The m rows from row `first` of a head on: those of `from`, times `factor`, go to a contiguous tensor [B, L, H, n].
template <class S>
void store_head(Results& from, int64_t m, int64_t n, float factor, const AttentionProblem& p, const ScoreRow& first,
                int64_t L, void* to) {
  for (int64_t i = 0; i < m; ++i) {
    scale(from.row(i), padded(n), factor);
    store_row<S>(from.row(i), n, row_of<S>(to, n, (first.b * L + first.i + i) * p.H + first.h));
  }
}

// Queries of a tile, whose scores are to take some `bytes`.
inline int64_t tile_rows(int64_t queries, int64_t Lk, int64_t bytes, int64_t most) {
  const int64_t rows = bytes / int64_t(sizeof(float)) / std::max<int64_t>(padded(Lk), 1) / kSumResults * kSumResults;
  return std::min(queries, std::clamp<int64_t>(rows, kSumResults, most));
}

// A tile [m, Lk] of numbers that are computed in float32 and become the operand of a product. Unless that takes pairs
// of bfloat16, both are the same memory.
template <class S>
class ComputedTile {
 public:
  ComputedTile(int64_t m, int64_t n)
      : n_(n), operand_(m, n), wide_(Operands<S>::paired ? m : 0, n), pairs_(Operands<S>::paired ? m : 0, n) {}

  float* row(int64_t i) {
    if constexpr (Operands<S>::paired)
      return wide_.row(i);
    else
      return operand_.row(i);
  }
  ToFloat write() {
    if constexpr (Operands<S>::paired)
      return wide_.write();
    else
      return {operand_.row(0), operand_.ld(), false};
  }

  // Rounds row i for the products, which have to follow.
  void finish(int64_t i) {
    if constexpr (Operands<S>::paired)
      for (int64_t c = 0; c < padded(n_); c += kLanes) operand_.store(i, c, F32::load(row(i) + c));
  }

  // The left operand of a product with the tile, and with the transpose of its first m rows.
  Coefficients<typename Operands<S>::Element> as_is() const { return operand_.coefficients(); }
  Coefficients<typename Operands<S>::Element> transposed(int64_t m) {
    if constexpr (Operands<S>::paired) {
      pairs_.copy(operand_.numbers(0), operand_.numbers(1) - operand_.numbers(0), m, n_);
      return pairs_.transposed();
    } else {
      return {operand_.row(0), 1, operand_.ld()};
    }
  }

 private:
  int64_t n_;
  RowTile<S> operand_;
  Results wide_;
  Source<S> pairs_;
};

template <class S>
class AttentionForward {
 public:
  AttentionForward(const AttentionProblem& p, int64_t queries)
      : p_(p),
        tile_(tile_rows(queries, p.Lk, 1 << 15, 64)),
        key_rows_(padded(p.Lk), p.dk),
        keys_(p.dk, p.Lk),
        values_(p.Lk, p.dv),
        queries_(tile_, p.dk),
        weights_(tile_, p.Lk),
        out_(tile_, p.dv),
        keep_(p.dropout, p.Lk) {}

  // Some queries of one head, from the row `at` on.
  void run(ScoreRow at, int64_t queries, const View4& q, const View4& k, const View4& v, void* out,
           void* probabilities) {
    const ScoreRow head{at.b, at.h, 0};
    key_rows_.copy(row_of<S>(k, head), k.stride[2], p_.Lk, p_.dk, padded(p_.Lk) - p_.Lk);
    keys_.copy_transposed(key_rows_, padded(p_.Lk), p_.dk);
    values_.copy(row_of<S>(v, head), v.stride[2], p_.Lk, p_.dv);
    for (const int64_t end = at.i + queries; at.i < end; at.i += tile_) {
      const int64_t m = std::min(tile_, end - at.i);
      queries_.copy(row_of<S>(q, at), q.stride[2], m, p_.dk);
      multiply<S>(queries_.coefficients(), m, p_.dk, keys_, p_.Lk, weights_.write());
      for (int64_t i = 0; i < m; ++i) weigh(i, {at.b, at.h, at.i + i}, probabilities);
      multiply<S>(weights_.as_is(), m, p_.Lk, values_, p_.dv, out_.write());
      store_head<S>(out_, m, p_.dv, 1.0f, p_, at, p_.Lq, out);
    }
  }

 private:
  // Turns scores into weights, in row i of the tile.
  void weigh(int64_t i, const ScoreRow& at, void* probabilities) {
    const int64_t n = p_.Lk, end = padded(n), r = at.index(p_);
    float* row = weights_.row(i);
    scale(row, end, p_.scaling);
    add_terms(p_, at, row);
    softmax_row(row, n);
    if (probabilities != nullptr) store_row<S>(row, n, row_of<S>(probabilities, n, r));
    if (p_.dropout.drops()) {
      keep_.draw(r);
      drop(row, end, keep_);
    }
    weights_.finish(i);
  }

  const AttentionProblem& p_;
  int64_t tile_;
  RowTile<S> key_rows_;
  Source<S> keys_, values_;
  RowTile<S> queries_;
  ComputedTile<S> weights_;
  Results out_;
  Keep keep_;
};

template <class S>
void attention_forward(const AttentionProblem& p, const View4& q, const View4& k, const View4& v, void* out,
                       void* probabilities, const Parallel& parallel) {
  // A part is some queries of one head; it copies the keys and values of this head.
  const int64_t most = std::min<int64_t>(p.Lq, 256), parts = (p.Lq + most - 1) / most;
  parallel(p.B * p.H * parts, [&](int64_t begin, int64_t end) {
    AttentionForward<S> forward(p, most);
    for (int64_t part = begin; part < end; ++part) {
      const int64_t head = part / parts, first = part % parts * most;
      forward.run({head / p.H, head % p.H, first}, std::min(most, p.Lq - first), q, k, v, out, probabilities);
    }
  });
}

template <class S>
class AttentionBackward {
 public:
  explicit AttentionBackward(const AttentionProblem& p)
      : p_(p),
        tile_(tile_rows(p.Lq, p.Lk, 1 << 16, 128)),
        value_rows_(padded(p.Lk), p.dv),
        values_(p.dv, p.Lk),
        keys_(p.Lk, p.dk),
        gradient_rows_(tile_, p.dv),
        gradients_(tile_, p.dv),
        queries_(tile_, p.dk),
        weights_(tile_, p.Lk),
        dscores_(tile_, p.Lk),
        dq_(tile_, p.dk),
        dk_(p.Lk, p.dk),
        dv_(p.Lk, p.dv),
        keep_(p.dropout, p.Lk) {}

  // One head.
  void run(ScoreRow at, const View4& g, const View4& q, const View4& k, const View4& v, const void* probabilities,
           const AttentionGradients& to) {
    const int64_t Lk = p_.Lk;
    const ScoreRow head = at;
    value_rows_.copy(row_of<S>(v, head), v.stride[2], Lk, p_.dv, padded(Lk) - Lk);
    values_.copy_transposed(value_rows_, padded(Lk), p_.dv);
    keys_.copy(row_of<S>(k, head), k.stride[2], Lk, p_.dk);
    for (; at.i < p_.Lq; at.i += tile_) {
      const int64_t m = std::min(tile_, p_.Lq - at.i);
      gradient_rows_.copy(row_of<S>(g, at), g.stride[2], m, p_.dv);
      gradients_.copy(row_of<S>(g, at), g.stride[2], m, p_.dv);
      queries_.copy(row_of<S>(q, at), q.stride[2], m, p_.dk);
      multiply<S>(gradient_rows_.coefficients(), m, p_.dv, values_, Lk, dscores_.write());
      for (int64_t i = 0; i < m; ++i) differentiate(i, at.index(p_) + i, probabilities, to.dscores);
      multiply<S>(dscores_.as_is(), m, Lk, keys_, p_.dk, dq_.write());
      store_head<S>(dq_, m, p_.dk, p_.scaling, p_, at, p_.Lq, to.dq);
      // The sums over all queries of the head start with the first tile.
      const bool start = at.i == 0;
      multiply<S>(dscores_.transposed(m), Lk, m, queries_, p_.dk, start ? dk_.write() : dk_.add());
      multiply<S>(weights_.transposed(m), Lk, m, gradients_, p_.dv, start ? dv_.write() : dv_.add());
    }
    store_head<S>(dk_, Lk, p_.dk, p_.scaling, p_, head, Lk, to.dk);
    store_head<S>(dv_, Lk, p_.dv, 1.0f, p_, head, Lk, to.dv);
  }

 private:
  // Turns the gradient of the weights into that of the scores, in row i of the tile, and makes the weights again.
  void differentiate(int64_t i, int64_t r, const void* probabilities, void* dscores) {
    const int64_t n = p_.Lk, end = padded(n);
    float *p = weights_.row(i), *dp = dscores_.row(i);
    widen_row<S>(static_cast<const typename S::T*>(probabilities) + r * n, n, p);
    keep_.draw(r);
    softmax_gradient(p, keep_, end, dp);
    if (dscores != nullptr) store_row<S>(dp, n, row_of<S>(dscores, n, r));
    if (p_.dropout.drops()) drop(p, end, keep_);
    weights_.finish(i);
    dscores_.finish(i);
  }

  const AttentionProblem& p_;
  int64_t tile_;
  RowTile<S> value_rows_;
  Source<S> values_, keys_;
  RowTile<S> gradient_rows_;
  Source<S> gradients_, queries_;
  ComputedTile<S> weights_, dscores_;
  Results dq_, dk_, dv_;
  Keep keep_;
};

template <class S>
void attention_backward(const AttentionProblem& p, const View4& g, const View4& q, const View4& k, const View4& v,
                        const void* probabilities, const AttentionGradients& to, const Parallel& parallel) {
  // A part is one head, whose sums over the queries are thus made in their order.
  parallel(p.B * p.H, [&](int64_t begin, int64_t end) {
    AttentionBackward<S> backward(p);
    for (int64_t head = begin; head < end; ++head)
      backward.run({head / p.H, head % p.H, 0}, g, q, k, v, probabilities, to);
  });
}

void attention_forward_any(const AttentionProblem& p, const View4& q, const View4& k, const View4& v, void* out,
                           void* probabilities, const Parallel& parallel) {
  with_storage(p.dtype, [&]<class S>(S) { attention_forward<S>(p, q, k, v, out, probabilities, parallel); });
}

void attention_backward_any(const AttentionProblem& p, const View4& g, const View4& q, const View4& k, const View4& v,
                            const void* probabilities, const AttentionGradients& to, const Parallel& parallel) {
  with_storage(p.dtype, [&]<class S>(S) { attention_backward<S>(p, g, q, k, v, probabilities, to, parallel); });
}
