// Rows times a packed weight. One order of adding for every number of rows: each element of the
// result has one accumulator, which runs over the whole of in_features, a step at a time.
//
// A packed weight of T [out_features, in_features]: tiles of 32 outputs; in a tile, for each step
// of `depth` inputs (2 for bf16, 1 for float), 32 outputs of `depth` inputs each. What is missing at
// the edges is zero.

constexpr int kTile = 2 * kLanes;
// rows of one multiplication with a tile, and rows whose inputs stay in a core's second cache
#ifdef MS_AVX512_BF16
constexpr int kMaxRows = 12;
#else
constexpr int kMaxRows = 2;
#endif
constexpr int64_t kChunkRows = 16 * kMaxRows;

template <class T>
constexpr int depth_of() {
    return sizeof(T) == 2 ? 2 : 1;
}

static inline int64_t ceil_div(int64_t value, int64_t by) {
    return (value + by - 1) / by;
}

template <class T>
static inline int64_t steps_of(int64_t in_features) {
    return ceil_div(in_features, depth_of<T>());
}

template <class T>
static inline int64_t tile_elements(int64_t in_features) {
    return steps_of<T>(in_features) * depth_of<T>() * kTile;
}

// Two vectors of one row's sums.
struct Sums {
    Floats low, high;
};

template <int kRows>
static inline void multiply_tile(
    const float* const* rows, const float* tile, int64_t steps, Sums* out) {
    Sums sums[kRows] = {};
    for (int64_t step = 0; step < steps; step++) {
        Floats low = load(tile + step * kTile), high = load(tile + step * kTile + kLanes);
#pragma GCC unroll 16
        for (int row = 0; row < kRows; row++) {
            Floats value = splat(rows[row][step]);
            sums[row].low = fma(value, low, sums[row].low);
            sums[row].high = fma(value, high, sums[row].high);
        }
    }
#pragma GCC unroll 16
    for (int row = 0; row < kRows; row++) out[row] = sums[row];
}

#ifdef MS_AVX512_BF16

static inline Floats add_products(Floats sum, __m512i a, __m512i b) {
    return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
}

// elements of the tile that are asked of memory ahead of their use
constexpr int64_t kAhead = 4096;

template <int kRows>
static inline void multiply_tile(
    const bf16* const* rows, const bf16* tile, int64_t steps, Sums* out) {
    Floats low[kRows], high[kRows];
    const char* from[kRows];
#pragma GCC unroll 16
    for (int row = 0; row < kRows; row++) {
        low[row] = high[row] = Floats{};
        from[row] = (const char*)rows[row];
    }
    for (int64_t step = 0; step < steps; step++) {
        const bf16* at = tile + step * (2 * kTile);
        __m512i weights_low = _mm512_loadu_si512(at), weights_high = _mm512_loadu_si512(at + kTile);
        _mm_prefetch((const char*)(at + kAhead), _MM_HINT_T0);
        _mm_prefetch((const char*)(at + kAhead + kTile), _MM_HINT_T0);
#pragma GCC unroll 16
        for (int row = 0; row < kRows; row++) {
            int32_t pair;
            memcpy(&pair, from[row] + 4 * step, 4);
            __m512i values = _mm512_set1_epi32(pair);
            low[row] = add_products(low[row], values, weights_low);
            high[row] = add_products(high[row], values, weights_high);
        }
    }
#pragma GCC unroll 16
    for (int row = 0; row < kRows; row++) out[row] = {low[row], high[row]};
}

#else

template <int kRows>
static inline void multiply_tile(
    const bf16* const* rows, const bf16* tile, int64_t steps, Sums* out) {
    Sums sums[kRows] = {};
    for (int64_t step = 0; step < steps; step++) {
        Words low, high;
        memcpy(&low, tile + step * 2 * kTile, sizeof low);
        memcpy(&high, tile + step * 2 * kTile + kTile, sizeof high);
        Floats first_low = (Floats)(low << 16), first_high = (Floats)(high << 16);
        Floats second_low = (Floats)(low & 0xFFFF0000u), second_high = (Floats)(high & 0xFFFF0000u);
#pragma GCC unroll 16
        for (int row = 0; row < kRows; row++) {
            Floats first = splat(to_float(rows[row][2 * step]));
            Floats second = splat(to_float(rows[row][2 * step + 1]));
            sums[row].low = fma(second, second_low, fma(first, first_low, sums[row].low));
            sums[row].high = fma(second, second_high, fma(first, first_high, sums[row].high));
        }
    }
#pragma GCC unroll 16
    for (int row = 0; row < kRows; row++) out[row] = sums[row];
}

#endif

template <class T, int kRows = kMaxRows>
static inline void multiply_rows(
    int64_t num_rows, const T* const* rows, const T* tile, int64_t steps, Sums* out) {
    if (num_rows == kRows) return multiply_tile<kRows>(rows, tile, steps, out);
    if constexpr (kRows > 1) multiply_rows<T, kRows - 1>(num_rows, rows, tile, steps, out);
}
