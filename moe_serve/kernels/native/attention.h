// Attention over paged keys and values: prompt chunks and decodes alike.
//
// The order of adding is fixed by absolute positions: 64 keys are a piece, 16 pieces a span. A
// query takes the pieces of a span in order, with a running maximum, then merges its spans in
// order, then its head's sink. So the spans of a tile can be the work of several threads, and what
// a query does not see (a key, a piece, a span, another query of its tile) never takes part in its
// arithmetic: it may be NaN.

constexpr int64_t kPieceKeys = 64;
constexpr int64_t kSpanKeys = 16 * kPieceKeys;
// stands for the maximum of no keys: exp(it - a maximum) is 0, and not NaN
constexpr float kUnseen = -1e30f;
// tiles of at most so many rows always hand out their spans; others where there is little work
constexpr int64_t kFewRows = 16;
constexpr int64_t kFewItems = 64;
// floats that the parts of split tiles of many rows may take together
constexpr int64_t kSplitFloats = 1 << 24;
// vectors of values that are taken together with all rows of a block, or with half of them
#ifdef MS_AVX512_BF16
constexpr int kVectors = 2;
constexpr int kVectorsOfFew = 4;
#else
constexpr int kVectors = 1;
constexpr int kVectorsOfFew = 1;
#endif
constexpr int kHalfRows = kMaxRows / 2;
constexpr int kTilesOfPiece = kPieceKeys / kTile;

// begin .. end of something.
struct Extent {
    int64_t begin, end;
};

// Keys that the query at `position` sees.
static inline Extent keys_of(const AttentionPlan& plan, int64_t position) {
    const int64_t begin = plan.window > 0 ? position + 1 - plan.window : 0;
    return {std::max<int64_t>(begin, 0), position + 1};
}

// Spans that the queries at positions first .. last see.
static inline Extent spans_of(const AttentionPlan& plan, int64_t first, int64_t last) {
    return {keys_of(plan, first).begin / kSpanKeys, last / kSpanKeys + 1};
}

static inline Extent spans_of(const AttentionPlan& plan, const AttentionTile& tile) {
    return spans_of(plan, tile.first_position, tile.first_position + tile.count - 1);
}

// Heads and how they are laid out.
struct AttentionShape {
    int64_t num_heads, num_kv_heads, head_dim;
    int64_t group;   // query heads of one KV head
    int64_t padded;  // head_dim in whole vectors

    AttentionShape(int64_t heads, int64_t kv_heads, int64_t dim)
        : num_heads(heads), num_kv_heads(kv_heads), head_dim(dim), group(heads / kv_heads),
          padded(ceil_div(dim, kLanes) * kLanes) {}

    // A row's record: the weighted sum of values [padded]; then, while its span runs, the sum of
    // weights by lane, and afterwards the maximum and the sum of weights.
    int64_t record() const { return padded + kLanes; }
};

// Whether the spans of a tile are items of their own.
static inline bool is_split(
    const AttentionPlan& plan, const AttentionTile& tile, const AttentionShape& shape) {
    const Extent spans = spans_of(plan, tile);
    if (spans.end - spans.begin == 1) return false;
    if (tile.count * shape.group <= kFewRows) return true;
    // a few tiles of many rows: only while their parts take little memory
    const int64_t floats =
        plan.num_tiles * (spans.end - spans.begin) * tile.count * shape.num_heads * shape.record();
    return plan.num_tiles * shape.num_kv_heads < kFewItems && floats <= kSplitFloats;
}

static inline int64_t tile_workspace(
    const AttentionPlan& plan, const AttentionTile& tile, const AttentionShape& shape) {
    if (!is_split(plan, tile, shape)) return 0;
    const Extent spans = spans_of(plan, tile);
    return (spans.end - spans.begin) * tile.count * shape.num_heads * shape.record();
}

