// Two-dimensional convolutions of float32 and their gradients, of images and weights whose channels stand last.
//
// For one place, a sum of products of matrices: one row for each image, the numbers at the places that a weight reaches times that weight. What
// lies outside of an image is left out. So nothing is copied but weights, into the order in which they are read.

#ifndef BAYESMETA_CONVOLUTIONS
#define BAYESMETA_CONVOLUTIONS

namespace bayesmeta {

constexpr int64_t SECOND_CACHE = 1 << 17;  // numbers that are gone over several times
constexpr int64_t SAME_PLACE = 512;        // numbers so far apart come to few places of the first cache

// Images (N, height, width, C) → (N, rows, columns, O); weights (O, kernel_rows, kernel_columns, C).
struct Grid {
  int64_t height, width, rows, columns, kernel_rows, kernel_columns, stride_rows, stride_columns, above, left;
  constexpr int64_t taps() const { return kernel_rows * kernel_columns; }
  // where in an image weight `tap` stands for the result at `row`, `column`
  int64_t row(int64_t row, int64_t tap) const { return row * stride_rows + tap / kernel_columns - above; }
  int64_t column(int64_t column, int64_t tap) const { return column * stride_columns + tap % kernel_columns - left; }
};

struct Numbers {
  explicit Numbers(int64_t n) : at(static_cast<float*>(std::aligned_alloc(64, ceil_of(n, 16) * 64)), &std::free) {}
  std::unique_ptr<float, decltype(&std::free)> at;
};

// C = Σ A B over `terms`, M × N, or added to what stands there
template <int64_t M, int64_t N>
void sum_of_products(
    Matrix a, const float* b, int64_t b_row, float* c, int64_t c_row, const Term* terms, int64_t count, int64_t inner, bool further = false) {
  using P = Plan<M, N>;
  for (int64_t s = 0; s < P::STRIPES; ++s)
    stripe_of<M, N>(s, 0, M, a, b + s * P::WIDTH, b_row, c + s * P::WIDTH, c_row, inner, further, terms, count);
}

// Images of `size` numbers; where rows of a tile would push each other out of the first cache, a copy, further apart.
struct Images {
  Images(const float* from, int64_t count, int64_t size) : at(from), step(size), copy(0) {
    if (size % SAME_PLACE == 0) {
      step += 4 * LANES;
      copy = Numbers(count * step);
      for (int64_t n = 0; n < count; ++n) std::copy_n(from + n * size, size, copy.at.get() + n * step);
      at = copy.at.get();
    }
  }
  const float* at;
  int64_t step;
  Numbers copy;
};

template <int64_t N, int64_t C, int64_t O>
void convolution(const Grid& g, const float* x, const float* w, float* y, int64_t threads) {
  constexpr int64_t WIDE = ceil_of(O, LANES) * LANES;
  const Images images(x, N, g.height * g.width * C);
  const Numbers weights(g.taps() * C * WIDE);
  for (int64_t tap = 0; tap < g.taps(); ++tap) put_in_order({w + tap * C, 1, g.taps() * C}, C, O, weights.at.get() + tap * C * WIDE, WIDE);
  shared_out(g.rows * g.columns, threads, [&](int64_t place) {
    std::vector<Term> terms(g.taps());
    int64_t count = 0;
    for (int64_t tap = 0; tap < g.taps(); ++tap) {
      const int64_t row = g.row(place / g.columns, tap), column = g.column(place % g.columns, tap);
      if (row >= 0 && row < g.height && column >= 0 && column < g.width) terms[count++] = {(row * g.width + column) * C, tap * C * WIDE};
    }
    sum_of_products<N, O>({images.at, images.step, 1}, weights.at.get(), WIDE, y + place * O, g.rows * g.columns * O, terms.data(), count, C);
  });
}

// The gradient in x along y.
template <int64_t N, int64_t C, int64_t O>
void convolution_images(const Grid& g, const float* y, const float* w, float* x, int64_t threads) {
  const Images slopes(y, N, g.rows * g.columns * O);
  const Numbers weights(g.taps() * O * C);
  for (int64_t tap = 0; tap < g.taps(); ++tap)
    for (int64_t o = 0; o < O; ++o) std::copy_n(w + (o * g.taps() + tap) * C, C, weights.at.get() + (tap * O + o) * C);
  shared_out(g.height * g.width, threads, [&](int64_t place) {
    std::vector<Term> terms(g.taps());
    int64_t count = 0;
    for (int64_t tap = 0; tap < g.taps(); ++tap) {
      const int64_t down = place / g.width - g.row(0, tap), right = place % g.width - g.column(0, tap);
      const int64_t row = down / g.stride_rows, column = right / g.stride_columns;
      if (down >= 0 && right >= 0 && down % g.stride_rows == 0 && right % g.stride_columns == 0 && row < g.rows && column < g.columns)
        terms[count++] = {(row * g.columns + column) * O, tap * O * C};
    }
    sum_of_products<N, C>({slopes.at, slopes.step, 1}, weights.at.get(), C, x + place * C, g.height * g.width * C, terms.data(), count, O);
  });
}

// The gradient in w along y; some images at a time, which stay in the second cache.
template <int64_t N, int64_t C, int64_t O>
void convolution_weights(const Grid& g, const float* x, const float* y, float* w, int64_t threads) {
  const int64_t block = std::clamp<int64_t>(SECOND_CACHE / (g.height * g.width * C + g.rows * g.columns * O), 1, N);
  for (int64_t first = 0; first < N; first += block)
    shared_out(g.taps(), threads, [&](int64_t tap) {
      std::vector<Term> terms;
      int64_t begin = 0, end = g.columns;
      while (begin < end && g.column(begin, tap) < 0) ++begin;
      while (begin < end && g.column(end - 1, tap) >= g.width) --end;
      for (int64_t n = first; n < std::min(N, first + block); ++n)
        for (int64_t r = 0; r < g.rows; ++r)
          if (const int64_t row = g.row(r, tap); row >= 0 && row < g.height)
            terms.push_back({((n * g.rows + r) * g.columns + begin) * O, ((n * g.height + row) * g.width + g.column(begin, tap)) * C});
      sum_of_products<O, C>(
          {y, 1, O}, x, g.stride_columns * C, w + tap * C, g.taps() * C, terms.data(), terms.size(), end - begin, first > 0);
    });
}

}  // namespace bayesmeta

#endif
