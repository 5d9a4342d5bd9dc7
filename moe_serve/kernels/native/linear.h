// Linear layers, and how weights are packed for them.

// Pack one tile: 32 rows of a plain weight, [in_features] each; a null row is zeros.
template <class T>
static void pack_tile(const T* const* rows, int64_t in_features, T* tile) {
    constexpr int kDepth = depth_of<T>();
    constexpr int64_t kBlock = 16;  // steps whose part of the tile stays in the first cache
    struct Step {
        T parts[kDepth];
    };
    const int64_t whole = in_features / kDepth;
    Step* packed = (Step*)tile;
    for (int64_t first = 0; first < whole; first += kBlock) {
        const int64_t count = std::min(kBlock, whole - first);
        for (int column = 0; column < kTile; column++) {
            Step* to = packed + first * kTile + column;
            const T* from = rows[column] ? rows[column] + first * kDepth : nullptr;
            for (int64_t step = 0; step < count; step++)
                if (from)
                    memcpy(to + step * kTile, from + step * kDepth, sizeof(Step));
                else
                    to[step * kTile] = Step{};
        }
    }
    if (whole * kDepth == in_features) return;
    for (int column = 0; column < kTile; column++) {
        Step last{};
        if (rows[column]) last.parts[0] = rows[column][in_features - 1];
        packed[whole * kTile + column] = last;
    }
}

template <class T>
static void pack_linear(const T* weight, int64_t out_features, int64_t in_features, T* packed) {
#pragma omp for schedule(dynamic, 1)
    for (int64_t tile = 0; tile < ceil_div(out_features, kTile); tile++) {
        const T* rows[kTile];
        for (int column = 0; column < kTile; column++) {
            int64_t output = tile * kTile + column;
            rows[column] = output < out_features ? weight + output * in_features : nullptr;
        }
        pack_tile(rows, in_features, packed + tile * tile_elements<T>(in_features));
    }
}

// Copy outputs (rows of the plain weight) out of a packed one: [num_ids, in_features].
template <class T>
static void gather_packed(
    const T* packed, int64_t in_features, const int64_t* ids, int64_t num_ids, T* out) {
    constexpr int kDepth = depth_of<T>();
#pragma omp for schedule(static)
    for (int64_t index = 0; index < num_ids; index++) {
        const T* tile = packed + ids[index] / kTile * tile_elements<T>(in_features);
        const T* column = tile + ids[index] % kTile * kDepth;
        for (int64_t at = 0; at < in_features; at++)
            out[index * in_features + at] = column[at / kDepth * kDepth * kTile + at % kDepth];
    }
}

// out = rows @ weight.T, rounded to TOut, then + bias, rounded again.
template <class TRow, class TWeight, class TOut>
static void linear(
    const TRow* rows, int64_t num_rows, int64_t in_features, const TWeight* packed,
    int64_t out_features, const TOut* bias, TOut* out) {
    const int64_t tiles = ceil_div(out_features, kTile);
    const int64_t chunks = ceil_div(num_rows, kChunkRows);
    const int64_t steps = steps_of<TWeight>(in_features);
#pragma omp for schedule(dynamic, 1)
    for (int64_t item = 0; item < chunks * tiles; item++) {
        const int64_t tile = item % tiles;
        const int64_t first = item / tiles * kChunkRows;
        const int64_t last = std::min(first + kChunkRows, num_rows);
        const int64_t column = tile * kTile;
        const int64_t width = std::min<int64_t>(kTile, out_features - column);
        const TWeight* weights = packed + tile * tile_elements<TWeight>(in_features);
        RowsFor<TRow, TWeight> rows_for;
        for (int64_t begin = first; begin < last; begin += kMaxRows) {
            const int64_t count = std::min<int64_t>(kMaxRows, last - begin);
            const TRow* pointers[kMaxRows];
            for (int64_t row = 0; row < count; row++)
                pointers[row] = rows + (begin + row) * in_features;
            Sums sums[kMaxRows];
            multiply_rows<TWeight>(
                count, rows_for(pointers, count, in_features), weights, steps, sums);
            for (int64_t row = 0; row < count; row++) {
                TOut* to = out + (begin + row) * out_features + column;
                Floats low = sums[row].low, high = sums[row].high;
                if (bias) {
                    low = rounded_to<TOut>(low) + load(bias + column, width);
                    if (width > kLanes)
                        high = rounded_to<TOut>(high)
                               + load(bias + column + kLanes, width - kLanes);
                }
                store(to, low, width);
                if (width > kLanes) store(to + kLanes, high, width - kLanes);
            }
        }
    }
}