// Floats of the workspace that `paged_attention` needs.
static inline int64_t attention_workspace(
    const AttentionPlan& plan, int64_t num_heads, int64_t num_kv_heads, int64_t head_dim) {
    const AttentionShape shape(num_heads, num_kv_heads, head_dim);
    int64_t floats = 0;
    for (int64_t tile = 0; tile < plan.num_tiles; tile++)
        floats += tile_workspace(plan, plan.tiles[tile], shape);
    return floats;
}

// e^x of x <= 0 (or NaN), as `exp` but for the last bit; 0 below -87.3.
static inline Floats exp_below_zero(Floats x) {
    const Floats magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    Floats clamped = larger(splat(-87.4f), x);
    Floats shifted = fma(clamped, splat(1.44269504f), magic);
    Floats whole = shifted - magic;
    Floats rest = fma(whole, splat(-0.693359375f), clamped);
    rest = fma(whole, splat(2.12194440e-4f), rest);
    Floats series = splat(1.9875691500e-4f);
    series = fma(series, rest, splat(1.3981999507e-3f));
    series = fma(series, rest, splat(8.3334519073e-3f));
    series = fma(series, rest, splat(4.1665795894e-2f));
    series = fma(series, rest, splat(1.6666665459e-1f));
    series = fma(series, rest, splat(5.0000001201e-1f));
    series = fma(series, rest * rest, rest) + 1.0f;
    // the low bits of magic are zero, so those of `shifted` are the power of two
    Floats result = series * (Floats)(((Ints)shifted << 23) + (127 << 23));
    return x < splat(-87.3f) ? splat(0.0f) : result;
}

static inline float exp_below_zero(float x) {
    return exp_below_zero(splat(x))[0];
}

// Largest lane; any lane where one is NaN.
static inline float highest_of(Floats value) {
#ifdef MS_AVX512_BF16
    return _mm512_reduce_max_ps((__m512)value);
#else
    return largest_of(value);
#endif
}

// ---- one piece --------------------------------------------------------------------------------

#ifdef MS_AVX512_BF16

static inline void transpose(__m512i* rows) {
    __m512i pairs[16], fours[16];
#pragma GCC unroll 16
    for (int at = 0; at < 16; at += 2) {
        pairs[at] = _mm512_unpacklo_epi32(rows[at], rows[at + 1]);
        pairs[at + 1] = _mm512_unpackhi_epi32(rows[at], rows[at + 1]);
    }
#pragma GCC unroll 16
    for (int at = 0; at < 16; at += 4) {
        fours[at] = _mm512_unpacklo_epi64(pairs[at], pairs[at + 2]);
        fours[at + 1] = _mm512_unpackhi_epi64(pairs[at], pairs[at + 2]);
        fours[at + 2] = _mm512_unpacklo_epi64(pairs[at + 1], pairs[at + 3]);
        fours[at + 3] = _mm512_unpackhi_epi64(pairs[at + 1], pairs[at + 3]);
    }
#pragma GCC unroll 16
    for (int at = 0; at < 4; at++) {
        __m512i low = _mm512_shuffle_i32x4(fours[at], fours[at + 4], 0x44);
        __m512i high = _mm512_shuffle_i32x4(fours[at], fours[at + 4], 0xEE);
        __m512i next_low = _mm512_shuffle_i32x4(fours[at + 8], fours[at + 12], 0x44);
        __m512i next_high = _mm512_shuffle_i32x4(fours[at + 8], fours[at + 12], 0xEE);
        rows[at] = _mm512_shuffle_i32x4(low, next_low, 0x88);
        rows[at + 4] = _mm512_shuffle_i32x4(low, next_low, 0xDD);
        rows[at + 8] = _mm512_shuffle_i32x4(high, next_high, 0x88);
        rows[at + 12] = _mm512_shuffle_i32x4(high, next_high, 0xDD);
    }
}

