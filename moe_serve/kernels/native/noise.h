// Gumbel noise from a hash of seed, position and token id: reference.py's uniform numbers to the
// bit; the logs are our own.

struct NoiseKey {
    uint32_t multiplier, addend;
};

static inline Floats uniform_numbers(NoiseKey key, Words hashes) {
    Words words = hashes * key.multiplier + key.addend;
    words ^= words >> 16;
    words *= 0x21F0AAADu;
    words ^= words >> 15;
    words *= 0xD35A2D97u;
    words ^= words >> 15;
    // (1 - 2^-24) / 2^31, so that the largest is below 1
    constexpr float kScale = float((1.0 - 1.0 / 16777216.0) / 2147483648.0);
    return (__builtin_convertvector((Ints)(words & 0x7FFFFFFFu), Floats) + 0.5f) * kScale;
}

// log(x) within 2 units in the last place, for x that is positive, normal and finite.
static inline Floats log(Floats x) {
    constexpr int32_t kRootHalf = 0x3F3504F3;
    Ints above = (Ints)x - kRootHalf;
    Floats power = __builtin_convertvector(above >> 23, Floats);
    Floats rest = (Floats)((above & 0x7FFFFF) + kRootHalf) - 1.0f;  // 1 + rest: 0.7 to 1.42
    Floats ratio = rest / (rest + 2.0f);  // log(1 + rest) is 2 atanh(ratio)
    Floats square = ratio * ratio;        // at most 0.03
    Floats series = splat(2.0f / 9.0f);
    series = fma(series, square, splat(2.0f / 7.0f));
    series = fma(series, square, splat(2.0f / 5.0f));
    series = fma(series, square, splat(2.0f / 3.0f));
    Floats result = fma(series * square, ratio, power * 1.42860677e-6f) + (ratio + ratio);
    return fma(power, splat(0.693145752f), result);
}

// -log(-log(1 - u)) for u from uniform_numbers: from -2.82 to 22.19, within 2.2e-7 below 1 and that
// share of it above.
static inline Floats gumbel(Floats uniform) {
    Floats left = 1.0f - uniform;
    Floats lost = (1.0f - left) - uniform;  // what rounding took from `left`
    return -log(-(log(left) + lost / left));
}

constexpr float kMostNoise = 22.19f;

// What gumbel(uniform) is at most, by less than 0.11 in excess where it is above 2:
// -log(1 - u) >= u, and the bits of a float, read as an integer, are a lower bound of its log2.
static inline Floats most_gumbel(Floats uniform) {
    constexpr float kLog2 = 0.693147181f;
    Floats log2 = __builtin_convertvector((Ints)uniform, Floats) * (1.0f / 8388608.0f);
    return fma(log2, splat(-kLog2), splat(127.0f * kLog2 + 1e-4f));
}

static inline uint64_t mixed(uint64_t word) {
    word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9u;
    word = (word ^ (word >> 27)) * 0x94D049BB133111EBu;
    return word ^ (word >> 31);
}

// seeds, positions: [num_rows]; keys: [num_rows, 2].
static inline void row_keys(
    const uint64_t* seeds, const int64_t* positions, int64_t num_rows, int32_t* keys) {
    constexpr uint64_t kGolden = 0x9E3779B97F4A7C15u;
    for (int64_t row = 0; row < num_rows; row++) {
        uint64_t key = mixed(mixed(seeds[row] + kGolden) + (uint64_t(positions[row]) + 1) * kGolden);
        keys[2 * row] = int32_t(uint32_t(key) | 1);
        keys[2 * row + 1] = int32_t(key >> 32);
    }
}
