// The one rule by which a float32 becomes a bfloat16. There is no include guard: rounding.h includes this file for
// single numbers, and each instruction set of csrc/cpu/isa includes it again for vectors, inside its target region.

// Replaces the bits of each float32 by those of the nearest bfloat16, ties to even, in their low half. `is_nan` is all
// ones where the number is NaN: rounding up a NaN whose payload is all ones would carry into the sign and give zero.
// The arguments are references because vectors passed by value would follow another ABI for each instruction set.
template <class U>
inline __attribute__((always_inline)) void round_to_bf16(U& bits, const U& is_nan) {
  const U rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  bits = (is_nan & 0x7fc0) | (~is_nan & rounded);
}