// 16 columns of a tile: words first_word .. + 16 of 16 keys.
static inline void pack_words(
    const uint32_t* const* keys, int64_t first_word, int64_t num_words, uint32_t* tile) {
    const __mmask16 lanes = first_lanes(num_words);
    __m512i rows[kLanes];
#pragma GCC unroll 16
    for (int key = 0; key < kLanes; key++)
        rows[key] = _mm512_maskz_loadu_epi32(lanes, keys[key] + first_word);
    transpose(rows);
    if (num_words >= kLanes) {
#pragma GCC unroll 16
        for (int word = 0; word < kLanes; word++)
            _mm512_storeu_si512(tile + (first_word + word) * kTile, rows[word]);
    } else {
        for (int word = 0; word < num_words; word++)
            _mm512_storeu_si512(tile + (first_word + word) * kTile, rows[word]);
    }
}

#else

static inline void pack_words(
    const uint32_t* const* keys, int64_t first_word, int64_t num_words, uint32_t* tile) {
    const int64_t count = std::min<int64_t>(num_words, kLanes);
    for (int key = 0; key < kLanes; key++)
        for (int64_t word = first_word; word < first_word + count; word++)
            memcpy(tile + word * kTile + key, keys[key] + word, sizeof *tile);
}

#endif

// Asks memory for a piece's values, some at a time while its keys are worked on. (All at once, they
// would keep the core waiting; its keys are asked for while the piece before is summed.)
template <class T>
class Ahead {
  public:
    // places: of 64 values, in elements from `values`
    Ahead(const T* values, const int64_t* places, int64_t head_dim)
        : values_(values), place_(places), end_(places + kPieceKeys), head_dim_(head_dim) {}

    void fetch(int count) {
        for (; count > 0 && place_ < end_; count--, place_++)
            for (int64_t at = 0; at < head_dim_; at += 64 / int64_t(sizeof(T)))
                __builtin_prefetch(values_ + *place_ + at);
    }

  private:
    const T* values_;
    const int64_t *place_, *end_;
    int64_t head_dim_;
};

// Pack a piece's keys as a weight of 64 outputs. A word is what one step takes of a key.
template <class T>
static inline void pack_keys(
    const T* keys, const int64_t* places, int64_t head_dim, T* packed, Ahead<T>& ahead) {
    const int64_t words = steps_of<T>(head_dim);
    for (int64_t first = 0; first < kPieceKeys; first += kLanes) {
        const uint32_t* from[kLanes];
        for (int key = 0; key < kLanes; key++)
            from[key] = (const uint32_t*)(keys + places[first + key]);
        uint32_t* tile = (uint32_t*)(packed + first / kTile * tile_elements<T>(head_dim));
        for (int64_t word = 0; word < words; word += kLanes) {
            pack_words(from, word, words - word, tile + first % kTile);
            if (word == 0) ahead.fetch(12);
        }
    }
}

// parts[row] = (goes_on ? parts[row] : 0) + sum of weights[row][key] * values[key] over the keys.
// places: of the piece's 64 keys and, where the values are the cache itself, of the next one's.
template <int kRows, int kCount, class TValue>
static inline void add_values(
    const float* weights, const TValue* values, const TValue* next_keys, const int64_t* places,
    int64_t column, Extent keys, bool goes_on, float* parts, int64_t stride) {
    Floats sums[kRows][kCount] = {};
    parts += column;
    if (goes_on) {
#pragma GCC unroll 16
        for (int row = 0; row < kRows; row++)
#pragma GCC unroll 4
            for (int vector = 0; vector < kCount; vector++)
                sums[row][vector] = load(parts + row * stride + vector * kLanes);
    }
    for (int64_t key = keys.begin; key < keys.end; key++) {
        const TValue* from = values + places[key] + column;
        Floats value[kCount];
#pragma GCC unroll 4
        for (int vector = 0; vector < kCount; vector++)
            value[vector] = load(from + vector * kLanes);
        if (std::is_same<TValue, bf16>::value)  // the cache itself, so next_keys is one too
            for (int vector = 0; vector < kCount; vector += 2)
                __builtin_prefetch(next_keys + places[key + kPieceKeys] + column + vector * kLanes);
#pragma GCC unroll 16
        for (int row = 0; row < kRows; row++) {
            Floats weight = splat(weights[row * kPieceKeys + key]);
#pragma GCC unroll 4
            for (int vector = 0; vector < kCount; vector++)
                sums[row][vector] = fma(weight, value[vector], sums[row][vector]);
        }
    }
#pragma GCC unroll 16
    for (int row = 0; row < kRows; row++)
#pragma GCC unroll 4
        for (int vector = 0; vector < kCount; vector++)
            store(parts + row * stride + vector * kLanes, sums[row][vector]);
}

