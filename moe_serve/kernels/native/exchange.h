// Rows of bytes between ranks: a token's hidden row, and after it int16 names of the experts it is
// for, one place for each of its choices, -1 where that choice is of another rank.

using Name = int16_t;

// Of capacity slots for each of num_ranks in each round (RowPlan in exchange/base.py); capacity
// below 0: no slots, only the rows that a rank needs. width: results for each row; below 0: no more
// than there are.
struct RowRoom {
    int64_t num_ranks, capacity, rounds, width;
};

// Fill `out` with rows of hidden_bytes and names, for rank 0 first (in each round). Of an expert's
// replicas, [most_replicas] of which the first num_replicas count, the token's number decides.
// ids: [num_tokens, top_k]. places: [num_tokens, top_k], of each choice's result once all are back.
// rows_of_rank, pairs_of_rank: [num_ranks].
static inline void pack_rows(
    const RowRoom& room, const char* hidden, int64_t hidden_bytes, const int64_t* ids,
    int64_t num_tokens, int64_t top_k, const int64_t* replicas, int64_t most_replicas,
    const int64_t* num_replicas, char* out, int64_t* places, int64_t* rows_of_rank,
    int64_t* pairs_of_rank) {
    static thread_local Scratch scratch;
    const int64_t size = room.num_ranks, row_bytes = hidden_bytes + top_k * int64_t(sizeof(Name));
    int64_t* seen = scratch.get<int64_t>(5 * size);  // the last token that a rank was sent
    int64_t *row_of = seen + size, *turn_of = row_of + size;  // of that token
    int64_t *next_row = turn_of + size, *next_pair = next_row + size;
    memset(rows_of_rank, 0, size * sizeof(int64_t));
    memset(pairs_of_rank, 0, size * sizeof(int64_t));
    for (int64_t rank = 0; rank < size; rank++) seen[rank] = -1;
    for (int64_t token = 0; token < num_tokens; token++)
        for (int64_t pair = token * top_k; pair < (token + 1) * top_k; pair++) {
            const int64_t expert = ids[pair];
            const int64_t rank = replicas[expert * most_replicas + token % num_replicas[expert]];
            places[pair] = rank;
            pairs_of_rank[rank]++;
            if (seen[rank] != token) rows_of_rank[rank]++;
            seen[rank] = token;
        }
    int64_t num_rows = 0, num_pairs = 0;
    for (int64_t rank = 0; rank < size; rank++) {
        next_row[rank] = num_rows;
        next_pair[rank] = num_pairs;
        seen[rank] = -1;
        num_rows += rows_of_rank[rank];
        num_pairs += pairs_of_rank[rank];
    }
    const bool has_slots = room.capacity >= 0;
    if (has_slots) {
        for (int64_t rank = 0; rank < size; rank++) rows_of_rank[rank] = room.rounds * room.capacity;
        for (int64_t row = 0; row < room.rounds * size * room.capacity; row++)
            memset(out + row * row_bytes + hidden_bytes, 0xff, row_bytes - hidden_bytes);
    }
    for (int64_t token = 0; token < num_tokens; token++)
        for (int64_t choice = 0; choice < top_k; choice++) {
            const int64_t pair = token * top_k + choice, rank = places[pair];
            if (seen[rank] != token) {
                seen[rank] = token;
                turn_of[rank] = 0;
                row_of[rank] =
                    has_slots ? (token / room.capacity * size + rank) * room.capacity
                                    + token % room.capacity
                              : next_row[rank]++;
                char* row = out + row_of[rank] * row_bytes;
                memcpy(row, hidden + token * hidden_bytes, hidden_bytes);
                memset(row + hidden_bytes, 0xff, row_bytes - hidden_bytes);
            }
            const Name name = Name(ids[pair]);
            memcpy(out + row_of[rank] * row_bytes + hidden_bytes + choice * sizeof name, &name,
                   sizeof name);
            places[pair] = room.width >= 0 ? row_of[rank] * room.width + turn_of[rank]++
                                           : next_pair[rank]++;
        }
}

// Take apart what came: the rows that are for an expert here, to `rows`, and their pairs, sorted by
// expert, within one in the order of rows. rows_of_rank: [num_ranks], or null; counts:
// [num_experts]; row_of_pair, place_of_pair: [up to num_rows * top_k]; pairs_of_rank: [num_ranks].
// totals: rows and pairs. Returns 0, or 1 where an expert is named that there is none of.
static inline int32_t unpack_rows(
    const char* packed, int64_t num_rows, int64_t hidden_bytes, int64_t top_k, int64_t num_experts,
    const int64_t* rows_of_rank, int64_t num_ranks, int64_t width, char* rows, int64_t* counts,
    int64_t* row_of_pair, int64_t* place_of_pair, int64_t* pairs_of_rank, int64_t* totals) {
    static thread_local Scratch scratch;
    const int64_t row_bytes = hidden_bytes + top_k * int64_t(sizeof(Name));
    int64_t* next = scratch.get<int64_t>(num_experts);
    const auto name_at = [&](int64_t row, int64_t choice) {
        Name name;
        memcpy(&name, packed + row * row_bytes + hidden_bytes + choice * sizeof name, sizeof name);
        return int64_t(name);
    };
    memset(counts, 0, num_experts * sizeof(int64_t));
    for (int64_t row = 0; row < num_rows; row++)
        for (int64_t choice = 0; choice < top_k; choice++) {
            const int64_t name = name_at(row, choice);
            if (name >= num_experts) return 1;
            if (name >= 0) counts[name]++;
        }
    int64_t num_pairs = 0;
    for (int64_t expert = 0; expert < num_experts; expert++) {
        next[expert] = num_pairs;
        num_pairs += counts[expert];
    }
    int64_t rank = 0, end = rows_of_rank ? rows_of_rank[0] : num_rows, num_used = 0, num_seen = 0;
    memset(pairs_of_rank, 0, num_ranks * sizeof(int64_t));
    for (int64_t row = 0; row < num_rows; row++) {
        while (rows_of_rank && row == end && rank + 1 < num_ranks) end += rows_of_rank[++rank];
        int64_t turn = 0;
        for (int64_t choice = 0; choice < top_k; choice++) {
            const int64_t name = name_at(row, choice);
            if (name < 0) continue;
            const int64_t pair = next[name]++;
            row_of_pair[pair] = num_used;
            place_of_pair[pair] = width >= 0 ? row * width + turn : num_seen;
            turn++;
            num_seen++;
            pairs_of_rank[rank]++;
        }
        if (turn == 0) continue;
        memcpy(rows + num_used * hidden_bytes, packed + row * row_bytes, hidden_bytes);
        num_used++;
    }
    totals[0] = num_used;
    totals[1] = num_pairs;
    return 0;
}

// out[places[row]] = rows[row]. Returns 0, or 1 where a place is not in `out`, [out_rows].
static inline int32_t scatter_rows(
    const char* rows, int64_t num_rows, int64_t row_bytes, const int64_t* places, char* out,
    int64_t out_rows) {
    for (int64_t row = 0; row < num_rows; row++) {
        if (places[row] < 0 || places[row] >= out_rows) return 1;
        memcpy(out + places[row] * row_bytes, rows + row * row_bytes, row_bytes);
    }
    return 0;
}
