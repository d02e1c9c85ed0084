// Loops over the columns of one row, and over the rows of a tensor.

// Access to a whole vector of a row, or to its last numbers that do not fill one. These are zero beyond the row.
struct Whole {
  template <class S>
  HFF_INLINE vf load(const typename S::T* p) const {
    return S::load(p);
  }
  template <class S>
  HFF_INLINE void store(typename S::T* p, vf v) const {
    S::store(p, v);
  }
};

struct Part {
  int n;

  template <class S>
  HFF_INLINE vf load(const typename S::T* p) const {
    return load_part<S>(p, n);
  }
  template <class S>
  HFF_INLINE void store(typename S::T* p, vf v) const {
    store_part<S>(p, v, n);
  }
};

// Calls body(c, access) for the vectors of n columns.
template <class Body>
HFF_INLINE void each_vector(int64_t n, const Body& body) {
  int64_t c = 0;
  for (; c + kLanes <= n; c += kLanes) body(c, Whole{});
  if (c < n) body(c, Part{int(n - c)});
}

// The same, and the sum of what body returns. The error does not grow with n: float32 sums end after eight terms.
template <class Body>
HFF_INLINE double sum_vectors(int64_t n, const Body& body) {
  constexpr int64_t kStep = 4 * kLanes;
  double total = 0;
  int64_t c = 0;
  while (c + kStep <= n) {
    const int64_t end = std::min(n, c + 8 * kStep);
    vf a = {}, b = {}, d = {}, e = {};
    for (; c + kStep <= end; c += kStep) {
      a += body(c, Whole{});
      b += body(c + kLanes, Whole{});
      d += body(c + 2 * kLanes, Whole{});
      e += body(c + 3 * kLanes, Whole{});
    }
    total += sum((a + b) + (d + e));
  }
  vf rest = {};
  for (; c + kLanes <= n; c += kLanes) rest += body(c, Whole{});
  if (c < n) rest += body(c, Part{int(n - c)});
  return total + sum(rest);
}

template <class S>
HFF_INLINE const typename S::T* row_of(const Rows& rows, int64_t i) {
  return static_cast<const typename S::T*>(rows.data) + rows.offset[i];
}

// Row i of an output, which is contiguous and may be null.
template <class S>
HFF_INLINE typename S::T* row_of(void* rows, int64_t n, int64_t i) {
  return rows == nullptr ? nullptr : static_cast<typename S::T*>(rows) + i * n;
}

// The numbers of a vector [n] in float32.
template <class S>
Buffer widened(const void* v, int64_t n) {
  Buffer wide(n);
  each_vector(n, [&](int64_t c, auto at) {
    at.template store<F32>(wide.data() + c, at.template load<S>(static_cast<const typename S::T*>(v) + c));
  });
  return wide;
}

// Rows that one thread takes at a time: some 16 K numbers, so that the start of a thread does not count.
inline int64_t rows_at_a_time(int64_t n) { return std::max<int64_t>(1, (int64_t(1) << 14) / n); }

// Calls body(part, first row, last row) for all parts of `rows` of the N rows.
template <class Body>
void each_part(int64_t N, int64_t rows, const Parallel& parallel, const Body& body) {
  parallel((N + rows - 1) / rows, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) body(part, part * rows, std::min(N, (part + 1) * rows));
  });
}