template <class TValue, int kRows = kMaxRows>
static inline void add_values(
    int64_t num_rows, const float* weights, const TValue* values, const TValue* next_keys,
    const int64_t* places, Extent keys, bool goes_on, float* parts, int64_t padded) {
    if (num_rows < kRows) {
        if constexpr (kRows > 1)
            add_values<TValue, kRows - 1>(
                num_rows, weights, values, next_keys, places, keys, goes_on, parts, padded);
        return;
    }
    constexpr int kCount = kRows <= kHalfRows ? kVectorsOfFew : kVectors;
    int64_t at = 0;
    for (; at + kCount * kLanes <= padded; at += kCount * kLanes)
        add_values<kRows, kCount>(
            weights, values, next_keys, places, at, keys, goes_on, parts, padded);
    for (; at < padded; at += kLanes)
        add_values<kRows, 1>(
            weights, values, next_keys, places, at, keys, goes_on, parts, padded);
}

// ---- one item: all heads of a KV head, a tile of queries, one span or all ----------------------

// Memory of one item.
template <class T>
struct AttentionScratch {
    const T** queries;   // [rows]
    int64_t* positions;  // [rows]
    float* highest;      // [rows], the running maxima
    float* records;      // [rows]
    float* totals;       // [rows], records: the spans before
    T* keys;             // a packed piece
    float* values;       // [64, padded]
    float* parts;        // [kMaxRows, padded]
    float* weights;      // [kMaxRows, 64]
    int64_t* places;     // [kSpanKeys + 64], where in the caches the keys of a span are
    int64_t* in_order;   // [64], where in `values` a piece's are

    AttentionScratch(const AttentionShape& shape, int64_t rows) {
        static thread_local Scratch scratch;
        char* memory = nullptr;
        int64_t size = 0;
        auto cut = [&](auto*& part, int64_t count) {
            part = memory ? (std::remove_reference_t<decltype(part)>)(memory + size) : nullptr;
            size += ceil_div(count * int64_t(sizeof *part), 64) * 64;
        };
        for (bool is_counting : {true, false}) {
            cut(queries, rows);
            cut(positions, rows);
            cut(highest, rows + kLanes);
            cut(records, rows * shape.record());
            cut(totals, rows * shape.record());
            cut(keys, kTilesOfPiece * tile_elements<T>(shape.head_dim));
            cut(values, kPieceKeys * shape.padded);
            cut(parts, kMaxRows * shape.padded);
            cut(weights, kMaxRows * kPieceKeys);
            cut(places, kSpanKeys + kPieceKeys);
            cut(in_order, kPieceKeys);
            if (!is_counting) break;
            memory = scratch.get<char>(size);
            size = 0;
        }
        for (int64_t key = 0; key < kPieceKeys; key++) in_order[key] = key * shape.padded;
    }
};

// What stays the same over all items.
template <class T>
struct Attention {
    const AttentionPlan& plan;
    AttentionShape shape;
    const T* query;
    int64_t query_stride;
    const T* key_cache;
    const T* value_cache;
    int64_t num_slots;
    float scale;
    const float* sinks;
    T* out;

    // Rows are the tile's queries, and in each the heads of the KV head.
    void find_rows(
        const AttentionTile& tile, int64_t kv_head, const AttentionScratch<T>& scratch) const {
        for (int64_t query_index = 0; query_index < tile.count; query_index++) {
            const T* token = query + (tile.first_row + query_index) * query_stride;
            for (int64_t head = 0; head < shape.group; head++) {
                const int64_t row = query_index * shape.group + head;
                scratch.queries[row] = token + (kv_head * shape.group + head) * shape.head_dim;
                scratch.positions[row] = tile.first_position + query_index;
            }
        }
    }

