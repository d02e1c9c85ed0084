// The four activations and their derivatives on vectors.

// e^x for x <= 0, to 1 ulp: x = n ln 2 + r, a degree-7 polynomial in r, 2^n by its exponent. Below -87.3, where e^x
// leaves float32's normal range, the result is exactly 0; NaN stays NaN.
HFF_INLINE vf exp_negative(vf x) {
  const vi underflows = x < splat(-87.3f);
  const vf clamped = select(underflows, splat(-87.3f), x);
  const vf shifted =
      clamped * splat(1.44269504f) + splat(12582912.0f);  // 1.5 * 2^23: rounds to an integer in the low bits
  const vf n = shifted - splat(12582912.0f);
  vf r = clamped - n * splat(0.693145752f);
  r = r - n * splat(1.42860677e-6f);
  vf p = splat(1.98412698e-4f);
  p = p * r + splat(1.38888889e-3f);
  p = p * r + splat(8.33333377e-3f);
  p = p * r + splat(4.16666679e-2f);
  p = p * r + splat(1.66666672e-1f);
  p = p * r + splat(0.5f);
  p = p * r + splat(1.0f);
  p = p * r + splat(1.0f);
  const vi power = (__builtin_convertvector(n, vi) + 127) << 23;
  const vf y = select(underflows, splat(0.0f), p * reinterpret_cast<vf>(power));
  return select(x == x, y, x);
}

HFF_INLINE vf absolute(vf x) { return reinterpret_cast<vf>(reinterpret_cast<vi>(x) & 0x7fffffff); }

// The normal distribution function, Phi(z) = (1 + erf(z / sqrt 2)) / 2, with an error below 1e-7. In the lower tail it
// is the exponential of a float32 polynomial, whose relative error grows with z^2: 4e-5 at z = -4.
HFF_INLINE vf phi(vf z) {
  const vf a = z * splat(0.707106781f);
  const vf t = absolute(a), s = a * a;
  // erf(a) for |a| < 0.93: a + a q(a^2)
  vf q = splat(-5.96761703e-4f);
  q = q * s + splat(4.99119423e-3f);
  q = q * s + splat(-2.67681349e-2f);
  q = q * s + splat(1.12819925e-1f);
  q = q * s + splat(-3.76125336e-1f);
  q = q * s + splat(1.28379166e-1f);
  const vf near = q * a + a;
  // Beyond, 1 - erf(t) = e^(-poly(t)).
  vf p = splat(-1.72853470e-5f) * t + splat(3.83197126e-4f);
  const vf u = splat(-3.88396438e-3f) * t + splat(2.42546219e-2f);
  p = p * s + u;
  p = p * t + splat(-1.06777877e-1f);
  p = p * t + splat(-6.34846687e-1f);
  p = p * t + splat(-1.28717512e-1f);
  p = p * t - t;
  const vf tail = exp_negative(p);  // erfc(t)
  const vf far = select(a < splat(0.0f), splat(0.5f) * tail, splat(1.0f) - splat(0.5f) * tail);
  return select(t > splat(0.927734375f), far, splat(0.5f) + splat(0.5f) * near);
}

struct Activated {
  vf value, derivative;
};

// act(z), and with D act'(z).
template <Activation code, bool D>
HFF_INLINE Activated activate(vf z) {
  // Written so that NaN passes through relu, and has the derivative 1 that torch gives it.
  if constexpr (code == kRelu)
    return {select(z <= splat(0.0f), splat(0.0f), z), select(z <= splat(0.0f), splat(0.0f), splat(1.0f))};
  if constexpr (code == kGelu) {
    const vf p = phi(z);
    return {z * p, D ? p + z * splat(0.398942280f) * exp_negative(splat(-0.5f) * z * z) : vf{}};
  }
  // gelu_new is z sigmoid(u) with u = c (z + cubic z^3), and silu is z sigmoid(z). With e = exp(-|u|) the sigmoid is
  // 1 / (1 + e) or e / (1 + e), and its derivative is e / (1 + e)^2, so nothing cancels on either side.
  constexpr float c = 1.59576912f, cubic = 0.044715f;
  // Where z^2 > kLargestSquare, e is exactly 0. Limiting z^2 there keeps du/dz finite, so that their product is 0, not
  // NaN.
  constexpr float kLargestSquare = 200.0f;
  const vf square = z * z, z2 = select(square > splat(kLargestSquare), splat(kLargestSquare), square);
  const vf u = code == kGeluNew ? splat(c) * z * (splat(1.0f) + splat(cubic) * z2) : z;
  const vf e = exp_negative(-absolute(u)), q = splat(1.0f) / (splat(1.0f) + e);
  const vf sigmoid = select(u < splat(0.0f), e, splat(1.0f)) * q;
  const vf slope = code == kGeluNew ? splat(c) * (splat(1.0f) + splat(3 * cubic) * z2) : splat(1.0f);
  return {z * sigmoid, D ? sigmoid + z * (e * q * q) * slope : vf{}};
}

// Calls body with the activation as a constant.
template <class Body>
HFF_INLINE void with_activation(Activation code, const Body& body) {
  switch (code) {
    case kGeluNew:
      return body(std::integral_constant<Activation, kGeluNew>{});
    case kGelu:
      return body(std::integral_constant<Activation, kGelu>{});
    case kRelu:
      return body(std::integral_constant<Activation, kRelu>{});
    case kSilu:
      return body(std::integral_constant<Activation, kSilu>{});
  }
}
