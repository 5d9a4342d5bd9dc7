// Experts' gated MLPs, read from expert records in memory.
//
// A record's weights, after its header: gate and up together, in tiles of 32 outputs of which the
// first 16 are gate's and the others the same outputs of up; then down, as a linear weight of
// [hidden_size, intermediate_size]. Both packed as linear.h packs.

constexpr int64_t kRecordHeader = 64;

template <class T>
static inline int64_t gate_up_elements(int64_t hidden_size, int64_t intermediate_size) {
    return ceil_div(intermediate_size, kLanes) * tile_elements<T>(hidden_size);
}

template <class T>
static inline int64_t down_elements(int64_t hidden_size, int64_t intermediate_size) {
    return ceil_div(hidden_size, kTile) * tile_elements<T>(intermediate_size);
}

// Elements between the rows of what the down projection reads: whole vectors.
static inline int64_t inner_stride(int64_t intermediate_size) {
    return ceil_div(intermediate_size, kLanes) * kLanes;
}

// Pack the weights of one record in place: plain gate, up [intermediate_size, hidden_size] and down
// [hidden_size, intermediate_size], one after the other behind the header. plain: room for them.
template <class T>
static void pack_record(char* record, int64_t hidden_size, int64_t intermediate_size, T* plain) {
    T* packed = (T*)(record + kRecordHeader);
    const int64_t one = hidden_size * intermediate_size;
    memcpy(plain, packed, 3 * one * sizeof(T));
    for (int64_t tile = 0; tile < ceil_div(intermediate_size, kLanes); tile++) {
        const T* rows[kTile];
        for (int lane = 0; lane < kLanes; lane++) {
            const int64_t output = tile * kLanes + lane;
            const bool is_there = output < intermediate_size;
            rows[lane] = is_there ? plain + output * hidden_size : nullptr;
            rows[kLanes + lane] = is_there ? rows[lane] + one : nullptr;
        }
        pack_tile(rows, hidden_size, packed);
        packed += tile_elements<T>(hidden_size);
    }
    for (int64_t tile = 0; tile < ceil_div(hidden_size, kTile); tile++) {
        const T* rows[kTile];
        for (int column = 0; column < kTile; column++) {
            const int64_t output = tile * kTile + column;
            const bool is_there = output < hidden_size;
            rows[column] = is_there ? plain + 2 * one + output * intermediate_size : nullptr;
        }
        pack_tile(rows, intermediate_size, packed);
        packed += tile_elements<T>(intermediate_size);
    }
}

// Pack all records. *failed becomes 1 where there is no memory for a copy of one record.
template <class T>
static void pack_records(
    char* records, int64_t record_bytes, int64_t num_records, int64_t hidden_size,
    int64_t intermediate_size, int32_t* failed) {
    T* plain = (T*)malloc(3 * hidden_size * intermediate_size * sizeof(T));
#pragma omp for schedule(dynamic, 1)
    for (int64_t record = 0; record < num_records; record++) {
        if (plain)
            pack_record(records + record * record_bytes, hidden_size, intermediate_size, plain);
        else
#pragma omp atomic write
            *failed = 1;
    }
    free(plain);
}

// Some pairs of one expert: as many as are multiplied while their inputs are in a core's cache.
struct PairChunk {
    int32_t expert;
    int32_t count;
    int64_t first;
};

// List the chunks of all experts, or of those in `only`, [num_experts], if it is not null; `chunks`
// has room for num_experts + num_pairs / kChunkRows.
static inline int64_t list_chunks(
    const ExpertTable& experts, const int64_t* counts, const uint8_t* only, PairChunk* chunks) {
    int64_t num_chunks = 0, first = 0;
    for (int64_t expert = 0; expert < experts.num_experts; expert++) {
        if (only && !only[expert]) {
            first += counts[expert];
            continue;
        }
        const int64_t pieces = ceil_div(counts[expert], kChunkRows);
        for (int64_t piece = 0; piece < pieces; piece++) {
            // as even as can be: a short last chunk would keep its weights busy for few rows
            const int64_t begin = counts[expert] * piece / pieces;
            const int64_t end = counts[expert] * (piece + 1) / pieces;
            chunks[num_chunks++] = {int32_t(expert), int32_t(end - begin), first + begin};
        }
        if (experts.uses) experts.uses[expert] += counts[expert];
        first += counts[expert];
    }
    return num_chunks;
}

// Whether an expert that has pairs is not resident.
static inline bool is_any_missing(const ExpertTable& experts, const int64_t* counts) {
    for (int64_t expert = 0; expert < experts.num_experts; expert++)
        if (counts[expert] && experts.slot_of_expert[expert] < 0) return true;
    return false;
}