    // Find the places of `keys`, all in one span. Keys of their pieces and of one more that are not
    // among them get the place of one that is: what is read there is not used.
    void find_keys(
        const AttentionTile& tile, int64_t kv_head, Extent keys, int64_t* places) const {
        const int32_t* blocks = plan.block_table + tile.sequence * plan.table_stride;
        const int64_t size = plan.block_size, dim = shape.head_dim, slots = num_slots * kv_head;
        const int64_t begin = keys.begin % kSpanKeys, end = begin + keys.end - keys.begin;
        int64_t block = keys.begin / size, place = keys.begin % size;
        for (int64_t key = begin; key < end; block++, place = 0) {
            const int64_t last = std::min(end, key + size - place);
            int64_t at = (slots + blocks[block] * size + place) * dim;
            for (; key < last; key++, at += dim) places[key] = at;
        }
        for (int64_t key = begin / kPieceKeys * kPieceKeys; key < begin; key++)
            places[key] = places[begin];
        for (int64_t key = end; key < ceil_div(end, kPieceKeys) * kPieceKeys + kPieceKeys; key++)
            places[key] = places[end - 1];
    }

    // Leave in scratch.weights the weights of rows first .. + count for the piece at `begin`, and
    // bring the rows' maxima and sums of weights up to date. factors: what to multiply what they
    // had with.
    void weigh(
        int64_t first, int64_t count, int64_t begin, const AttentionScratch<T>& scratch,
        float* records, float* factors, Ahead<T>& ahead) const {
        const Extent first_keys = keys_of(plan, scratch.positions[first]);
        const Extent last_keys = keys_of(plan, scratch.positions[first + count - 1]);
        const bool is_whole = last_keys.begin <= begin && first_keys.end >= begin + kPieceKeys;
        const int64_t steps = steps_of<T>(shape.head_dim);
        Sums sums[kTilesOfPiece][kMaxRows];
        bool is_seen[kTilesOfPiece];
        for (int tile = 0; tile < kTilesOfPiece; tile++) {
            const int64_t at = begin + tile * kTile;
            is_seen[tile] = last_keys.end > at && first_keys.begin < at + kTile;
            if (is_seen[tile])
                multiply_rows<T>(
                    count, scratch.queries + first,
                    scratch.keys + tile * tile_elements<T>(shape.head_dim), steps, sums[tile]);
            ahead.fetch(8);
        }
        constexpr int kPieceVectors = kPieceKeys / kLanes;
        float* weights = scratch.weights;
        float* highest = scratch.highest + first;
        float now[kLanes];
        store(now, load(highest));
        const Floats hidden = splat(-__builtin_inff());
        for (int64_t row = 0; row < count; row++) {
            Floats scores[kPieceVectors];
            for (int tile = 0; tile < kTilesOfPiece; tile++) {
                scores[2 * tile] = is_seen[tile] ? sums[tile][row].low * scale : hidden;
                scores[2 * tile + 1] = is_seen[tile] ? sums[tile][row].high * scale : hidden;
            }
            if (!is_whole) {
                const Extent keys = keys_of(plan, scratch.positions[first + row]);
                const int32_t from = int32_t(std::max<int64_t>(keys.begin - begin, 0));
                const int32_t to = int32_t(std::min(keys.end - begin, kPieceKeys));
                for (int vector = 0; vector < kPieceVectors; vector++) {
                    const Ints key = Ints{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}
                                     + vector * kLanes;
                    scores[vector] = ((key >= from) & (key < to)) ? scores[vector] : hidden;
                }
            }
            Floats most = larger(larger(scores[0], scores[1]), larger(scores[2], scores[3]));
            now[row] = std::max(now[row], highest_of(most));
            for (int vector = 0; vector < kPieceVectors; vector++)
                store(weights + row * kPieceKeys + vector * kLanes, scores[vector]);
        }
        ahead.fetch(8);
        store(factors, exp_below_zero(load(highest) - load(now)));
        store(highest, load(now), count);
        for (int64_t row = 0; row < count; row++) {
            float* row_weights = weights + row * kPieceKeys;
            Floats part[kPieceVectors];
#pragma GCC unroll 4
            for (int vector = 0; vector < kPieceVectors; vector++) {
                part[vector] =
                    exp_below_zero(load(row_weights + vector * kLanes) - splat(now[row]));
                store(row_weights + vector * kLanes, part[vector]);
            }
            float* lanes = records + (first + row) * shape.record() + shape.padded;
            Floats sum = (part[0] + part[1]) + (part[2] + part[3]);
            store(lanes, fma(load(lanes), splat(factors[row]), sum));
        }
    }

