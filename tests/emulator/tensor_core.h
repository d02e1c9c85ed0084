// Asynchronous copies, ldmatrix and mma.sync as the PTX manual lays out their fragments (sections 9.7.9.25, 9.7.14.5).
#pragma once

namespace hyperformer_fast {

inline float wide_bf16(uint16_t x) { return from_bf16(x); }
inline uint16_t narrow_bf16(float x) { return to_bf16(x); }
inline uint16_t narrow_f16(float x) { return to_f16(x); }
inline float wide_f16(uint16_t x) {
  _Float16 half;
  std::memcpy(&half, &x, 2);
  return float(half);
}

inline void arrive(const emulator::Copy& copy) {
  copy.there ? std::memcpy(copy.to, copy.from, copy.bytes) : std::memset(copy.to, 0, copy.bytes);
}

template <int BYTES>
void copy_async(void* to, const void* from, bool there) {
  const auto misaligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % BYTES; };
  if (misaligned(to) || (there && misaligned(from))) emulator::fail("a misaligned asynchronous copy");
  emulator::self->copies.push_back({to, from, BYTES, there});
  if (emulator::block->early_copies) arrive(emulator::self->copies.back());
}

inline void copy_commit() {
  emulator::self->groups.push_back(std::move(emulator::self->copies));
  emulator::self->copies.clear();
}

template <int LEFT>
void copy_wait() {
  auto& groups = emulator::self->groups;
  while (int(groups.size()) > LEFT) {
    for (const emulator::Copy& copy : groups.front()) arrive(copy);
    groups.erase(groups.begin());
  }
}

struct Matrices {
  const uint16_t* row;
  uint32_t* registers;
};

template <bool TRANSPOSED>
void load_matrices(uint32_t (&r)[4], const void* row, const emulator::Where& where = emulator::Where::current()) {
  if (reinterpret_cast<uintptr_t>(row) % 16) emulator::fail("a misaligned row for ldmatrix");
  Matrices mine{static_cast<const uint16_t*>(row), r};
  emulator::warp_wide(mine, where, [](Matrices** all) {
    for (int lane = 0; lane < 32; ++lane)
      for (int m = 0; m < 4; ++m) {
        uint32_t pair[2];
        for (int i = 0; i < 2; ++i) {
          const int line = TRANSPOSED ? lane % 4 * 2 + i : lane / 4, column = TRANSPOSED ? lane / 4 : lane % 4 * 2 + i;
          pair[i] = all[m * 8 + line]->row[column];
        }
        all[lane]->registers[m] = pair[0] | pair[1] << 16;
      }
  });
}

inline float toward_zero(double x) {
  const float nearest = float(x);
  return std::isfinite(nearest) && std::fabs(double(nearest)) > std::fabs(x) ? std::nextafterf(nearest, 0.0f) : nearest;
}

// As tensor cores of Volta to Hopper sum (Fasi et al., PeerJ CS 7:e330, section 4): exact products, of which each, and
// the accumulator, is cut off one bit below the last place of the largest, and the sum is rounded toward zero. PTX
// leaves it open.
template <int COUNT>
float tensor_core_sum(const double (&addend)[COUNT]) {
  double largest = 0, plain = 0;
  for (const double x : addend) largest = std::max(largest, std::fabs(x)), plain += x;
  if (!std::isfinite(plain) || largest == 0) return float(plain);
  const double place = std::ldexp(1.0, std::ilogb(largest) - 24), inverse = 1 / place;
  int64_t sum = 0;
  for (const double x : addend) sum += int64_t(x * inverse);
  return toward_zero(double(sum) * place);
}

struct Product {
  float* d;
  const uint32_t* a;
  uint32_t b[2];
};

// D [16, 8] += A [16, K] B [K, 8], K = 8 NUMBERS: the numbers in a 32-bit register, which `number(register, i)` takes
// out.
template <int NUMBERS, class Number>
void product(Product& mine, const emulator::Where& where, Number number) {
  emulator::warp_wide(mine, where, [number](Product** all) {
    constexpr int K = 8 * NUMBERS;
    float A[16][K], B[K][8];
    for (int lane = 0; lane < 32; ++lane)
      for (int half = 0; half < 2; ++half)
        for (int i = 0; i < NUMBERS; ++i) {
          const int k = half * K / 2 + lane % 4 * NUMBERS + i;
          A[lane / 4][k] = number(all[lane]->a[2 * half], i);
          A[lane / 4 + 8][k] = number(all[lane]->a[2 * half + 1], i);
          B[k][lane / 4] = number(all[lane]->b[half], i);
        }
    for (int lane = 0; lane < 32; ++lane)
      for (int e = 0; e < 4; ++e) {
        const int row = lane / 4 + e / 2 * 8, column = lane % 4 * 2 + e % 2;
        double addend[K + 1] = {all[lane]->d[e]};
        for (int k = 0; k < K; ++k) addend[k + 1] = double(A[row][k]) * B[k][column];
        all[lane]->d[e] = tensor_core_sum(addend);
      }
  });
}

inline void mma_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                     const emulator::Where& where = emulator::Where::current()) {
  Product mine{d, a, {b0, b1}};
  product<2>(mine, where, [](uint32_t r, int i) { return wide_bf16(uint16_t(r >> 16 * i)); });
}

inline void mma_f16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                    const emulator::Where& where = emulator::Where::current()) {
  Product mine{d, a, {b0, b1}};
  product<2>(mine, where, [](uint32_t r, int i) { return wide_f16(uint16_t(r >> 16 * i)); });
}

struct Product64 {
  double* d;
  double a, b;
};

inline void mma_f64(double (&d)[2], double a, double b, const emulator::Where& where = emulator::Where::current()) {
  Product64 mine{d, a, b};
  emulator::warp_wide(mine, where, [](Product64** all) {
    for (int lane = 0; lane < 32; ++lane)
      for (int e = 0; e < 2; ++e)
        for (int k = 0; k < 4; ++k)
          all[lane]->d[e] = std::fma(all[lane / 4 * 4 + k]->a, all[(lane % 4 * 2 + e) * 4 + k]->b, all[lane]->d[e]);
  });
}

// Of a float32 the tensor core reads the upper 19 bits.
inline void mma_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                     const emulator::Where& where = emulator::Where::current()) {
  Product mine{d, a, {b0, b1}};
  product<1>(mine, where, [](uint32_t r, int) { return float_of(r & 0xFFFFE000u); });
}

}  // namespace hyperformer_fast
