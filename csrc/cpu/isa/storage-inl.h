// Calls with the storage type of a dtype that is known at run time.

// Calls body(S{}).
template <class Body>
HFF_INLINE void with_storage(Dtype dtype, const Body& body) {
  switch (dtype) {
    case Dtype::kFloat32:
      return body(F32{});
    case Dtype::kBFloat16:
      return body(BF16{});
    case Dtype::kFloat16:
      return body(F16{});
  }
}

// v as it is read back once it was stored.
template <class S>
HFF_INLINE vf rounded(vf v) {
  typename S::T t[kLanes];
  S::store(t, v);
  return S::load(t);
}
template <>
HFF_INLINE vf rounded<F32>(vf v) {
  return v;
}