    // parts = weights @ values for rows first .. + count, each over the keys that it sees.
    template <class TValue>
    void sum_values(
        int64_t first, int64_t count, int64_t begin, const TValue* values,
        const TValue* next_keys, const int64_t* places, const AttentionScratch<T>& scratch) const {
        int64_t from[kMaxRows], to[kMaxRows];
        for (int64_t row = 0; row < count; row++) {
            const Extent keys = keys_of(plan, scratch.positions[first + row]);
            from[row] = std::max<int64_t>(keys.begin - begin, 0);
            to[row] = std::min(keys.end - begin, kPieceKeys);
        }
        if (from[count - 1] == from[0] && to[0] == to[count - 1]) {
            add_values(count, scratch.weights, values, next_keys, places, {from[0], to[0]}, false,
                       scratch.parts, shape.padded);
            return;
        }
        memset(scratch.parts, 0, count * shape.padded * sizeof(float));
        // neither end ever falls from row to row: the rows that see a key follow one another
        int64_t key = from[0], top = 0, bottom = 0;
        while (top < count) {
            while (bottom < count && from[bottom] <= key) bottom++;
            int64_t next = to[top];
            if (bottom < count) next = std::min(next, from[bottom]);
            if (bottom > top)
                add_values(bottom - top, scratch.weights + top * kPieceKeys, values, next_keys,
                           places, {key, next}, true, scratch.parts + top * shape.padded,
                           shape.padded);
            key = next;
            while (top < count && to[top] <= key) top++;
        }
    }

    template <class TValue>
    void attend_piece(
        Extent rows, int64_t begin, const TValue* values, const TValue* next_keys,
        const int64_t* places, const AttentionScratch<T>& scratch, float* records,
        Ahead<T>& ahead) const {
        for (int64_t first = rows.begin; first < rows.end; first += kMaxRows) {
            const int64_t count = std::min<int64_t>(kMaxRows, rows.end - first);
            float factors[kLanes];
            weigh(first, count, begin, scratch, records, factors, ahead);
            sum_values(first, count, begin, values, next_keys, places, scratch);
            for (int64_t row = 0; row < count; row++) {
                float* record = records + (first + row) * shape.record();
                const float* part = scratch.parts + row * shape.padded;
                const Floats factor = splat(factors[row]);
                for (int64_t at = 0; at < shape.padded; at += kLanes)
                    store(record + at, fma(load(record + at), factor, load(part + at)));
            }
        }
    }

    // Rows of the tile that see a key of the piece at `begin`.
    Extent rows_of(const AttentionTile& tile, int64_t begin) const {
        int64_t first = std::max<int64_t>(begin - tile.first_position, 0);
        int64_t last = tile.count;
        if (plan.window > 0)
            last = std::min(last, begin + kPieceKeys - 1 + plan.window - tile.first_position);
        return {first * shape.group, last * shape.group};
    }

