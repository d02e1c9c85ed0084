// Where weighted sums start from and where their results go, row by row. The products in products-inl.h take one of
// these types as Io.

// Results go into a float32 matrix. Sums start from zero, or with `add` from what is there.
struct ToFloat {
  float* out;
  int64_t ld;
  bool add;

  struct Row {
    float* out;
    bool add;
    HFF_INLINE vf first(int64_t c) const { return add ? F32::load(out + c) : vf{}; }
    HFF_INLINE void store(int64_t c, vf v) const { F32::store(out + c, v); }
    template <int NV>
    HFF_INLINE void prefetch(int64_t) const {}
    HFF_INLINE vf first_part(int64_t c, int n) const { return add ? load_part<F32>(out + c, n) : vf{}; }
    HFF_INLINE void store_part(int64_t c, vf v, int n) const {
      hyperformer_fast::HFF_NAMESPACE::store_part<F32>(out + c, v, n);
    }
  };
  HFF_INLINE Row row(int64_t i) const { return {out + i * ld, add}; }
};

// Results are subtracted from a float32 matrix, as -(-first + sum).
struct Subtract {
  float* out;
  int64_t ld;

  struct Row {
    float* out;
    HFF_INLINE vf first(int64_t c) const { return -F32::load(out + c); }
    HFF_INLINE void store(int64_t c, vf v) const { F32::store(out + c, -v); }
    template <int NV>
    HFF_INLINE void prefetch(int64_t) const {}
    HFF_INLINE vf first_part(int64_t c, int n) const { return -load_part<F32>(out + c, n); }
    HFF_INLINE void store_part(int64_t c, vf v, int n) const {
      hyperformer_fast::HFF_NAMESPACE::store_part<F32>(out + c, -v, n);
    }
  };
  HFF_INLINE Row row(int64_t i) const { return {out + i * ld}; }
};

// Results go into the rows of a float32 matrix. All sums start from the same vector.
struct From {
  const float* start;
  float* out;
  int64_t ld;

  struct Row {
    const float* start;
    float* out;
    HFF_INLINE vf first(int64_t c) const { return F32::load(start + c); }
    HFF_INLINE void store(int64_t c, vf v) const { F32::store(out + c, v); }
    template <int NV>
    HFF_INLINE void prefetch(int64_t) const {}
    HFF_INLINE vf first_part(int64_t c, int n) const { return load_part<F32>(start + c, n); }
    HFF_INLINE void store_part(int64_t c, vf v, int n) const {
      hyperformer_fast::HFF_NAMESPACE::store_part<F32>(out + c, v, n);
    }
  };
  HFF_INLINE Row row(int64_t i) const { return {start, out + i * ld}; }
};

// Results are rounded to storage. Each sum starts from a row of the input, plus `plus`, plus a multiple of `times`.
template <class S>
struct ToRows {
  const typename S::T* const* from;
  typename S::T* const* to;
  const float* plus;                 // [d], or null
  const float* times;                // [d], or null
  const float* coefficient;          // of `times`, one per row
  const typename S::T* const* next;  // rows that are read after these, to be prefetched, or null

  struct Row {
    const typename S::T *from, *next;
    typename S::T* to;
    const float *plus, *times;
    float coefficient;
    HFF_INLINE vf first(int64_t c) const {
      vf v = S::load(from + c);
      if (plus != nullptr) v += F32::load(plus + c);
      return times == nullptr ? v : v + splat(coefficient) * F32::load(times + c);
    }
    HFF_INLINE void store(int64_t c, vf v) const { S::store(to + c, v); }
    template <int NV>
    HFF_INLINE void prefetch(int64_t c) const {
      if (next == nullptr) return;
      for (size_t at = 0; at < NV * kLanes * sizeof(*next); at += 64)
        __builtin_prefetch(reinterpret_cast<const char*>(next + c) + at, 0, 2);
    }
    HFF_INLINE vf first_part(int64_t c, int n) const {
      vf v = load_part<S>(from + c, n);
      if (plus != nullptr) v += load_part<F32>(plus + c, n);
      return times == nullptr ? v : v + splat(coefficient) * load_part<F32>(times + c, n);
    }
    HFF_INLINE void store_part(int64_t c, vf v, int n) const {
      hyperformer_fast::HFF_NAMESPACE::store_part<S>(to + c, v, n);
    }
  };
  HFF_INLINE Row row(int64_t i) const {
    return {from[i], next[i], to[i], plus, times, times == nullptr ? 0.0f : coefficient[i]};
  }
};
