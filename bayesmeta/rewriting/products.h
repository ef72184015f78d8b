// Products of matrices of float32, one pair or many: C = A B, for sizes known to the compiler.
//
// A tile of C stands in the processor's vector registers, ROWS rows of VECS vectors: for each k it takes a row of B, of which the tile is as
// wide, and the ROWS numbers of A's column k. A may stand in memory in any way. Of B the rows must stand in one piece; where they do not, a
// block of them is first put in order.

#ifndef BAYESMETA_PRODUCTS
#define BAYESMETA_PRODUCTS

namespace bayesmeta {

using Vec = at::vec::Vectorized<float>;
constexpr int64_t LANES = Vec::size();                        // numbers in a vector
constexpr int64_t REGISTERS = LANES == 8 ? 16 : 32;           // AVX2 has 16
constexpr int64_t WIDEST = REGISTERS == 16 ? 2 : 3;           // vectors side by side in a tile
constexpr int64_t BLOCK = 256;                                // how many k at a time, which stay in the first cache
constexpr int64_t CHUNK = 192;                                // rows that one thread takes at a time, about

constexpr int64_t ceil_of(int64_t n, int64_t by) { return (n + by - 1) / by; }

// n in as few shares as can be, none above `most`: how large they are
constexpr int64_t share(int64_t n, int64_t most) { return ceil_of(n, ceil_of(n, most)); }

template <typename One>
void shared_out(int64_t count, int64_t threads, One one) {
  if (threads == 1) {
    for (int64_t i = 0; i < count; ++i) one(i);
  } else {
#pragma omp parallel for num_threads(threads)
    for (int64_t i = 0; i < count; ++i) one(i);
  }
}

struct Matrix {
  const float* at;
  int64_t row, column;  // from a number to the next one below, to the right
};

// One of a sum of products: where its matrices begin, from where those of the sum do.
struct Term {
  int64_t a, b;
};
constexpr Term ONLY{0, 0};

// LAST: numbers in the last of the vectors. `further`: added to what stands in C.
template <int64_t ROWS, int64_t VECS, int64_t LAST>
__attribute__((noinline)) void tile(
    const float* a, int64_t a_row, int64_t a_column, const float* b, int64_t b_row, float* c, int64_t c_row, int64_t inner, bool further,
    const Term* terms, int64_t count) {
  Vec sum[ROWS][VECS];
#pragma GCC unroll 32
  for (int64_t r = 0; r < ROWS; ++r)
#pragma GCC unroll 8
    for (int64_t v = 0; v < VECS; ++v)
      sum[r][v] = further ? Vec::loadu(c + r * c_row + v * LANES, v + 1 < VECS ? LANES : LAST) : Vec(0);
  for (const Term* term = terms; term < terms + count; ++term) {
    const float *left = a + term->a, *right = b + term->b;
    for (int64_t k = 0; k < inner; ++k) {
      Vec row[VECS];
#pragma GCC unroll 8
      for (int64_t v = 0; v < VECS; ++v) row[v] = Vec::loadu(right + k * b_row + v * LANES, v + 1 < VECS ? LANES : LAST);
#pragma GCC unroll 32
      for (int64_t r = 0; r < ROWS; ++r) {
        const Vec number(left[r * a_row + k * a_column]);
#pragma GCC unroll 8
        for (int64_t v = 0; v < VECS; ++v) sum[r][v] = at::vec::fmadd(number, row[v], sum[r][v]);
      }
    }
  }
#pragma GCC unroll 32
  for (int64_t r = 0; r < ROWS; ++r)
#pragma GCC unroll 8
    for (int64_t v = 0; v < VECS; ++v) sum[r][v].store(c + r * c_row + v * LANES, v + 1 < VECS ? LANES : LAST);
}

// The rows of C from `first` to `last`, of the columns of one tile. REST: rows of the last tile of all, 0 where it is like the others.
template <int64_t ROWS, int64_t REST, int64_t VECS, int64_t LAST>
void stripe(
    int64_t first, int64_t last, Matrix a, const float* b, int64_t b_row, float* c, int64_t c_row, int64_t inner, bool further,
    const Term* terms, int64_t count) {
  int64_t r = first;
  for (; r + ROWS <= last; r += ROWS)
    tile<ROWS, VECS, LAST>(a.at + r * a.row, a.row, a.column, b, b_row, c + r * c_row, c_row, inner, further, terms, count);
  if constexpr (REST > 0)
    if (r < last) tile<REST, VECS, LAST>(a.at + r * a.row, a.row, a.column, b, b_row, c + r * c_row, c_row, inner, further, terms, count);
}

// A block of LANES × LANES numbers, transposed: its rows shuffled like cards, one half into the other, until each has become a column.
// Of a smaller one (WHOLE = false) there are `rows` rows of `numbers` numbers.
template <bool WHOLE>
void turn(const float* from, int64_t from_row, float* to, int64_t to_row, int64_t rows = LANES, int64_t numbers = LANES) {
  Vec row[LANES], next[LANES];
#pragma GCC unroll 16
  for (int64_t i = 0; i < LANES; ++i)
    row[i] = WHOLE ? Vec::loadu(from + i * from_row) : i < rows ? Vec::loadu(from + i * from_row, numbers) : Vec(0);
#pragma GCC unroll 4
  for (int64_t times = 1; times < LANES; times *= 2) {
#pragma GCC unroll 8
    for (int64_t i = 0; i < LANES / 2; ++i) std::tie(next[2 * i], next[2 * i + 1]) = at::vec::interleave2(row[i], row[i + LANES / 2]);
#pragma GCC unroll 16
    for (int64_t i = 0; i < LANES; ++i) row[i] = next[i];
  }
#pragma GCC unroll 16
  for (int64_t i = 0; i < LANES; ++i)
    if (WHOLE || i < numbers) row[i].store(to + i * to_row);
}

// `inner` rows of `columns` numbers of B, one after the other; as wide as whole vectors
inline void put_in_order(Matrix b, int64_t inner, int64_t columns, float* to, int64_t to_row) {
  if (b.row == 1) {
    const bool whole = inner >= LANES && columns >= LANES;
    for (int64_t j = 0; j < columns; j += LANES)
      for (int64_t k = 0; k < inner; k += LANES) {
        const int64_t left = whole ? std::min(j, columns - LANES) : j, top = whole ? std::min(k, inner - LANES) : k;  // where it fits in
        const float* from = b.at + left * b.column + top;
        if (whole)
          turn<true>(from, b.column, to + top * to_row + left, to_row);
        else
          turn<false>(from, b.column, to + top * to_row + left, to_row, std::min(LANES, columns - j), std::min(LANES, inner - k));
      }
  } else {
    for (int64_t k = 0; k < inner; ++k)
      for (int64_t j = 0; j < columns; ++j) to[k * to_row + j] = b.at[k * b.row + j * b.column];
  }
}

// How C, M × N, is cut into tiles.
template <int64_t M, int64_t N>
struct Plan {
  static constexpr int64_t ALL = ceil_of(N, LANES), VECS = share(ALL, WIDEST), STRIPES = ceil_of(ALL, VECS), WIDTH = VECS * LANES;
  static constexpr int64_t VECS_LAST = ALL - (STRIPES - 1) * VECS, LAST = N - (ALL - 1) * LANES;
  static constexpr int64_t ROWS = share(M, VECS == 1 ? REGISTERS / 2 - 2 : (REGISTERS - 4) / VECS), REST = M % ROWS;
};

// Of stripe `s` of C the rows from `first`, with which a tile begins, to `last`, with which one ends. `b`, `c`: where the stripe begins.
template <int64_t M, int64_t N>
void stripe_of(
    int64_t s, int64_t first, int64_t last, Matrix a, const float* b, int64_t b_row, float* c, int64_t c_row, int64_t inner, bool further,
    const Term* terms = &ONLY, int64_t count = 1) {
  using P = Plan<M, N>;
  if (s + 1 < P::STRIPES)
    stripe<P::ROWS, P::REST, P::VECS, LANES>(first, last, a, b, b_row, c, c_row, inner, further, terms, count);
  else
    stripe<P::ROWS, P::REST, P::VECS_LAST, P::LAST>(first, last, a, b, b_row, c, c_row, inner, further, terms, count);
}

// The rows of C from `first`, with which a tile begins, to `last`, with which one ends.
template <int64_t M, int64_t N>
void product(int64_t first, int64_t last, Matrix a, Matrix b, float* c, int64_t inner) {
  using P = Plan<M, N>;
  alignas(64) float ordered[BLOCK * P::WIDTH];
  for (int64_t k = 0; k < inner; k += BLOCK) {
    const int64_t block = std::min(BLOCK, inner - k);
    const Matrix columns{a.at + k * a.column, a.row, a.column};
    for (int64_t s = 0; s < P::STRIPES; ++s) {
      Matrix rows{b.at + k * b.row + s * P::WIDTH * b.column, b.row, b.column};
      if (b.column != 1) {
        put_in_order(rows, block, std::min(P::WIDTH, N - s * P::WIDTH), ordered, P::WIDTH);
        rows = {ordered, P::WIDTH, 1};
      }
      stripe_of<M, N>(s, first, last, columns, rows.at, rows.row, c + s * P::WIDTH, N, block, k > 0);
    }
  }
}

// Of `pairs` pairs, each so many numbers after the one before; chunk by chunk of rows, of which each thread has one at least if it can.
template <int64_t M, int64_t N>
void products(int64_t pairs, Matrix a, int64_t a_step, Matrix b, int64_t b_step, float* c, int64_t inner, int64_t threads) {
  constexpr int64_t ROWS = Plan<M, N>::ROWS;
  const int64_t chunk = ceil_of(std::min(CHUNK, ceil_of(M, ceil_of(threads, pairs))), ROWS) * ROWS, chunks = ceil_of(M, chunk);
  const auto one = [=](int64_t i) {
    const int64_t pair = i / chunks, first = i % chunks * chunk;
    product<M, N>(
        first, std::min(M, first + chunk), {a.at + pair * a_step, a.row, a.column}, {b.at + pair * b_step, b.row, b.column}, c + pair * M * N,
        inner);
  };
  shared_out(pairs * chunks, threads, one);
}

// Where the numbers of each sum stand side by side in both matrices and the sums are long: vectors of partial sums, nothing put in order.
// `b`: the columns of B, from one to the next `b_column`.
template <int64_t ROWS, int64_t COLUMNS>
__attribute__((noinline)) void long_sums(
    const float* a, int64_t a_row, const float* b, int64_t b_column, float* c, int64_t c_row, int64_t inner) {
  Vec sum[ROWS][COLUMNS];
#pragma GCC unroll 8
  for (int64_t i = 0; i < ROWS; ++i)
#pragma GCC unroll 8
    for (int64_t j = 0; j < COLUMNS; ++j) sum[i][j] = Vec(0);
  const auto add = [&](int64_t k, int64_t numbers) __attribute__((always_inline)) {
    Vec column[COLUMNS];
#pragma GCC unroll 8
    for (int64_t j = 0; j < COLUMNS; ++j) column[j] = Vec::loadu(b + j * b_column + k, numbers);
#pragma GCC unroll 8
    for (int64_t i = 0; i < ROWS; ++i) {
      const Vec row = Vec::loadu(a + i * a_row + k, numbers);
#pragma GCC unroll 8
      for (int64_t j = 0; j < COLUMNS; ++j) sum[i][j] = at::vec::fmadd(row, column[j], sum[i][j]);
    }
  };
  int64_t k = 0;
  for (; k + LANES <= inner; k += LANES) add(k, LANES);
  if (k < inner) add(k, inner - k);
  for (int64_t i = 0; i < ROWS; ++i)
    for (int64_t j = 0; j < COLUMNS; ++j)
      c[i * c_row + j] = at::vec::vec_reduce_all<float>([](Vec& x, Vec& y) { return x + y; }, sum[i][j]);
}

template <int64_t ROWS, int64_t N>
void long_sums_of_rows(Matrix a, Matrix b, float* c, int64_t inner) {
  constexpr int64_t COLUMNS = share(N, REGISTERS == 16 ? 3 : 5), REST = N % COLUMNS;
  for (int64_t j = 0; j + COLUMNS <= N; j += COLUMNS)
    long_sums<ROWS, COLUMNS>(a.at, a.row, b.at + j * b.column, b.column, c + j, N, inner);
  if constexpr (REST > 0) long_sums<ROWS, REST>(a.at, a.row, b.at + (N - REST) * b.column, b.column, c + N - REST, N, inner);
}

template <int64_t M, int64_t N>
void products_of_long_sums(int64_t pairs, Matrix a, int64_t a_step, Matrix b, int64_t b_step, float* c, int64_t inner, int64_t threads) {
  constexpr int64_t ROWS = share(M, REGISTERS == 16 ? 3 : 5), REST = M % ROWS;
  const auto one = [=](int64_t pair) {
    const Matrix left{a.at + pair * a_step, a.row, a.column}, right{b.at + pair * b_step, b.row, b.column};
    float* to = c + pair * M * N;
    int64_t i = 0;
    for (; i + ROWS <= M; i += ROWS) long_sums_of_rows<ROWS, N>({left.at + i * a.row, a.row, 1}, right, to + i * N, inner);
    if constexpr (REST > 0) long_sums_of_rows<REST, N>({left.at + i * a.row, a.row, 1}, right, to + i * N, inner);
  };
  shared_out(pairs, threads, one);
}

}  // namespace bayesmeta

#endif