    // Leave in `records` each row's result over the keys of one span; rows that see none of them
    // have an undefined record.
    void attend_span(
        const AttentionTile& tile, int64_t kv_head, int64_t span,
        const AttentionScratch<T>& scratch, float* records) const {
        const int64_t num_rows = tile.count * shape.group;
        const int64_t origin = span * kSpanKeys;
        const Extent keys = {
            std::max(keys_of(plan, tile.first_position).begin, origin),
            std::min<int64_t>(tile.first_position + tile.count, origin + kSpanKeys)};
        find_keys(tile, kv_head, keys, scratch.places);
        memset(records, 0, num_rows * shape.record() * sizeof(float));
        for (int64_t row = 0; row < num_rows + kLanes; row++) scratch.highest[row] = kUnseen;
        const bool is_direct = shape.head_dim % kLanes == 0
                               && (std::is_same<T, float>::value || num_rows <= kMaxRows);
        for (int64_t begin = keys.begin / kPieceKeys * kPieceKeys; begin < keys.end;
             begin += kPieceKeys) {
            const Extent rows = rows_of(tile, begin);
            const int64_t* places = scratch.places + (begin - origin);
            Ahead<T> ahead(value_cache, places, shape.head_dim);
            pack_keys(key_cache, places, shape.head_dim, scratch.keys, ahead);
            if (is_direct) {
                attend_piece(rows, begin, value_cache, key_cache, places, scratch, records, ahead);
                continue;
            }
            for (int64_t key = 0; key < kPieceKeys; key++)
                for (int64_t at = 0; at < shape.head_dim; at += kLanes)
                    store(scratch.values + key * shape.padded + at,
                          load(value_cache + places[key] + at, shape.head_dim - at));
            attend_piece(rows, begin, scratch.values, scratch.values, scratch.in_order, scratch,
                         records, ahead);
        }
        for (int64_t row = 0; row < num_rows; row++) {
            float* end = records + row * shape.record() + shape.padded;
            const float sum = sum_of(load(end));
            end[0] = scratch.highest[row];
            end[1] = sum;
        }
    }

    // Bring a row's next span into its record.
    void merge(float* record, const float* next) const {
        const float highest = std::max(record[shape.padded], next[shape.padded]);
        const float factor = exp_below_zero(record[shape.padded] - highest);
        const float next_factor = exp_below_zero(next[shape.padded] - highest);
        for (int64_t at = 0; at < shape.padded; at += kLanes)
            store(record + at, fma(load(next + at), splat(next_factor),
                                   load(record + at) * splat(factor)));
        record[shape.padded] = highest;
        record[shape.padded + 1] =
            record[shape.padded + 1] * factor + next[shape.padded + 1] * next_factor;
    }

    // Write the result of one row.
    void finish(
        const AttentionTile& tile, int64_t kv_head, int64_t row, const float* record) const {
        const int64_t head = kv_head * shape.group + row % shape.group;
        const int64_t token = tile.first_row + row / shape.group;
        T* to = out + (token * shape.num_heads + head) * shape.head_dim;
        float sum = record[shape.padded + 1], factor = 1.0f;
        if (sinks) {
            const float highest = std::max(record[shape.padded], sinks[head]);
            factor = exp_below_zero(record[shape.padded] - highest);
            sum = sum * factor + exp_below_zero(sinks[head] - highest);
        }
        for (int64_t at = 0; at < shape.head_dim; at += kLanes)
            store(to + at, load(record + at) * splat(factor) / splat(sum), shape.head_dim - at);
    }

    // Work out all spans of a tile, one after the other.
    void attend(const AttentionTile& tile, int64_t kv_head) const {
        const int64_t num_rows = tile.count * shape.group;
        const AttentionScratch<T> scratch(shape, num_rows);
        find_rows(tile, kv_head, scratch);
        const Extent spans = spans_of(plan, tile);
        for (int64_t span = spans.begin; span < spans.end; span++) {
            attend_span(tile, kv_head, span, scratch, scratch.records);
            for (int64_t row = 0; row < num_rows; row++) {
                const int64_t position = scratch.positions[row];
                const Extent seen = spans_of(plan, position, position);
                float* record = scratch.records + row * shape.record();
                float* total = scratch.totals + row * shape.record();
                if (span < seen.begin || span >= seen.end) continue;
                if (span > seen.begin) merge(total, record);
                if (span == seen.end - 1)
                    finish(tile, kv_head, row, span > seen.begin ? total : record);
                else if (span == seen.begin)
                    memcpy(total, record, shape.record() * sizeof(float));
            }
        }
    }