template <class T>
static inline const T* weights_of(const ExpertTable& experts, int32_t expert) {
    const int64_t slot = experts.slot_of_expert[expert];
    return (const T*)(experts.records + slot * experts.record_bytes + kRecordHeader);
}

// inner = silu(gate) * up for every pair, [num_pairs, inner_stride]; row_of_pair says which row of
// `rows` a pair reads, pairs sorted by expert.
template <class T>
static void gate_up(
    const ExpertTable& experts, const PairChunk* chunks, int64_t num_chunks, const T* rows,
    const int64_t* row_of_pair, T* inner) {
    const int64_t hidden_size = experts.hidden_size;
    const int64_t tiles = ceil_div(experts.intermediate_size, kLanes);
    const int64_t stride = inner_stride(experts.intermediate_size);
    const int64_t steps = steps_of<T>(hidden_size);
#pragma omp for schedule(dynamic, 1)
    for (int64_t item = 0; item < num_chunks * tiles; item++) {
        const PairChunk chunk = chunks[item / tiles];
        const int64_t tile = item % tiles;
        const T* weights = weights_of<T>(experts, chunk.expert) + tile * tile_elements<T>(hidden_size);
        RowsFor<T, T> rows_for;
        for (int64_t begin = 0; begin < chunk.count; begin += kMaxRows) {
            const int64_t count = std::min<int64_t>(kMaxRows, chunk.count - begin);
            const int64_t pair = chunk.first + begin;
            const T* pointers[kMaxRows];
            for (int64_t row = 0; row < count; row++)
                pointers[row] = rows + row_of_pair[pair + row] * hidden_size;
            Sums sums[kMaxRows];
            multiply_rows<T>(count, rows_for(pointers, count, hidden_size), weights, steps, sums);
            for (int64_t row = 0; row < count; row++)
                store(inner + (pair + row) * stride + tile * kLanes,
                      silu(rounded_to<T>(sums[row].low)) * rounded_to<T>(sums[row].high));
        }
    }
}

// out = inner times each pair's down projection: [num_pairs, hidden_size], unweighted.
template <class T>
static void down(
    const ExpertTable& experts, const PairChunk* chunks, int64_t num_chunks, const T* inner,
    T* out) {
    const int64_t hidden_size = experts.hidden_size, size = experts.intermediate_size;
    const int64_t tiles = ceil_div(hidden_size, kTile);
    const int64_t stride = inner_stride(size);
    const int64_t offset = gate_up_elements<T>(hidden_size, size);
    const int64_t steps = steps_of<T>(size);
    // a tile is short: several at a time
    const int64_t group = std::max<int64_t>(1, 32768 / tile_elements<T>(size));
    const int64_t groups = ceil_div(tiles, group);
#pragma omp for schedule(dynamic, 1)
    for (int64_t item = 0; item < num_chunks * groups; item++) {
        const PairChunk chunk = chunks[item / groups];
        const int64_t first_tile = item % groups * group;
        const int64_t last_tile = std::min(first_tile + group, tiles);
        const T* packed = weights_of<T>(experts, chunk.expert) + offset;
        for (int64_t tile = first_tile; tile < last_tile; tile++) {
            const T* weights = packed + tile * tile_elements<T>(size);
            const int64_t column = tile * kTile;
            const int64_t width = std::min<int64_t>(kTile, hidden_size - column);
            for (int64_t begin = 0; begin < chunk.count; begin += kMaxRows) {
                const int64_t count = std::min<int64_t>(kMaxRows, chunk.count - begin);
                const int64_t pair = chunk.first + begin;
                const T* pointers[kMaxRows];
                for (int64_t row = 0; row < count; row++)
                    pointers[row] = inner + (pair + row) * stride;
                Sums sums[kMaxRows];
                multiply_rows<T>(count, pointers, weights, steps, sums);
                for (int64_t row = 0; row < count; row++) {
                    T* to = out + (pair + row) * hidden_size + column;
                    store(to, sums[row].low, width);
                    if (width > kLanes) store(to + kLanes, sums[row].high, width - kLanes);
                }
            }
        }
    }
}

// Both, one after the other.
template <class T>
static void moe(
    const ExpertTable& experts, const PairChunk* chunks, int64_t num_chunks, const T* rows,
    const int64_t* row_of_pair, T* inner, T* out) {
    gate_up(experts, chunks, num_chunks, rows, row_of_pair, inner);
    down(experts, chunks, num_chunks, inner, out);
}
