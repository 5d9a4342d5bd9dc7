// The order of tokens by their logits, the larger first and of equals the lower id: comparisons,
// places, and the first few of a row.

constexpr int64_t kStripes = 32 * kLanes;
constexpr float kInfinity = __builtin_inff();

static inline Ints lane_numbers() {
    return Ints{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
}

// As load(from, count), but what is beyond `count` is `fill`.
static inline Floats load_or(const float* from, int64_t count, float fill) {
    if (count >= kLanes) return load(from);
    Ints is_there = is_less(lane_numbers(), splat_int(int32_t(count)));
    return selected(is_there, load(from, count), splat(fill));
}

// Integers that are smaller the larger the float; -0 is 0, and a NaN has its place too.
static inline Ints order_of(Floats values) {
    Ints bits = (Ints)(values + 0.0f);
    return ~(bits ^ ((bits >> 31) & 0x7FFFFFFF));
}

// One number for value and id: the smaller, the earlier.
static inline int64_t order_key(int32_t order, int64_t id) {
    return int64_t(uint64_t(int64_t(order)) << 32) | id;
}

static inline int64_t id_of_key(int64_t key) {
    return key & 0x7FFFFFFF;
}

// Between two tokens: before it come all larger values, and of its own value the ids below `id`.
struct Place {
    float value;
    int64_t id;
};

constexpr Place kAfterAll = {-kInfinity, 0};  // after all but what is -inf

static inline Ints are_before(Place place, Floats values, int64_t first_id) {
    Ints ids = lane_numbers() + int32_t(first_id);
    const Floats value = splat(place.value);
    return is_more(values, value)
           | (is_equal(values, value) & is_less(ids, splat_int(int32_t(place.id))));
}

// Largest of a row, -inf where all are NaN.
static inline float largest_value(const float* values, int64_t count) {
    Floats largest[4] = {
        splat(-kInfinity), splat(-kInfinity), splat(-kInfinity), splat(-kInfinity)};
    int64_t at = 0;
    for (; at + 4 * kLanes <= count; at += 4 * kLanes)
        for (int part = 0; part < 4; part++)
            largest[part] = larger(load(values + at + part * kLanes), largest[part]);
    for (; at < count; at += kLanes)
        largest[0] = larger(load_or(values + at, count - at, -kInfinity), largest[0]);
    return largest_of(larger(larger(largest[0], largest[1]), larger(largest[2], largest[3])));
}

// Keys of the first `wanted` tokens (1 .. count), the last of them last; they live until the next
// call.
static int64_t* first_keys(const float* values, int64_t count, int64_t wanted) {
    // The best of each stripe (every 512th token): as many tokens as there are stripes up to the
    // wanted one are at least as good as its best, so all that are sought are.
    alignas(64) int32_t bests[kStripes];
    for (int32_t& best : bests) best = INT32_MAX;
    for (int64_t at = 0; at < count; at += kLanes) {
        Ints best, order = order_of(load_or(values + at, count - at, -kInfinity));
        int32_t* stripes = bests + at % kStripes;
        memcpy(&best, stripes, sizeof best);
        Ints is_better = is_less(order, best);
        if (count - at < kLanes)
            is_better &= is_less(lane_numbers(), splat_int(int32_t(count - at)));
        best = (Ints)selected(is_better, (Floats)order, (Floats)best);
        memcpy(stripes, &best, sizeof best);
    }
    int32_t last = INT32_MAX;
    if (wanted <= kStripes) {
        std::nth_element(bests, bests + wanted - 1, bests + kStripes);
        last = bests[wanted - 1];
    }

    static thread_local Scratch scratch;
    int64_t* keys = scratch.get<int64_t>(count);
    int64_t num_keys = 0;
    for (int64_t at = 0; at < count; at += kLanes) {
        Ints order = order_of(load_or(values + at, count - at, -kInfinity));
        Ints is_worse = is_less(splat_int(last), order);
        if (!is_any(~is_worse)) continue;
        for (int lane = 0; lane < std::min<int64_t>(kLanes, count - at); lane++)
            if (!is_worse[lane]) keys[num_keys++] = order_key(order[lane], at + lane);
    }
    std::nth_element(keys, keys + wanted - 1, keys + num_keys);
    return keys;
}