    // The records of a split tile in the workspace: [num_kv_heads, spans, rows].
    float* partial(const AttentionTile& tile, int64_t kv_head, int64_t span, float* memory) const {
        const Extent spans = spans_of(plan, tile);
        const int64_t index = kv_head * (spans.end - spans.begin) + span - spans.begin;
        return memory + index * tile.count * shape.group * shape.record();
    }

    void attend_partly(
        const AttentionTile& tile, int64_t kv_head, int64_t span, float* memory) const {
        const AttentionScratch<T> scratch(shape, tile.count * shape.group);
        find_rows(tile, kv_head, scratch);
        attend_span(tile, kv_head, span, scratch, partial(tile, kv_head, span, memory));
    }

    void merge_spans(const AttentionTile& tile, int64_t kv_head, float* memory) const {
        for (int64_t row = 0; row < tile.count * shape.group; row++) {
            const int64_t position = tile.first_position + row / shape.group;
            const Extent seen = spans_of(plan, position, position);
            const int64_t at = row * shape.record();
            float* total = partial(tile, kv_head, seen.begin, memory) + at;
            for (int64_t span = seen.begin + 1; span < seen.end; span++)
                merge(total, partial(tile, kv_head, span, memory) + at);
            finish(tile, kv_head, row, total);
        }
    }
};

// query: [num_tokens, num_heads, head_dim] with query_stride elements from token to token; caches:
// [num_kv_heads, num_slots, head_dim]; sinks: [num_heads], or null; out: as query, without gaps;
// workspace: `attention_workspace` floats.
template <class T>
static void paged_attention(
    const AttentionPlan& plan, const T* query, int64_t query_stride, const T* key_cache,
    const T* value_cache, int64_t num_slots, int64_t num_heads, int64_t num_kv_heads,
    int64_t head_dim, float scale, const float* sinks, T* out, float* workspace) {
    const AttentionShape shape(num_heads, num_kv_heads, head_dim);
    const Attention<T> attention{plan,        shape,     query, query_stride, key_cache,
                                 value_cache, num_slots, scale, sinks,        out};
    // items before each tile, and its place in the workspace
    static thread_local Scratch memory;
    int64_t* items_before = memory.get<int64_t>(2 * (plan.num_tiles + 1));
    int64_t* place = items_before + plan.num_tiles + 1;
    items_before[0] = place[0] = 0;
    for (int64_t index = 0; index < plan.num_tiles; index++) {
        const AttentionTile& tile = plan.tiles[index];
        const Extent spans = spans_of(plan, tile);
        const int64_t parts = is_split(plan, tile, shape) ? spans.end - spans.begin : 1;
        items_before[index + 1] = items_before[index] + parts * num_kv_heads;
        place[index + 1] = place[index] + tile_workspace(plan, tile, shape);
    }
    const int64_t num_tiles = plan.num_tiles;
#pragma omp for schedule(dynamic, 1)
    for (int64_t item = 0; item < items_before[num_tiles]; item++) {
        const int64_t index =
            std::upper_bound(items_before, items_before + num_tiles, item) - items_before - 1;
        const AttentionTile& tile = plan.tiles[index];
        const int64_t part = item - items_before[index];
        if (place[index + 1] == place[index])
            attention.attend(tile, part);
        else
            attention.attend_partly(tile, part % num_kv_heads,
                                    spans_of(plan, tile).begin + part / num_kv_heads,
                                    workspace + place[index]);
    }
    if (place[num_tiles] == 0) return;
#pragma omp for schedule(dynamic, 1)
    for (int64_t item = 0; item < num_tiles * num_kv_heads; item++) {
        const int64_t index = item / num_kv_heads;
        if (place[index + 1] > place[index])
            attention.merge_spans(
                plan.tiles[index], item % num_kv_heads, workspace + place[index]);
    }
}
