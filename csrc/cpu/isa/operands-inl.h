// Blocks of q, k, v and their like, copied as the products of products-inl.h read them. The copies stay in the cache,
// take any distance between rows, and are padded with zeros, so that the products have no remainders of columns.

// Products of float32 numbers, or of bfloat16 pairs where the instruction set has them.
template <class S>
struct Operands {
  static constexpr bool paired = false;
  static constexpr int kPair = 1;
  using Term = Scaled<F32>;
  using Element = float;
};

#if HFF_HAS_DPBF16
template <>
struct Operands<BF16> {
  static constexpr bool paired = true;
  static constexpr int kPair = 2;
  using Term = PairedSum;
  using Element = uint32_t;
};
#endif

// Steps of a sum of K products.
template <class S>
constexpr int64_t steps(int64_t K) {
  return (K + Operands<S>::kPair - 1) / Operands<S>::kPair;
}

// A matrix [m, K] by rows: the left operand of a product, one element per step.
template <class S>
class RowTile {
 public:
  using Element = typename Operands<S>::Element;

  RowTile(int64_t m, int64_t K) : ld_(spread(steps<S>(K))), data_(m * ld_) {}

  // Copies m rows of K numbers, `stride` apart; `zeros` rows of zeros follow.
  void copy(const typename S::T* from, int64_t stride, int64_t m, int64_t K, int64_t zeros = 0) {
    for (int64_t i = 0; i < m; ++i, from += stride) {
      Element* to = row(i);
      if constexpr (Operands<S>::paired) {
        if (K % 2 != 0) to[K / 2] = 0;
        std::memcpy(to, from, K * sizeof *from);
      } else {
        widen_row<S>(from, K, to);
      }
    }
    std::fill(row(m), row(m + zeros), Element(0));
  }

  // Stores a vector from column j on, which is a multiple of kLanes.
  HFF_INLINE void store(int64_t i, int64_t j, vf v) {
    if constexpr (Operands<S>::paired)
      BF16::store(numbers(i) + j, v);
    else
      F32::store(row(i) + j, v);
  }

  Element* row(int64_t i) { return data_.data() + i * ld_; }
  const Element* row(int64_t i) const { return data_.data() + i * ld_; }
  // Row i as bfloat16, where the elements are pairs of it.
  bf16_t* numbers(int64_t i) { return reinterpret_cast<bf16_t*>(row(i)); }
  int64_t ld() const { return ld_; }
  Coefficients<Element> coefficients() const { return {data_.data(), ld_, 1}; }

 private:
  int64_t ld_;
  std::vector<Element, LineAligned<Element>> data_;
};

// A matrix [K, n]: the right operand of a product, one row per step.
template <class S>
class Source {
 public:
  using Element = typename Operands<S>::Element;

  Source(int64_t K, int64_t n)
      : ld_(spread(n)), data_(steps<S>(K) * ld_), rows_(rows_of<Element>(data_.data(), steps<S>(K), ld_)) {}

  // Copies K rows of n numbers, `stride` apart.
  void copy(const typename S::T* from, int64_t stride, int64_t K, int64_t n) {
    for (int64_t s = 0; s < steps<S>(K); ++s) {
      Element* to = data_.data() + s * ld_;
      if constexpr (Operands<S>::paired) {
        const auto* first = from + 2 * s * stride;
        interleave(first, 2 * s + 1 < K ? first + stride : nullptr, n, to);
      } else {
        widen_row<S>(from + s * stride, n, to);
      }
    }
  }

  // Copies the transpose of a tile [n, K]; n is a multiple of kLanes.
  void copy_transposed(const RowTile<S>& tile, int64_t n, int64_t K) {
    transpose(tile.row(0), tile.ld(), n, steps<S>(K), data_.data(), ld_);
  }

  const Element* const* rows() const { return rows_.data(); }
  Coefficients<Element> transposed() const { return {data_.data(), 1, ld_}; }

 private:
  int64_t ld_;
  std::vector<Element, LineAligned<Element>> data_;
  std::vector<const Element*> rows_;
};
