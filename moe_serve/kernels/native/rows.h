// What is done to rows one by one: norms, rotation, activation, the weighted sum of experts.

template <class T>
static inline void add_rms_norm_row(
    const T* row, const T* residual, const T* weight, int64_t size, float eps, T* out, T* total) {
    Floats squares{};
    for (int64_t at = 0; at < size; at += kLanes) {
        Floats value = load(row + at, size - at);
        if (residual) {
            value = rounded_to<T>(value + load(residual + at, size - at));
            store(total + at, value, size - at);
        }
        squares = fma(value, value, squares);
    }
    const Floats scale = splat(1.0f / __builtin_sqrtf(sum_of(squares) / float(size) + eps));
    const T* from = residual ? total : row;
    for (int64_t at = 0; at < size; at += kLanes) {
        Floats value = rounded_to<T>(load(from + at, size - at) * scale);
        store(out + at, value * load(weight + at, size - at), size - at);
    }
}

// out = the norm of rows (+ residual, whose sum goes to total; total may be residual itself).
template <class T>
static void add_rms_norm(
    const T* rows, const T* residual, const T* weight, int64_t num_rows, int64_t size, float eps,
    T* out, T* total) {
#pragma omp for schedule(static)
    for (int64_t row = 0; row < num_rows; row++) {
        const int64_t at = row * size;
        add_rms_norm_row(
            rows + at, residual ? residual + at : nullptr, weight, size, eps, out + at,
            total ? total + at : nullptr);
    }
}

// Rotate one head by its position; cos, sin: [head_dim / 2]. In place where out is row.
template <class T>
static inline void rotate(
    const T* row, const float* cos, const float* sin, int64_t head_dim, T* out) {
    const int64_t half = head_dim / 2;
    for (int64_t at = 0; at < half; at += kLanes) {
        const int64_t left = half - at;
        Floats first = load(row + at, left), second = load(row + half + at, left);
        Floats c = load(cos + at, left), s = load(sin + at, left);
        store(out + at, fma(first, c, -(second * s)), left);
        store(out + half + at, fma(second, c, first * s), left);
    }
}

// Norm the queries of one token, `query_size` of them at a time, and the keys likewise.
template <class T>
static inline void norm_heads(
    const HeadsArguments& how, T* query, T* key, int64_t query_size, int64_t key_size) {
    const int64_t query_width = how.num_heads * how.head_dim;
    const int64_t kv_width = how.num_kv_heads * how.head_dim;
    for (int64_t at = 0; at < query_width; at += query_size)
        add_rms_norm_row<T>(query + at, nullptr, (const T*)how.query_norm, query_size, how.norm_eps,
                            query + at, nullptr);
    for (int64_t at = 0; at < kv_width; at += key_size)
        add_rms_norm_row<T>(key + at, nullptr, (const T*)how.key_norm, key_size, how.norm_eps,
                            key + at, nullptr);
}

// Norm, clip and rotate queries and keys; write keys and values into the cache.
// qkv: [num_tokens, (num_heads + 2 num_kv_heads) * head_dim], changed in place.
template <class T>
static void rotate_and_write(
    const HeadsArguments& how, T* qkv, int64_t num_tokens, const int64_t* positions,
    const int64_t* slots, T* key_cache, T* value_cache, int64_t num_slots) {
    const int64_t dim = how.head_dim;
    const int64_t query_width = how.num_heads * dim, kv_width = how.num_kv_heads * dim;
    const int64_t width = query_width + 2 * kv_width;
#pragma omp for schedule(static)
    for (int64_t token = 0; token < num_tokens; token++) {
        T* query = qkv + token * width;
        T* key = query + query_width;
        T* value = key + kv_width;
        if (how.query_norm && how.key_norm && how.is_norm_full)
            norm_heads<T>(how, query, key, query_width, kv_width);
        if (how.clip > 0) {
            for (int64_t at = 0; at < width; at += kLanes) {
                Floats all = load(query + at, width - at);
                Floats kept = smaller(larger(all, splat(-how.clip)), splat(how.clip));
                store(query + at, selected(is_equal(all, all), kept, all), width - at);
            }
        }
        if (how.query_norm && how.key_norm && !how.is_norm_full)
            norm_heads<T>(how, query, key, dim, dim);
        const float* c = how.cos + positions[token] * (dim / 2);
        const float* s = how.sin + positions[token] * (dim / 2);
        for (int64_t head = 0; head < how.num_heads; head++)
            rotate(query + head * dim, c, s, dim, query + head * dim);
        for (int64_t head = 0; head < how.num_kv_heads; head++) {
            const int64_t slot = (head * num_slots + slots[token]) * dim;
            rotate(key + head * dim, c, s, dim, key_cache + slot);
            memcpy(value_cache + slot, value + head * dim, dim * sizeof(T));
        }
    }
}

// silu(gate) * up of rows that hold both side by side, [num_rows, 2 * size].
template <class T>
static void silu_and_mul(const T* gate_up, int64_t num_rows, int64_t size, T* out) {
#pragma omp for schedule(static)
    for (int64_t row = 0; row < num_rows; row++) {
        const T *gate = gate_up + row * 2 * size, *up = gate + size;
        for (int64_t at = 0; at < size; at += kLanes)
            store(out + row * size + at,
                  silu(load(gate + at, size - at)) * load(up + at, size - at), size - at);
    }
}

// Each token's weighted sum over its experts, in the order of its choices, then the shared part
// (times its weight, where there is one), rounded once.
// rows: [num_pairs, size]; pair_of_choice, weights: [num_tokens, top_k]; shared: [num_tokens, size].
template <class T>
static void combine(
    const T* rows, const int64_t* pair_of_choice, const float* weights, int64_t num_tokens,
    int64_t top_k, int64_t size, const T* shared, const float* shared_weights, T* out) {
#pragma omp for schedule(static)
    for (int64_t token = 0; token < num_tokens; token++) {
        const int64_t* pairs = pair_of_choice + token * top_k;
        const float* factors = weights + token * top_k;
        for (int64_t at = 0; at < size; at += kLanes) {
            const int64_t left = size - at;
            Floats total{};
            for (int64_t choice = 0; choice < top_k; choice++)
                total = fma(load(rows + pairs[choice] * size + at, left),
                            splat(factors[choice]), total);
            if (shared) {
                Floats part = load(shared + token * size + at, left);
                if (shared_weights) part = part * shared_weights[token];
                total = total + part;
            }
            store(out + token * size + at, total, left);
        }
    }
}

// Copy rows of a plain table: [num_ids, size].
template <class T>
static void gather_rows(
    const T* table, int64_t size, const int64_t* ids, int64_t num_ids, T* out) {
#pragma omp for schedule(static)
    for (int64_t index = 0; index < num_ids; index++)
        memcpy(out + index * size, table + ids[index] * size, size * sizeof(T));
}
